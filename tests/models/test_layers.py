"""What each layer's attention is, from configs whose layers differ."""

from __future__ import annotations

import pytest
import transformers

import hfsparse
from hfsparse.errors import ShapeError
from hfsparse.models.layers import LINEAR, STATELESS, layer_shapes, shape
from hfsparse.patcher.figures import predict
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Layer, ModelId, Plan, PlanError
from hfsparse.plan.template import template
from tests.patcher.families import SIZES, VS
from tests.support.models import GLOBAL, STATES, WINDOWED, tiny

HEADS = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
FULL, NEAR = (4, 2, 16, 16, None), (4, 2, 16, 16, 40)
CASES = {  # class of the config, values, what each layer is
    "llama": ("LlamaConfig", {}, [FULL] * 3),
    "qwen2, its window off": ("Qwen2Config", dict(sliding_window=40), [FULL] * 3),
    "gemma3": ("Gemma3TextConfig", WINDOWED, [NEAR, FULL, FULL]),
    "gemma4": ("Gemma4TextConfig", GLOBAL, [NEAR, (4, 1, 32, 32, None), (4, 1, 32, 32, None)]),
    "mimo": (
        "MiMoV2FlashConfig",
        dict(sliding_window=40, v_head_dim=8, layer_types=WINDOWED["layer_types"]),
        [(4, 4, 16, 8, 40), (4, 2, 16, 8, None), (4, 2, 16, 8, None)],
    ),
    "laguna": (
        "LagunaConfig",
        dict(WINDOWED, num_attention_heads_per_layer=[6, 4, 4]),
        [(6, 2, 16, 16, 40), FULL, FULL],
    ),
    "nemotron_h": ("NemotronHConfig", STATES, [FULL] * 4),
}


def config_of(name: str):
    kind, values, want = CASES[name]
    if (known := getattr(transformers, kind, None)) is None:
        pytest.skip(f"no {kind} in this version")
    return known(**{**HEADS, **values}), want


@pytest.mark.parametrize("name", CASES)
def test_every_layer_has_its_own_shape(name):
    config, want = config_of(name)
    found = layer_shapes(config)
    assert [(s.q_heads, s.kv_heads, s.head_dim, s.value_dim, s.window) for s in found] == want
    free = [each for each, s in zip(want, found, strict=True) if s.free]
    assert {tuple(shape(found).values())} == {(len(want), *own[:3]) for own in free}


def test_layers_that_a_plan_may_change_have_one_shape():
    values = {"per_layer_config": {1: {"num_key_value_heads": 4}}}
    config = transformers.LlamaConfig(**HEADS, **values)
    if not getattr(config, "is_heterogeneous", False):
        pytest.skip("no layers of their own in this version")
    with pytest.raises(ShapeError, match="kv_heads is 2 in layer 0 and 4 in layer 1"):
        shape(layer_shapes(config))


def test_windowed_layers_with_other_heads_mark_the_fingerprint():
    first, second = (
        transformers.LagunaConfig(**{**HEADS, **WINDOWED, "num_attention_heads_per_layer": heads})
        for heads in ([6, 4, 4], [8, 4, 4])
    )
    assert ModelId.of(first) != ModelId.of(second)
    assert shape(layer_shapes(first)) == shape(layer_shapes(second))


def test_kinds_without_attention_are_not_free():
    model = tiny("nemotron_h")
    for each in layer_shapes(model):
        assert each.free == (each.kind not in (*LINEAR, *STATELESS))


def test_a_plan_has_no_words_for_a_windowed_layer_with_other_heads():
    model = tiny("gemma4")
    plan = Plan.full(ModelId.of(model))
    own = Layer(("vs",) * 4, ("full",), ("full",))
    plan.patterns["vs"] = PATTERNS[VS[0]](**VS[1])
    plan.layers = (own, *plan.layers[1:])
    with pytest.raises(PlanError, match="layer 0 has a window of its own, and 4 q and 2 kv heads"):
        hfsparse.patch(model, plan)
    assert "other heads, and a window of 40 tokens: all stays full" in template(model.config)


def test_forecasts_count_each_layer_at_its_own_size():
    model = tiny("gemma4")
    stats = predict(model.config, Plan.full(ModelId.of(model)), tokens=100)
    assert [len(layer.kv_bytes) for layer in stats.layers] == [2, 1, 1]
    token = [2 * 2 * 16 * 4, 1 * 2 * 32 * 4, 1 * 2 * 32 * 4]  # bytes, keys and values in float32
    want = [size * n for size, n in zip(token, (40, 100, 100), strict=True)]
    assert [sum(layer.cache.dense) for layer in stats.layers] == want
