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
