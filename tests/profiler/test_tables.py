"""Selectors that read a table: calibrated, measured, chosen and saved by the profiler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.models.layers import LayerShape
from hfsparse.patcher import figures
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.plan.files import DataFile
from hfsparse.plan.kept import Full
from hfsparse.profiler.measure import effects as measure
from hfsparse.profiler.measure.capture import Seen, capture
from hfsparse.profiler.methods import balanced
from hfsparse.profiler.methods import one_pass as search
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.profiler.solve.allocation import Budget, Options, allocate
from hfsparse.profiler.verify.give_back import make_full
from hfsparse.runtime.layer_plan import Logits
from hfsparse.selectors import SELECTORS
from hfsparse.selectors.centroids import Centroids
from hfsparse.selectors.channels import Channels
from hfsparse.selectors.lowrank import LowRank
from hfsparse.selectors.quest import Quest
from tests import tiny
from tests.patterns.matrix import oracle_pages, weights

L, HQ, HKV, D, SCALE = 300, 6, 2, 8, 0.25
KEYS = torch.tensor([0, 63, 64, 70, 205, 299])
TABLE = weights(3, HKV, D)
MOMENTS = ("keys", "queries")
SETTINGS = dict(
    lengths=(512,),
    samples=2,
    verify=False,
    prefill_density=1.0,
    cache_share=1.0,
    decode_share=0.7,
)
CHANNELS = SETTINGS | {"selector": "channels"}
LENGTHS = SETTINGS | {"lengths": (384, 512)}  # tables are of the longest alone


def seen(layer: int = 2) -> Seen:
    made = torch.Generator().manual_seed(1)
    q, k, v, out = (torch.randn(1, h, L, D, generator=made) for h in (HQ, HKV, HKV, HQ))
    grad = torch.randn(1, HQ, L, D, generator=made)
    return Seen(2 * q, k, v, out, grad, Logits(SCALE, None, None), KEYS, layer)


@pytest.mark.parametrize(
    "setting",
    [Channels(0.4, 2, channels=2), Centroids(0.6, 2, unit=8, clusters=32, segment=256)],
    ids=["its_part_of_a_table", "segments_in_front_of_it"],
)
def test_a_step_at_each_row_reads_what_its_selector_would(setting):
    it = seen()
    data = {"channels": DataFile.of("it.safetensors", TABLE)}
    bound = measure.bind_selector(setting, it.layer, it.heads, data)
    read = measure.pages_read(bound, it.q, it.k, KEYS, SCALE)
    mine, group = {"weight": TABLE["weight"][2:]}, HQ // HKV
    for head, (i, row) in ((h, pair) for h in range(HQ) for pair in enumerate(KEYS.tolist())):
        kv, n = head // group, row + 1
        own = it.q[0, kv * group : (kv + 1) * group, row:n]
        allowed = oracle_pages(setting, own, it.k[0, kv, :n], SCALE, mine, kv)
        surely, perhaps = (np.repeat(units, setting.unit)[:n] for units in allowed)
        kept = read[head, i].numpy()
        assert not kept[n:].any()
        assert (surely <= kept[:n]).all()
        assert (kept[:n] <= perhaps).all()
        assert surely.sum() > 0.9 * perhaps.sum()


def test_a_step_does_not_know_the_keys_after_it_on_its_own_page():
    it, row = seen(), torch.tensor([70])
    data = {"channels": DataFile.of("it.safetensors", TABLE)}
    bound = measure.bind_selector(Channels(0.4, 2, channels=2), 0, it.heads, data)
    later = it.k.clone()
    later[:, :, 71:] = 100.0
    now, then = (measure.pages_read(bound, it.q, k, row, SCALE) for k in (it.k, later))
    assert torch.equal(now, then)


def test_a_few_kv_heads_at_a_time_are_bound_to_their_own_part(monkeypatch):
    candidates = measure.Candidates(
        {},
        {},
        {"a": Channels(0.4, 2, channels=2)},
        {"channels": DataFile.of("x.safetensors", TABLE)},
    )
    whole = measure.measure_layer(seen(), candidates)
    monkeypatch.setattr(measure, "AT_ONCE", HQ // HKV * L)
    for name, array in measure.measure_layer(seen(), candidates).items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-4, atol=1e-6)


def test_what_is_not_bound_is_never_measured():
    unbound = measure.Candidates({}, {}, {"a": Channels(0.4, 2)})
    with pytest.raises(UsageError, match="without its data channels: calibrate it"):
        measure.measure_layer(seen(), unbound)
    it = seen()
    with pytest.raises(ValueError, match="bound to no table"):
        measure.pages_read(Channels(0.4, 2), it.q, it.k, KEYS, SCALE)


@pytest.fixture(scope="module")
def model():
    return tiny.llama(window=1024)


@pytest.mark.parametrize("settings", [LENGTHS, CHANNELS], ids=["default", "channels"])
def test_a_profile_calibrates_measures_chooses_and_writes(model, tmp_path, settings):
    out, each = tmp_path / "my plan.yaml", []
    selector = SELECTORS[settings.get("selector", "lowrank")]()
    plan = hfsparse.profile(model, tiny.tokenizer(), out=out, **settings)
    words = {word for layer in plan.layers for word in layer.decode}
    assert f"{selector.kind}25" in words, "labels were not chosen: give another budget"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "my plan.yaml",
        f"my_plan.{selector.kind}.safetensors",
    ]
    loaded = Plan.load(out)
    assert (loaded, loaded.hash()) == (plan, plan.hash())

    def look(it):
        each.append((it.layer, selector.calibrate(it)))
        return {"none": np.zeros(1)}

    prompts = make_prompts(tiny.tokenizer(), 512, 2, 0)
    for prompt in prompts:
        capture(model, prompt.ids, search.short_sighted_plan(model, balanced.candidates(512)), look)
    for name, table in loaded.table_of(selector).items():
        for layer in (0, 1):
            mine = torch.stack([found[name] for at, found in each if at == layer])
            assert len(mine) == 2
            torch.testing.assert_close(table[layer], mine.mean(0))
    with hfsparse.patch(model, out) as handle, torch.no_grad():
        cache = model(prompts[0].ids[:, :-1]).past_key_values
        model(prompts[0].ids[:, -1:], past_key_values=cache)
        stats = handle.stats()
    for name in ("cache_share", "decode_share"):
        assert getattr(stats, name) == pytest.approx(plan.expected[512][name], rel=0.01)


def test_a_killed_run_goes_on_and_ends_in_the_same_plan(model, tmp_path, monkeypatch):
    whole = hfsparse.profile(model, tiny.tokenizer(), **CHANNELS)
    out, looked, look = tmp_path / "plan.yaml", [], search.stack_layers

    def killed(*args):
        looked.append(1)
        if len(looked) == 2:
            raise KeyboardInterrupt
        return look(*args)

    monkeypatch.setattr(search, "stack_layers", killed)
    with pytest.raises(KeyboardInterrupt):
        hfsparse.profile(model, tiny.tokenizer(), out=out, **CHANNELS)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml.parts"]
    resumed = hfsparse.profile(model, tiny.tokenizer(), out=out, **CHANNELS)
    assert len(looked) == 2 + 3  # the first of two tables was not made twice
    assert resumed.hash() == whole.hash() == Plan.load(out).hash()


def wide(head_dim: int, value_dim: int | None = None) -> LayerShape:
    return LayerShape("full_attention", 4, 2, head_dim, value_dim or head_dim)


def test_what_one_head_keeps_is_priced_with_its_index():
    data = {"channels": DataFile.of("x.safetensors", weights(1, 2, 16))}
    for count, value in ((2, 16), (4, 16), (4, 24)):
        full = (16 + value) * 2  # bytes of a token's key and value; of a label and its scale below
        shape, channels = wide(16, value), Channels(0.1, 4, bits=8, channels=count)
        kept, read = figures.one_head(6400, channels, shape, data)
        assert kept == pytest.approx((full + count + 2) / full)
        assert read == pytest.approx(0.1)
    assert figures.one_head(6400, Quest(0.1, 4), wide(16)) == figures.one_head(6400, Quest(0.1, 4))


def test_fewer_bits_are_priced_by_the_bytes_that_are_held():
    """Of 64 channels and as many values a token: their bits, bounds by page, ends by token; the
    newest two pages of 100 as they came."""
    for bits, width in ((8, 8), ("fp8", 8), (4, 4)):
        kept, _ = figures.one_head(6400, None, wide(64), full=Full(bits))
        assert kept == pytest.approx((128 * width / 8 + 2 * 128 / 64 + 4) / 256 + 0.02)
    quest = figures.one_head(6400, Quest(0.1, 4), wide(64), full=Full("fp8"))[0]
    assert quest == pytest.approx(figures.one_head(6400, None, wide(64), full=Full("fp8"))[0])


def test_a_step_reads_its_index_too_and_that_counts_in_the_budget_of_decode():
    """Of keys of 16 channels in two bytes, a token has 64 bytes: so dense attention reads 64."""
    data = {
        "lowrank": DataFile.of("x.safetensors", {n: torch.eye(16)[None, None] for n in MOMENTS})
    }
    offered = {"pages": Quest(0.1, 4), "labels": LowRank(0.1, 4, rank=8)}
    names = measure.Candidates({}, {}, offered, data)
    costs = search.price_candidates(names, 6400, wide(16))
    bounds, labels = 1 / 64, (8 * 4 / 8 + 2) / 64
    assert costs["page_read"] == pytest.approx([0.1 + bounds, 0.1 + labels])
    assert costs["page_kept"] == pytest.approx([1 + bounds, 1 + labels])
    options = Options(
        prefill=np.full((1, 1, 1), "pattern", dtype=object),
        prefill_effect=np.zeros((1, 1, 1)),
        prefill_cost=np.ones((1, 1, 1)),
        rings=[],
        ring_effect=np.zeros((1, 0, 1)),
        ring_cost=np.zeros((1, 0, 1)),
        selectors=list(offered),
        page_effect=np.array([[[0.2], [0.1]]]),  # as many keys, better ones
        **costs,
    )
    for budget, taken in ((0.1 + labels + 1e-6, "labels"), (0.1 + labels - 1e-3, "pages")):
        (layer,) = allocate(options, Budget(1, 1, budget))
        assert layer.decode == (taken,)


def test_a_table_goes_with_the_last_head_that_reads_it():
    plan = Plan(
        ModelId("Some", 1, 1, 1, 16, "some"),
        {"labels": LowRank(rank=8)},
        (Layer(("full",), ("full",), ("labels",)),),
        data={"lowrank": DataFile.of("x.safetensors", {"keys": torch.eye(16)[None, None]})},
    )
    assert make_full(plan, []).data == plan.data
    assert make_full(plan, [(0, 0)]).data == {}
