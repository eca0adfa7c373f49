"""The config values that change attention, spelled alike for every transformers version."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hfsparse.errors import ShapeError
from hfsparse.models.layers import (
    LATENT,
    LayerShape,
    layer_shapes,
    one_value,
    reading_config,
    shape,
)


def fingerprint(values: dict) -> str:
    """Hash of `attention_values`; weights are not in it."""
    text = json.dumps(values, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def attention_values(config: Any) -> dict:
    """Shape, layer kinds, window and rope of a text decoder's config; else a ShapeError."""
    with reading_config():
        return _attention_values(config)


def _attention_values(config: Any) -> dict:
    shapes = layer_shapes(config)
    sizes = shape(shapes)
    kinds = [each.kind for each in shapes]
    windows = {each.window for each in shapes if each.window is not None}
    if len(windows) > 1:
        raise ShapeError(f"its layers have windows of {sorted(windows)} tokens, not of one size")
    rotated = one_value(config, "no_rope_layers") or []  # 1 where a layer has rope
    return {
        **sizes,
        "kinds": kinds,
        "window": next(iter(windows), None),
        "rope": {kind: rope_of(config, kind) for kind in sorted(set(kinds))},
        "without_rope": [layer for layer, rope in enumerate(rotated) if not rope],
        **_other_heads(sizes, shapes),
        **_latents(config),
        **_producers(shapes),
    }


def _other_heads(sizes: dict[str, int], shapes: list[LayerShape]) -> dict[str, dict]:
    """The heads of windowed layers that have others than the layers that a plan may change."""
    names = ("q_heads", "kv_heads", "head_dim")
    given = {i: [getattr(each, name) for name in names] for i, each in enumerate(shapes)}
    usual = [sizes[name] for name in names]
    other = {str(i): own for i, own in given.items() if shapes[i].attends and own != usual}
    return {"other_heads": other} if other else {}


def _latents(config: Any) -> dict[str, dict]:
    """What keys and values are made of, where they are made of latents."""
    sizes = {name: one_value(config, name) for name in LATENT}
    return {"latents": sizes} if sizes["kv_lora_rank"] else {}


def _producers(shapes: list[LayerShape]) -> dict[str, dict]:
    """The layers that read another's keys, and whose."""
    read = {str(i): each.producer for i, each in enumerate(shapes) if each.producer is not None}
    return {"producers": read} if read else {}


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
