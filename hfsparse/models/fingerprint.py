"""The config values that change attention, spelled alike for every transformers version."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hfsparse.errors import ShapeError

LINEAR = ("linear_attention", "conv")  # kinds of layers that keep a state, and no key per token
UNITS = {
    "layers": "layers",
    "q_heads": "q heads",
    "kv_heads": "kv heads",
    "head_dim": "dims a head",
}
OLD_NAMES = {"mamba": "linear_attention", "attention": "full_attention"}  # before 5.24


def text_config(model_or_config: Any) -> Any:
    """The config of a model's text decoder; ShapeError for what has none."""
    config = getattr(model_or_config, "config", model_or_config)
    try:
        return config.get_text_config(decoder=True)
    except Exception as error:  # a config is any code: of two decoders transformers knows no one
        raise ShapeError(str(error)) from error


def by_layer(config: Any, name: str) -> list[Any]:
    """A config's value for each layer, None where unset; one item where no layer has its own."""
    own = getattr(config, "is_heterogeneous", False)  # from 5.24 on
    return [getattr(each, name, None) for each in (config.per_layer_config if own else [config])]


def one_value(config: Any, name: str, default: Any = None) -> Any:
    """A config's value for all layers, `default` where unset; ShapeError where layers differ."""
    first, *others = by_layer(config, name)
    for index, other in enumerate(others, 1):
        if other != first:
            raise ShapeError(f"{name} is {first} in layer 0 and {other} in layer {index}")
    return default if first is None else first


def fingerprint(config: Any) -> str:
    """Hash of `attention_values`; weights are not in it."""
    text = json.dumps(attention_values(config), sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def attention_values(config: Any) -> dict:
    """Shape, layer kinds, window and rope of a text decoder's config; else a ShapeError."""
    try:
        return _attention_values(config)
    except ShapeError:
        raise
    except Exception as error:  # a config is any code, and a hand-written one holds anything
        raise ShapeError(str(error)) from error


def _attention_values(config: Any) -> dict:
    sizes = shape(config)
    windowed = one_value(config, "use_sliding_window", True)  # qwen: a window may be set but off
    window = one_value(config, "sliding_window") if windowed else None
    every = "sliding_attention" if window else "full_attention"
    kinds = one_value(config, "layer_types") or [every] * sizes["layers"]
    kinds = [OLD_NAMES.get(kind, kind) for kind in kinds]
    rotated = one_value(config, "no_rope_layers") or []  # 1 where a layer has rope
    return {
        **sizes,
        "kinds": kinds,
        "window": window if "sliding_attention" in kinds else None,
        "rope": {kind: rope_of(config, kind) for kind in sorted(set(kinds))},
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
    return attention_values(text_config(model_or_config))


def shape(config: Any) -> dict[str, Any]:
    """Layers, heads and head dim; ShapeError for a config that has no single number of them."""
    names = "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"
    layers, q_heads, kv_heads, head_dim = (one_value(config, name) for name in names)
    hidden = one_value(config, "hidden_size")
    if head_dim is None and type(q_heads) is type(hidden) is int:
        head_dim = hidden // q_heads
    values = {
        "layers": layers,
        "q_heads": q_heads,
        "kv_heads": q_heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
    }
    for key, value in values.items():
        if value is None:
            raise ShapeError(f"{type(config).__name__} has no number of {UNITS[key]}")
        if type(value) is not int:
            raise ShapeError(f"{key} is {value!r}, not one whole number")
    return values


def rope_of(config: Any, kind: str) -> dict:
    """Rope base and scaling of one kind of layer; what is unset or neutral is left out."""
    given = one_value(config, "rope_parameters")  # 5.x; nested by kind in gemma3
    local_base = one_value(config, "rope_local_base_freq")  # gemma3 in 4.x
    if given:
        flat = {key: value for key, value in given.items() if not isinstance(value, dict)}
        given = given.get(kind) or flat
    elif local_base and kind == "sliding_attention":
        given = {"rope_theta": local_base}
    else:
        given = one_value(config, "rope_scaling") or {}  # 4.x
    rope = {key: one_value(config, key) for key in ("rope_theta", "partial_rotary_factor")}
    rope.update((key, value) for key, value in given.items() if value is not None)
    old_name = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or old_name or "default"

    longest = one_value(config, "max_position_embeddings")
    trained = one_value(config, "original_max_position_embeddings")
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
