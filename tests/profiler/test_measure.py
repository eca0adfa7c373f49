"""Measurements against the same numbers computed plainly, row by row, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hfsparse.evictions.adore import Adore
from hfsparse.evictions.alisa import Alisa
from hfsparse.evictions.h2o import H2O
from hfsparse.evictions.snapkv import SnapKV
from hfsparse.lists import PAGE, Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.packed import Bits
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.plan.kept import Full
from hfsparse.profiler.measure import effects as measure
from hfsparse.profiler.measure import evicted, exact
from hfsparse.profiler.measure.capture import Seen
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.layer_plan import Logits
from hfsparse.selectors.quest import Quest
from hfsparse.selectors.reuse import Reuse

L, HQ, HKV, D, DV = 300, 6, 2, 16, 8
GROUP, SCALE = HQ // HKV, 0.25
KEYS = torch.tensor([70, 127, 128, 205, 299])  # in the middle, at the end and start of a page
CANDIDATES = measure.Candidates(
    {
        "stream": Streaming(4, 20),
        "blocks": BlockTopK(0.3, 2),
        "vs": VerticalSlash(30, 40),
        "every": BlockTopK(1.0, 2),
    },
    {"ring": Streaming(4, 20), "every": Streaming(0, L)},
    {"quest": Quest(0.4, 2), "every": Quest(1.0, 2)},
)
LOGITS = {
    "plain": Logits(SCALE, None, None),
    "softcap": Logits(SCALE, 3.0, None),
    "sink_logits": Logits(SCALE, None, torch.tensor([-2.0, 0.0, 1.0, 3.0, 5.0, 8.0])),
    "softcap_and_sink_logits": Logits(SCALE, 3.0, torch.linspace(-1.0, 4.0, HQ)),
}


def attention(seen: Seen, head: int, row: int, keep=None) -> tuple[torch.Tensor, float]:
    """One row of one head over the keys kept: its output, and the exact attention's mass kept.

    A sink logit is a key without a value that is always kept.
    """
    k = seen.k[0, head // GROUP, : row + 1].double()
    v = seen.v[0, head // GROUP, : row + 1].double()
    scores = k @ seen.q[0, head, row].double() * seen.logits.scale
    if seen.logits.softcap:
        scores = seen.logits.softcap * torch.tanh(scores / seen.logits.softcap)
    weight = scores.exp()
    bare = 0.0 if seen.logits.s_aux is None else seen.logits.s_aux[head].double().exp()
    some = weight if keep is None else weight * keep[: row + 1]
    return some @ v / (some.sum() + bare), float((some.sum() + bare) / (weight.sum() + bare))


def lost(seen: Seen, head: int, row: int, keep) -> float:
    """Gradient x change of the output, of one row of one head."""
    change = attention(seen, head, row, keep)[0] - attention(seen, head, row)[0]
    return float(seen.grad[0, head, row].double() @ change)


@pytest.fixture(scope="module", params=LOGITS)
def seen(request) -> Seen:
    torch.manual_seed(1)  # heads of a group differ in sign, for rings and for pages
    q, k, v = (torch.randn(1, h, L, d) for h, d in ((HQ, D), (HKV, D), (HKV, DV)))
    grad = torch.randn(1, HQ, L, DV)
    out, proj = torch.empty(1, HQ, L, DV), torch.randn(HQ, DV, 10)
    made = Seen(2 * q, k, v, out, grad, LOGITS[request.param], KEYS, 0, proj)
    for head in range(HQ):
        for row in range(L):
            made.out[0, head, row] = attention(made, head, row)[0]
    return made


@pytest.fixture(scope="module")
def found(seen) -> dict[str, np.ndarray]:
    return measure.measure_layer(seen, CANDIDATES)


def near(found, plain, rtol=1e-4):
    """Sums of signed terms: compared against the largest, since one may nearly cancel."""
    np.testing.assert_allclose(found, plain, rtol=rtol, atol=rtol * np.abs(plain).max())


def pattern_mask(seen: Seen, pattern) -> torch.Tensor:
    return pattern.lists(seen.q, seen.k, Grid.causal(1, L, 32), SCALE).mask()[0]


def test_key_rows_stand_for_themselves_and_the_others_for_all_the_rest():
    rows, weight = exact.sample_rows(L, KEYS)
    assert rows.tolist() == sorted(
        {*KEYS.tolist(), *np.linspace(0, L - 1, exact.SPREAD).astype(int)}
    )
    alone = torch.isin(rows, KEYS)
    assert (weight[alone] == 1).all()
    assert len(set(weight[~alone].tolist())) == 1
    assert float(weight.sum()) == pytest.approx(L)


def test_when_every_row_is_a_key_each_stands_for_itself():
    rows, weight = exact.sample_rows(20, torch.arange(20))
    assert rows.tolist() == list(range(20))
    assert weight.tolist() == [1.0] * 20


def test_exact_attention_of_a_group_is_that_of_its_heads_whose_sinks_take_their_share(seen):
    heads = slice(GROUP, 2 * GROUP)
    mass = exact.attend(seen.q[0, heads, KEYS], seen.k[0, 1], KEYS, seen.logits, heads)
    values = seen.v[0, 1].double()
    for i, head in enumerate(range(GROUP, 2 * GROUP)):
        assert torch.equal(mass[i], exact.attention(seen, KEYS, head))
        for r, row in enumerate(KEYS.tolist()):
            near((mass[i, r].double() @ values).numpy(), attention(seen, head, row)[0].numpy())


@pytest.mark.parametrize("selector", [Quest(refresh=4), Reuse(), Quest(means=True)], ids=str)
def test_what_another_step_or_layer_chose_and_means_are_refused(seen, selector):
    with pytest.raises(ValueError, match="without refresh and means"):
        measure.measure_layer(seen, measure.Candidates({}, {}, {"quest": selector}))


@pytest.mark.parametrize("name", CANDIDATES.patterns)
def test_a_pattern_is_the_plain_weighted_sum_over_sampled_rows(seen, found, name):
    pattern, at = CANDIDATES.patterns[name], list(CANDIDATES.patterns).index(name)
    mask = pattern_mask(seen, pattern)
    spread = sorted({*np.linspace(0, L - 1, exact.SPREAD).astype(int).tolist()} - {*KEYS.tolist()})
    weights = dict.fromkeys(KEYS.tolist(), 1.0) | {
        row: (L - len(KEYS)) / len(spread) for row in spread
    }
    effect, recall = np.zeros(HQ), np.zeros(HQ)
    for head in range(HQ):
        for row, weight in weights.items():
            effect[head] += weight * lost(seen, head, row, mask[head, row])
            recall[head] += attention(seen, head, row, mask[head, row])[1] / len(weights)
    if name == "every":
        np.testing.assert_allclose(found["pattern_effect"][at], 0, atol=2e-4)
        np.testing.assert_allclose(found["pattern_recall"][at], 1, rtol=1e-5)
    else:
        assert np.abs(effect).max() > 1  # there is something to get wrong
        near(found["pattern_effect"][at], np.abs(effect))
        near(found["pattern_recall"][at], recall, 1e-5)


def test_a_pattern_costs_the_pairs_and_blocks_of_its_mask(seen, found):
    causal = torch.ones(L, L).tril().bool()
    for at, pattern in enumerate(CANDIDATES.patterns.values()):
        mask = pattern_mask(seen, pattern)
        pairs = mask.sum((1, 2)) / causal.sum()
        np.testing.assert_allclose(found["pattern_pairs"][at], pairs, rtol=1e-6)
    for name in ("stream", "blocks", "every"):  # vs gathers columns outside of blocks
        at = list(CANDIDATES.patterns).index(name)
        tiles = torch.nn.functional.pad(pattern_mask(seen, CANDIDATES.patterns[name]), (0, 20) * 2)
        whole = torch.nn.functional.pad(causal, (0, 20) * 2)
        tiles, whole = (t.unflatten(-2, (10, 32)).unflatten(-1, (10, 32)) for t in (tiles, whole))
        blocks = tiles.any(4).any(2).sum((1, 2)) / whole.any(3).any(1).sum()
        np.testing.assert_allclose(found["pattern_blocks"][at], blocks, rtol=1e-6)


def test_a_ring_is_judged_by_its_groups_signed_sum_over_every_row(seen, found):
    at = torch.arange(L)
    effect = np.zeros(HKV)
    for head in range(HQ):
        for row in range(L):
            effect[head // GROUP] += lost(seen, head, row, (at < 4) | (row - at < 20))
    assert np.abs(effect).max() > 1
    near(found["ring_effect"][0], np.abs(effect))
    np.testing.assert_allclose(found["ring_effect"][1], 0, atol=2e-4)
    near(found["ring_recall"][0], found["pattern_recall"][0].reshape(HKV, GROUP).mean(1), 1e-6)
    np.testing.assert_allclose(found["ring_recall"][1], 1, rtol=1e-5)
    near(found["ring_pairs"][0], found["pattern_pairs"][0].reshape(HKV, GROUP).mean(1), 1e-6)
    near(found["ring_blocks"][0], found["pattern_blocks"][0].reshape(HKV, GROUP).mean(1), 1e-6)
    assert found["ring_pairs"][1].tolist() == found["ring_blocks"][1].tolist() == [1.0, 1.0]


def test_pages_are_those_that_a_decode_step_at_each_key_row_reads(seen, found):
    effect, recall, share = np.zeros(HKV), np.zeros(HKV), np.zeros(HKV)
    for row in KEYS.tolist():
        held = seen.k[:, :, : row + 1].split(PAGE, 2)
        low = torch.stack([page.amin(2) for page in held], 2)
        high = torch.stack([page.amax(2) for page in held], 2)
        query, length = seen.q[:, :, row : row + 1], torch.tensor([row + 1])
        lists = CANDIDATES.selectors["quest"].pages(
            query, {"low": low, "high": high}, length, SCALE
        )
        for group in range(HKV):
            keep = torch.zeros(L, dtype=torch.bool)
            for page in lists.pages[0, group, : lists.count[0, group]].tolist():
                keep[page * PAGE : (page + 1) * PAGE] = True
            share[group] += float(keep[: row + 1].double().mean()) / len(KEYS)
            for head in range(group * GROUP, (group + 1) * GROUP):
                effect[group] += lost(seen, head, row, keep)
                recall[group] += attention(seen, head, row, keep)[1] / GROUP / len(KEYS)
    assert share.max() < 0.9
    near(found["page_effect"][0], np.abs(effect))
    near(found["page_recall"][0], recall, 1e-5)
    np.testing.assert_allclose(found["page_effect"][1], 0, atol=2e-5)
    np.testing.assert_allclose(found["page_recall"][1], 1, rtol=1e-5)


EVICTIONS = {"few": SnapKV(40, 8, 1), "heavy": H2O(50, 6), "more": SnapKV(90, 8, 1)}
EVICTIONS |= {"lately": Alisa(50, 2), "now": Adore(10, 6), "every": H2O(L, 6)}


def test_an_eviction_leaves_the_best_of_a_prompt_that_ended_before_the_row_and_what_followed(
    seen, monkeypatch
):
    monkeypatch.setattr(evicted, "LATER", 20)
    monkeypatch.setattr(evicted, "EVERY", 8)
    found = measure.measure_layer(seen, measure.Candidates({}, {}, {}, evictions=EVICTIONS))
    ends = dict(zip(KEYS.tolist(), (48, 104, 104, 184, 272), strict=True))
    for i, eviction in enumerate(EVICTIONS.values()):
        effect, recall = np.zeros(HKV), np.zeros(HKV)
        for row, end in ends.items():
            q = seen.q[:, :, max(0, end - (eviction.watched or end)) : end]
            grid = Grid(torch.tensor([q.shape[2]]), torch.tensor([end]), q.shape[2], end)
            worth = eviction.scores(q, seen.k[:, :, :end], grid, **seen.logits.of())[0]
            left = min(eviction.size - (row + 1 - end), end)
            for group in range(HKV):
                keep = torch.arange(L) > row - min(eviction.size, row + 1 - end)
                keep[worth[group].topk(max(left, 0)).indices] = True
                for head in range(group * GROUP, (group + 1) * GROUP):
                    effect[group] += lost(seen, head, row, keep)
                    recall[group] += attention(seen, head, row, keep)[1] / GROUP / len(KEYS)
        np.testing.assert_allclose(found["evict_effect"][i], np.abs(effect), 1e-4, 2e-5)
        near(found["evict_recall"][i], recall, 1e-5)
    assert found["evict_recall"][0].max() < 0.9


def at_keys(seen: Seen, keep, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Harm and error at the key rows, by groups of q heads; keep [Hq, L, L]."""
    proj = seen.proj.double()
    harm, error = np.zeros((2, HQ // group))
    for row in KEYS.tolist():
        exact = torch.stack([attention(seen, h, row)[0] for h in range(HQ)])
        some = torch.stack([attention(seen, h, row, keep[h, row])[0] for h in range(HQ)])
        felt = ((some - exact) * seen.grad[0, :, row].double()).sum(1)
        harm += felt.view(-1, group).sum(1).abs().numpy()
        moved = torch.einsum("hd,hdo->ho", some - exact, proj).unflatten(0, (-1, group)).sum(1)
        whole = torch.einsum("hd,hdo->o", exact, proj)
        error += (moved.norm(dim=1) / whole.norm()).numpy() / len(KEYS)
    return harm, error


def test_harm_and_error_are_sums_of_lengths_over_the_key_rows(seen, found):
    at = torch.arange(L)
    ring = ((at < 4) | (at[:, None] - at < 20)).expand(HQ, L, L)
    read = measure.pages_read(CANDIDATES.selectors["quest"], seen.q, seen.k, KEYS, SCALE)
    pages = torch.ones(HQ, L, L)
    pages[:, KEYS] = read.float()
    vs = pattern_mask(seen, CANDIDATES.patterns["vs"])
    for kind, i, keep, group in (
        ("ring", 0, ring, GROUP),
        ("pattern", 2, vs, 1),
        ("page", 0, pages, GROUP),
    ):
        harm, error = at_keys(seen, keep, group)
        near(found[f"{kind}_harm"][i], harm)
        near(found[f"{kind}_error"][i], error)
    np.testing.assert_allclose(found["page_error"][1], 0, atol=1e-5)


def test_a_step_does_not_know_the_keys_after_it_on_its_own_page(seen):
    told = torch.tensor([70])
    later = seen.k.clone()
    later[:, :, 71:] = 100.0  # would win every vote, were it seen
    now = measure.pages_read(CANDIDATES.selectors["quest"], seen.q, seen.k, told, SCALE)
    then = measure.pages_read(CANDIDATES.selectors["quest"], seen.q, later, told, SCALE)
    assert torch.equal(now, then)


def test_what_is_found_has_one_row_a_candidate_and_one_column_a_head(found):
    shapes = {"pattern": (4, HQ), "ring": (2, HKV), "page": (2, HKV)}
    assert {name: array.shape for name, array in found.items()} == {
        f"{kind}_{name}": shapes[kind]
        for kind, names in {
            "pattern": ("effect", "harm", "error", "recall", "pairs", "blocks"),
            "ring": ("effect", "harm", "error", "recall", "pairs", "blocks"),
            "page": ("effect", "harm", "error", "recall"),
        }.items()
        for name in names
    }


def test_a_few_kv_heads_at_a_time_are_measured_alike(seen, found, monkeypatch):
    monkeypatch.setattr(measure, "AT_ONCE", GROUP * L)
    for name, array in measure.measure_layer(seen, CANDIDATES).items():
        near(array, found[name], 1e-5)


def test_half_precision_is_measured_in_single(seen):
    half = {name: getattr(seen, name).bfloat16() for name in ("q", "k", "v", "out", "grad")}
    up = {name: tensor.float() for name, tensor in half.items()}
    found, single = (
        measure.measure_layer(replace(seen, **tensors), CANDIDATES) for tensors in (half, up)
    )
    for name in ("pattern_effect", "pattern_recall", "page_effect", "page_recall"):
        near(found[name], single[name], 1e-3)


def read_from_a_store(seen: Seen, bits: Bits) -> dict[int, Seen]:
    """By key row, the layer with the keys and values that a step there reads from its store."""
    found = {}
    for row in KEYS.tolist():
        layer = CacheLayer("plan", (Group(tuple(range(HKV)), bits=bits),))
        k, v = (t[:, :, : row + 1] for t in (seen.k, seen.v))
        layer.lazy_initialization(k, v)
        (store,) = layer.stores
        store.append(k, v, Lengths([0], [row + 1], row + 1))
        k, v = store.read([row + 1])
        found[row] = replace(seen, k=k, v=v)
    return found


def test_what_fewer_bits_lose_is_what_steps_read_from_a_store(seen):
    ring = Streaming(4, 100)
    rings = {"ring": ring, "ring4": replace(ring, bits=4)}
    packed = {"int8": Full(8), "int4": Full(4), "fp8": Full("fp8")}
    few = measure.Candidates({"stream": Streaming(4, 20)}, rings, {}, packed=packed)
    found = measure.measure_layer(seen, few)
    for i, bits in enumerate((8, 4, "fp8")):
        stores, effect, left = read_from_a_store(seen, bits), np.zeros(HKV), np.zeros(HKV)
        in_ring = np.zeros(HKV)
        for head in range(HQ):
            for row in KEYS.tolist():
                grad, place = seen.grad[0, head, row].double(), torch.arange(L)
                near_by = (place < 4) | (row - place < 100)
                for total, keep in ((effect, None), (in_ring, near_by)):
                    change = attention(stores[row], head, row, keep)[0]
                    change -= attention(seen, head, row, keep)[0]
                    total[head // GROUP] += float((grad * change).sum())
                left[head // GROUP] += stays(seen, stores[row], head, row) / GROUP / len(KEYS)
        near(found["bits_effect"][i], np.abs(effect), 1e-3)
        near(found["bits_recall"][i], left)
        if bits == 4:
            near(found["ring_effect"][1], found["ring_effect"][0] + np.abs(in_ring), 1e-3)
    assert (found["bits_recall"][0] > found["bits_recall"][1:]).all()
    assert (found["bits_effect"][0] < found["bits_effect"][1]).all()


def stays(seen: Seen, other: Seen, head: int, row: int) -> float:
    """Of a row's attention, how much is on the same keys in both."""
    each = []
    for one in (seen, other):
        eye = torch.eye(row + 1)[None, None].expand(1, HKV, -1, -1)
        each.append(attention(replace(one, v=eye), head, row)[0])
    return float(1 - (each[0] - torch.minimum(*each)).sum())
