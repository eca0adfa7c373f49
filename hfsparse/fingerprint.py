"""The config values that change attention, spelled alike for every transformers version."""

from __future__ import annotations

import hashlib
import json
from typing import Any

LINEAR = ("linear_attention", "conv")  # kinds of layers that keep a state, and no key per token
OLD_NAMES = {"mamba": "linear_attention", "attention": "full_attention"}  # before 5.24


def fingerprint(config: Any) -> str:
    """Hash of `attention_values`; weights are not in it."""
    text = json.dumps(attention_values(config), sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def attention_values(config: Any) -> dict:
    """Shape, layer kinds, window and rope of a text decoder's config."""
    windowed = getattr(config, "use_sliding_window", True)  # qwen: a window may be set but off
    window = getattr(config, "sliding_window", None) if windowed else None
    every = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [every] * config.num_hidden_layers
    kinds = [OLD_NAMES.get(kind, kind) for kind in kinds]
    rotated = getattr(config, "no_rope_layers", None) or []  # 1 where a layer has rope
    return {
        **shape(config),
        "kinds": kinds,
        "window": window if "sliding_attention" in kinds else None,
        "rope": {kind: _rope(config, kind) for kind in sorted(set(kinds))},
        "without_rope": [layer for layer, rope in enumerate(rotated) if not rope],
    }


def windows(model_or_config: Any) -> list[int | None]:
    """Each layer's own sliding window, in tokens."""
    values = _values(model_or_config)
    return [values["window"] if kind == "sliding_attention" else None for kind in values["kinds"]]


def linear_layers(model_or_config: Any) -> list[int]:
    """The layers of a hybrid that have no attention."""
    return [i for i, kind in enumerate(_values(model_or_config)["kinds"]) if kind in LINEAR]


def _values(model_or_config: Any) -> dict:
    config = getattr(model_or_config, "config", model_or_config)
    return attention_values(config.get_text_config(decoder=True))


def weights_mark(model: Any) -> str:
    """Hash of a sample of every weight: tells a fine-tune from its base in a moment."""
    seen = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        few = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
        seen.update(name.encode() + few.float().cpu().numpy().tobytes())
    return seen.hexdigest()[:16]


def shape(config: Any) -> dict[str, Any]:
    """Layers, heads and head dim; ValueError for a config that has no single number of them."""
    layers, q_heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None)
    values = {
        "layers": layers,
        "q_heads": q_heads,
        "kv_heads": q_heads if kv_heads is None else kv_heads,
        "head_dim": config.hidden_size // q_heads if head_dim is None else head_dim,
    }
    for key, value in values.items():
        if type(value) is not int:
            raise ValueError(f"{key} is {value!r}, not one whole number")
    return values


def _rope(config: Any, kind: str) -> dict:
    """Rope base and scaling of one kind of layer; what is unset or neutral is left out."""
    given = getattr(config, "rope_parameters", None)  # 5.x; nested by kind in gemma3
    local_base = getattr(config, "rope_local_base_freq", None)  # gemma3 in 4.x
    if given:
        flat = {key: value for key, value in given.items() if not isinstance(value, dict)}
        given = given.get(kind) or flat
    elif local_base and kind == "sliding_attention":
        given = {"rope_theta": local_base}
    else:
        given = getattr(config, "rope_scaling", None) or {}  # 4.x
    rope = {key: getattr(config, key, None) for key in ("rope_theta", "partial_rotary_factor")}
    rope.update((key, value) for key, value in given.items() if value is not None)
    old_name = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or old_name or "default"

    longest = getattr(config, "max_position_embeddings", None)
    trained = getattr(config, "original_max_position_embeddings", None)
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = (
            trained or rope.get("original_max_position_embeddings") or longest
        )
    if rope["rope_type"] in ("yarn", "longrope", "dynamic") and "factor" not in rope:
        rope["factor_from"] = longest  # the factor is this over the trained length
    elif rope["rope_type"] == "dynamic":
        rope["factor_from"] = longest  # the base grows past this length
    if rope["partial_rotary_factor"] == 1:
        rope["partial_rotary_factor"] = None
    set_values = {key: value for key, value in rope.items() if value is not None}
    return json.loads(json.dumps(set_values), parse_int=float)  # 8 and 8.0 are one
