"""What patterns keep of small prompts, worked out by plain loops over their papers' definitions."""

from dataclasses import replace
from math import exp

import pytest
import torch

from hfsparse.lists import Grid
from hfsparse.patterns.hip import HiP
from hfsparse.patterns.sample import Sample
from hfsparse.patterns.strided import Strided
from tests.helpers import batch

TOKENS, BLOCK = 200, 16


def drawn(seed: int):
    """One head's q and k, as lists of rows, and how a pattern's lists of them are made."""
    it = batch(TOKENS, group=1, kv_heads=1, block=BLOCK, seed=seed)
    one = replace(it, q=it.q[:1], k=it.k[:1], grid=Grid.causal(1, TOKENS, BLOCK))
    return one.q[0, 0], one.k[0, 0], lambda p: p.lists(one.q, one.k, one.grid, one.scale)


def blocks_of(pattern, grid: Grid) -> list[list[int]]:
    """The key blocks of each query block of one head, positions alone deciding."""
    kept = pattern.placed(grid, 1).kept_blocks()[0, 0]
    return [row.nonzero().flatten().tolist() for row in kept]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("alpha", "stride", "max_share"), [(0.5, 20, 1.0), (0.9, 7, 0.25)])
def test_sample_keeps_the_fewest_columns_that_hold_alpha_of_sampled_attention(
    seed, alpha, stride, max_share
):
    q, k, lists = drawn(seed)
    mass, sampled = [0.0] * TOKENS, 0
    for i in range(TOKENS - 1, -1, -stride):
        weights = [exp(float(q[i] @ k[j]) / 4) for j in range(i + 1)]
        for j, weight in enumerate(weights):
            mass[j] += weight / sum(weights)
        sampled += 1
    kept, held = [], 0.0
    for j in sorted(range(TOKENS), key=lambda j: -mass[j]):
        if held < alpha * sampled and len(kept) < max_share * TOKENS:
            kept.append(j)
            held += mass[j]
    found = lists(Sample(alpha, stride, 0.1, max_share))
    assert found.columns[found.columns < TOKENS].tolist() == sorted(kept)
    assert found.cut.item() == (-(-TOKENS // BLOCK) if held < alpha * sampled else 0)
    for i in range(0, TOKENS, BLOCK):  # a window of 20 tokens, as whole blocks
        near = {j // BLOCK for j in range(max(i - 19, 0), min(i + BLOCK, TOKENS))}
        rows = found.kept_blocks()[0, 0, i // BLOCK].nonzero().flatten().tolist()
        assert rows == sorted({0} | near)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hip_ranks_a_block_by_the_key_that_halving_leaves(seed):
    q, k, lists = drawn(seed)
    found = lists(HiP(share=0.3, sink=20, recent=30)).kept_blocks()[0, 0]
    for i in range(0, TOKENS, BLOCK):
        asked = range(i, min(i + BLOCK, TOKENS), 4)

        def best(j, asked=asked):
            return max(float(q[i] @ k[j]) for i in asked)

        always = {j // BLOCK for j in range(min(20, i + BLOCK))}
        always |= {j // BLOCK for j in range(max(i - 29, 0), min(i + BLOCK, TOKENS))}
        scores = {}
        for block in {*range(i // BLOCK)} - always:
            low, high = block * BLOCK, (block + 1) * BLOCK
            while high - low > 1:
                middle = (low + high) // 2
                if best((middle + high) // 2) > best((low + middle) // 2):
                    low = middle
                else:
                    high = middle
            scores[block] = best(low)
        few = sorted(scores, key=lambda b: -scores[b])[: -(-3 * len(scores) // 10)]
        assert found[i // BLOCK].nonzero().flatten().tolist() == sorted(always | {*few})


def test_halving_finds_a_key_whose_neighbours_match_and_misses_one_that_stands_alone():
    q, k = torch.zeros(2, 1, 1, 8 * BLOCK, 4)
    q[..., 0] = k[..., 1] = 1.0
    k[0, 0, 3 * BLOCK : 3 * BLOCK + BLOCK // 2, 0] = 1.0  # the left half of block 3
    k[0, 0, 5 * BLOCK + 13, 0] = 9.0  # no middle of its half is like it
    grid = Grid.causal(1, 8 * BLOCK, BLOCK)
    kept = HiP(share=0.1, sink=0, recent=1).lists(q, k, grid, 1.0).kept_blocks()[0, 0]
    assert kept[7].nonzero().flatten().tolist() == [0, 3, 7]


def test_strides_a_window_and_the_first_blocks():
    grid = Grid.causal(1, 10 * BLOCK, BLOCK)
    found = blocks_of(Strided(sink=17, recent=BLOCK + 1, stride=4, shift=2), grid)
    assert found[:3] == [[0], [0, 1], [0, 1, 2]]
    assert found[8] == [0, 1, 2, 6, 7, 8]  # 0 and 1: the sink; 2 and 6; 7 and 8: the window
    assert found[9] == [0, 1, 3, 7, 8, 9]
    found = blocks_of(Strided(sink=0, recent=1, stride=4), grid)
    assert found[9] == [0, 1, 5, 9]


def test_heads_of_other_shifts_share_the_row():
    grid, each = Grid.causal(1, 12 * BLOCK, BLOCK), []
    for shift in range(3):
        each.append(blocks_of(Strided(sink=0, recent=1, stride=3, shift=shift), grid)[11])
    assert sorted(j for row in each for j in row if j not in (0, 11)) == [*range(1, 11)]


def test_random_blocks_are_so_many_others_and_drawn_from_the_whole_past():
    grid = Grid.causal(1, 200 * BLOCK, BLOCK)
    plain, first, second = (
        blocks_of(Strided(sink=0, recent=1, stride=0, random=n, seed=s), grid)
        for n, s in ((0, 0), (5, 0), (5, 1))
    )
    for i in range(200):
        assert len(first[i]) == min(len(plain[i]) + 5, i + 1)
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 180
    far = [j / i for i, row in enumerate(first) if i > 20 for j in row if 0 < j < i]
    assert 0.45 < sum(far) / len(far) < 0.55
    assert sum(x < 0.1 for x in far) > 0.06 * len(far)


@pytest.mark.parametrize("past", [3 * BLOCK, 3 * BLOCK + 5])
def test_chunks_room_and_neighbours_change_no_strided_block(past):
    """Behind a past that is no multiple of a block more may be read, and never less."""
    pattern = Strided(sink=8, recent=40, stride=5, random=2, seed=3)
    whole = pattern.placed(Grid.causal(1, TOKENS, BLOCK), 1).mask()[0, 0]
    new, total = torch.tensor([TOKENS - past, 20]), torch.tensor([TOKENS, 30])
    grid = Grid(new, total, TOKENS - past, TOKENS + 7 * BLOCK, BLOCK)
    chunk = pattern.placed(grid, 1).mask()[0, 0, :, :TOKENS]
    assert not (whole[past:] & ~chunk).any()
    assert torch.equal(whole[past:], chunk) or past % BLOCK


"""Blocks that patterns keep of a few drawn vectors, against loops written from their papers.

Each loop sees one head, q and k `[S, D]` as lists, and answers the sets of key blocks that
the query blocks keep. What the project keeps in any case, the row's first block and the own one, is
added at the end, or counts first where a budget says so.
"""

from math import exp, hypot, log, sqrt

import torch

from hfsparse.lists import Grid
from hfsparse.patterns.energy import Energy
from hfsparse.patterns.flexprefill import FlexPrefill
from hfsparse.patterns.sparge import Sparge

BLOCK, BLOCKS, DIM = 4, 8, 6


def drawn(seed: int, spread: float = 1.0):
    """q `[1, 2, S, D]` and k `[1, 1, S, D]`: tokens around a centre of their block's own."""
    made = torch.Generator().manual_seed(seed)
    centres = (torch.randn(3, BLOCKS, 1, DIM, generator=made) * 1.5).expand(-1, -1, BLOCK, -1)
    x = centres + spread * torch.randn(3, BLOCKS, BLOCK, DIM, generator=made)
    return x[None, :2].flatten(2, 3), x[None, 2:].flatten(2, 3)


def kept(pattern, q, k) -> list[list[set[int]]]:
    """Blocks kept, by head and query block."""
    grid = Grid.causal(1, q.shape[2], BLOCK)
    maps = pattern.lists(q, k, grid, DIM**-0.5).kept_blocks()[0]
    return [[set(row.nonzero().flatten().tolist()) for row in head] for head in maps]


def defined(loop, q, k) -> list[list[set[int]]]:
    """What a loop says of each head."""
    return [loop(head.double().tolist(), k[0, 0].double().tolist()) for head in q[0]]


def mean(vectors) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def block(x, i: int):
    return x[i * BLOCK : (i + 1) * BLOCK]


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def logit(q, k) -> float:
    return dot(q, k) / sqrt(DIM)


def softmax(logits: list[float]) -> list[float]:
    total = sum(exp(x) for x in logits)
    return [exp(x) / total for x in logits]


def heaviest(mass: dict, share: float) -> list:
    """The fewest keys whose masses sum up to a share of 1."""
    found, held = [], 0.0
    for key in sorted(mass, key=lambda key: -mass[key]):
        if held >= share:
            break
        found.append(key)
        held += mass[key]
    return found


def test_energy():
    alpha, sinks, recent = 0.2, 1, 2

    def loop(q, k):
        sets = []
        for i in range(BLOCKS):
            energy = {}
            for j in range(i + 1):
                pooled = mean(block(k, j))
                rows = [r for r in range(i * BLOCK, i * BLOCK + BLOCK) if r >= j * BLOCK]
                energy[j] = sum(exp(logit(q[r], pooled)) for r in rows)
            best = {j for j in energy if energy[j] >= alpha * max(energy.values())}
            always = {j for j in energy if j < sinks or j > i - recent}
            sets.append(best | always | {0, i})
        return sets

    q, k = drawn(0)
    pattern = Energy(alpha, sinks, recent, max_share=1.0)
    assert kept(pattern, q, k) == defined(loop, q, k)
    assert kept(Energy(alpha, sinks, recent, 2, 1.0), q, k)[0][-2:] == [{*range(7)}, {*range(8)}]


def sparge_loop(theta: float, tau: float | None, share: float):
    def alike(x) -> bool:
        cosines = [dot(a, b) / hypot(*a) / hypot(*b) for a in x for b in x]
        return sum(cosines) / len(cosines) > theta

    def loop(q, k):
        centre = mean(k)
        smooth = [[a - b for a, b in zip(key, centre, strict=True)] for key in k]
        good = [j for j in range(BLOCKS) if alike(block(smooth, j))]
        sets = []
        for i in range(BLOCKS):
            seen = set(range(i + 1))
            ranked = [j for j in good if j <= i]
            if not alike(block(q, i)) or not ranked:
                sets.append(seen)
                continue
            mass = softmax([logit(mean(block(q, i)), mean(block(k, j))) for j in ranked])
            mass = dict(zip(ranked, mass, strict=True))
            own = [j for j in (0, i) if j in mass]
            held = sum(mass.pop(j) for j in {*own})
            best = {*own}
            for j in sorted(mass, key=lambda j: -mass[j]):
                enough = tau is not None and held >= tau
                if enough or len(best) >= -(-share * (i + 1) // 1):
                    break
                best.add(j)
                held += mass[j]
            sets.append(best | (seen - {*good}) | {0, i})
        return sets

    return loop


def test_sparge():
    q, k = drawn(1, spread=0.8)
    for theta, tau, share in ((0.6, 0.7, 1.0), (0.55, None, 0.5), (-0.1, 0.9, 1.0)):
        pattern = Sparge(theta, 1.0 if tau is None else tau, share)
        found = kept(pattern, q, k)
        assert found == defined(sparge_loop(theta, tau, share), q, k)
        assert any(len(row) < i + 1 for head in found for i, row in enumerate(head))
        whole = [len(row) == i + 1 for head in found for i, row in enumerate(head) if i > 3]
        assert any(whole) == (theta > 0)  # there are queries that are not alike


def test_flexprefill():
    gamma, tau, least = 0.7, 0.335, 1

    def divergence(p, q) -> float:
        both = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        far = [x * log(x / m) for side in (p, q) for x, m in zip(side, both, strict=True)]
        return sqrt(sum(far) / 2)

    def loop(q, k):
        S = len(q)
        by_key, by_distance = dict.fromkeys(range(S), 0.0), dict.fromkeys(range(S), 0.0)
        for r in range(S):  # all of them: there are fewer than 128
            for j, p in enumerate(softmax([logit(q[r], k[j]) for j in range(r + 1)])):
                by_key[j] += p / S
                by_distance[r - j] += p / S
        keys, queries = ([mean(block(x, i)) for i in range(BLOCKS)] for x in (k, q))
        guess = softmax([logit(mean(q), key) for key in keys])
        true = [sum(by_key[j * BLOCK + n] for n in range(BLOCK)) for j in range(BLOCKS)]
        aware.append(divergence(true, guess) < tau)
        chosen = []
        for mass in (by_key, by_distance):
            count = least if aware[-1] else max(len(heaviest(mass, gamma)) // BLOCK + 1, least)
            pooled = [sum(mass[j * BLOCK + n] for n in range(BLOCK)) for j in range(BLOCKS)]
            order = sorted(range(1, BLOCKS), key=lambda j: -pooled[j])
            chosen.append({0, *order[: count - 1]})
        verticals, slashes = chosen
        sets = [
            {j for j in range(i + 1) if j in verticals or i - j in slashes} | {0, i}
            for i in range(BLOCKS)
        ]
        if aware[-1]:
            mass = {}
            for i in range(BLOCKS):
                row = softmax([logit(queries[i], keys[j]) for j in range(i + 1)])
                mass |= {(i, j): p / BLOCKS for j, p in enumerate(row)}
            for i, j in heaviest(mass, gamma):
                sets[i].add(j)
        return sets

    aware: list[bool] = []
    for seed in range(4):
        q, k = drawn(seed)
        pattern = FlexPrefill(gamma, tau, least * BLOCK, max_share=1.0)
        assert kept(pattern, q, k) == defined(loop, q, k)
    assert 0 < sum(aware) < len(aware), "heads of both sorts"
