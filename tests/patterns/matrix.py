"""One row a pattern and a selector: settings worth testing, and the plain mask a pattern means.

To add a pattern's row, write its oracle and put `@row(kind, settings, everything=…)` on it.

An oracle sees one row and one head, without padding: q `[Q, D]`, k `[S, D]`, queries at positions
`S - Q ..`. It answers two boolean `[Q, S]` masks in double precision, written from the definition:
the pairs that must be kept and those that may be. They differ only where scores tie to 1e-5, which
float32 can't tell apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from hfsparse.lists import PAGE, BlockLists
from hfsparse.patterns import PATTERNS
from hfsparse.selectors.centroids import Centroids
from hfsparse.selectors.channels import Channels
from hfsparse.selectors.landmarks import Landmarks
from hfsparse.selectors.lowrank import LowRank
from hfsparse.selectors.lsh import Lsh, drawn_planes
from hfsparse.selectors.quest import Quest
from tests.helpers import Batch

Masks = tuple[np.ndarray, np.ndarray]


def best(scores: np.ndarray, count: int, forced, slack: float = 1e-5) -> Masks:
    """The places `forced`, then the highest scores until `count` are kept: surely, perhaps."""
    kept = np.isin(np.arange(len(scores)), forced)
    left = min(count, len(scores)) - kept.sum()
    if left <= 0:
        return kept, kept
    border = np.sort(scores[~kept])[-left]
    slack *= abs(border)
    surely, perhaps = kept | (scores > border + slack), kept | (scores >= border - slack)
    return (perhaps if perhaps.sum() == kept.sum() + left else surely), perhaps


def positions(q, k) -> tuple[np.ndarray, np.ndarray]:
    """Query positions `[Q, 1]` and key positions `[1, S]`."""
    return np.arange(len(k) - len(q), len(k))[:, None], np.arange(len(k))[None]


@dataclass(frozen=True)
class Row:
    """Settings by name, those that keep every causal pair of up to 2,000 tokens, and the oracle."""

    settings: dict[str, object]
    everything: dict[str, object]
    oracle: Callable[..., Masks]


PATTERN_ROWS: dict[str, Row] = {}


def row(kind: str, settings: dict[str, dict], everything: dict[str, dict]):
    """Make an oracle the row of a pattern: parameters by name, "" for the kind's own."""

    def named(parameters: dict[str, dict]) -> dict[str, object]:
        return {
            f"{kind}_{name}" if name else kind: PATTERNS[kind](**given)
            for name, given in parameters.items()
        }

    def add(oracle):
        PATTERN_ROWS[kind] = Row(named(settings), named(everything), oracle)
        return oracle

    return add


@row(
    "streaming",
    {
        "": dict(sink=8, recent=40),
        "growing": dict(sink=5, recent=20, recent_per_token=0.3),
        "without_sink": dict(sink=0, recent=1),
    },
    everything={
        "": dict(sink=0, recent=2000),
        "all_sink": dict(sink=2000, recent=1),
        "growing": dict(sink=0, recent=1, recent_per_token=1.0),
    },
)
def streaming(pattern, q, k, block: int, scale: float) -> Masks:
    kept = np.zeros((len(q), len(k)), bool)
    rate = round(pattern.recent_per_token * 65536)  # rates are held in 1/65536
    for i, query in enumerate(range(len(k) - len(q), len(k))):
        span = pattern.recent + query * rate // 65536
        kept[i, : min(pattern.sink, query + 1)] = True
        kept[i, max(query - span + 1, 0) : query + 1] = True
    return kept, kept


@row(
    "vertical_slash",
    {"": dict(columns=45, diagonals=130), "few": dict(columns=7, diagonals=1)},
    everything={"": dict(columns=1, diagonals=2000), "columns": dict(columns=2000, diagonals=1)},
)
def vertical_slash(pattern, q, k, block: int, scale: float) -> Masks:
    query, key = positions(q, k)
    logits = np.where(key <= query, q @ k.T * scale, -np.inf)[-64:]
    weight = np.exp(logits - logits.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    distance = (query - key)[-64:]
    by_column = weight.sum(0)
    by_diagonal = np.array([weight[distance == d].sum() for d in range(len(k))])
    columns = best(by_column, pattern.columns, range(min(30, pattern.columns)))
    diagonals = best(by_diagonal, pattern.diagonals, range(min(100, pattern.diagonals)))
    masks = []
    for column, diagonal in zip(columns, diagonals, strict=True):
        kept = np.zeros((len(q), len(k)), bool)
        for i in range(0, len(q), block):
            for j in range(0, len(k), block):
                far = (query[i : i + block] - key[:, j : j + block]).ravel()
                kept[i : i + block, j : j + block] = diagonal[far[far >= 0]].any()
        masks.append((kept | column) & (key <= query))
    return masks[0], masks[1]


@row(
    "block_topk",
    {"": dict(share=0.25, min_blocks=2), "one": dict(share=0.01, min_blocks=1)},
    everything={"": dict(share=1.0, min_blocks=1), "min": dict(share=0.01, min_blocks=2000)},
)
def block_topk(pattern, q, k, block: int, scale: float) -> Masks:
    query, key = positions(q, k)
    key_means = np.stack([k[j : j + block].mean(0) for j in range(0, len(k), block)])
    masks = np.zeros((len(q), len(k)), bool), np.zeros((len(q), len(k)), bool)
    for i in range(0, len(q), block):
        at = query[i : i + block, 0]
        visible = at[-1] // block + 1
        own = range(at[0] // block, visible)
        forced = sorted({0, *own})
        count = max(pattern.min_blocks, ceil(round(pattern.share * visible, 6)), len(forced))
        scores = key_means[:visible] @ q[i : i + block].mean(0)
        scores -= scores.min() - 1  # about 1, so that the tolerance means something
        for mask, blocks in zip(masks, best(scores, count, forced), strict=True):
            for j in np.flatnonzero(blocks):
                mask[i : i + block, j * block : (j + 1) * block] = True
    return masks[0] & (key <= query), masks[1] & (key <= query)


@row(
    "antidiagonal",
    {"": dict(tau=0.6, max_share=1.0), "cut": dict(tau=0.9, max_share=0.2)},
    everything={"": dict(tau=1.0, max_share=1.0)},
)
def antidiagonal(pattern, q, k, block: int, scale: float) -> Masks:
    query, key = positions(q, k)
    mass = antidiagonal_mass(q, k, block, scale)
    masks = np.zeros((len(q), len(k)), bool), np.zeros((len(q), len(k)), bool)
    for i in range(0, len(q), block):
        at = query[i : i + block, 0]
        visible = at[-1] // block + 1
        own = range(at[0] // block, visible)
        forced = sorted({0, *own})
        scores = mass[i // block, :visible]
        others = np.sort(np.delete(scores, forced))[::-1]
        before = scores[forced].sum() + np.cumsum([0, *others])[:-1]  # by how many others are kept
        target = scores.sum() * (pattern.tau if pattern.tau < 1 else np.inf)
        most = max(ceil(round(pattern.max_share * visible, 6)), len(forced))
        sets = []
        for slack in (-1e-5, 1e-5):  # surely, perhaps
            wanted = len(forced) + (before < target * (1 + slack)).sum()
            sets.append(best(scores, min(wanted, most), forced))
        for mask, blocks in zip(masks, (sets[0][0], sets[1][1]), strict=True):
            for j in np.flatnonzero(blocks):
                mask[i : i + block, j * block : (j + 1) * block] = True
    return masks[0] & (key <= query), masks[1] & (key <= query)


def antidiagonal_mass(q, k, block: int, scale: float) -> np.ndarray:
    """Estimated mass by block, pair by pair: query 15 - t of its group meets key t of its own."""
    first = len(k) - len(q)
    mass = np.zeros((-(-len(q) // block), -(-len(k) // block)))
    for n in range(0, len(q), 16):
        last = first + min(n + 15, len(q) - 1)
        logits = np.zeros(last // 16 + 1)
        for m in range(len(logits)):
            for t in range(16):
                if n + 15 - t < len(q) and m * 16 + t < len(k):
                    logits[m] += q[n + 15 - t] @ k[m * 16 + t] * scale / 16
        weight = np.exp(logits - logits.max())
        np.add.at(mass[n // block], np.arange(len(logits)) * 16 // block, weight / weight.sum())
    return mass


def sets_as_masks(blocks: list[Masks], q, k, block: int) -> Masks:
    """The blocks of each query block, surely and perhaps, as masks of causal pairs."""
    query, key = positions(q, k)
    masks = np.zeros((len(q), len(k)), bool), np.zeros((len(q), len(k)), bool)
    for i, sets in enumerate(blocks):
        for mask, kept in zip(masks, sets, strict=True):
            for j in np.flatnonzero(kept):
                mask[i * block : (i + 1) * block, j * block : (j + 1) * block] = True
    return masks[0] & (key <= query), masks[1] & (key <= query)


def pieces(x, block: int) -> list[np.ndarray]:
    """The tokens of each block."""
    return [x[i : i + block] for i in range(0, len(x), block)]


def pooled(x, block: int) -> np.ndarray:
    """Mean of each block."""
    return np.stack([piece.mean(0) for piece in pieces(x, block)])


def softmax(logits: np.ndarray) -> np.ndarray:
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


@row(
    "energy",
    {
        "": dict(alpha=0.96, sink_blocks=1, recent_blocks=2, max_share=1.0),
        "cut": dict(alpha=0.9, sink_blocks=2, recent_blocks=0, dense_blocks=1, max_share=0.3),
    },
    everything={
        "": dict(alpha=1e-9, max_share=1.0),
        "recent": dict(alpha=1.0, recent_blocks=2000),
        "dense": dict(alpha=1.0, dense_blocks=2000),
    },
)
def energy(pattern, q, k, block: int, scale: float) -> Masks:
    query, _ = positions(q, k)
    keys, blocks = pooled(k, block), []
    for i, rows in enumerate(pieces(q, block)):
        at = query[i * block : (i + 1) * block, 0]
        visible, home = at[-1] // block + 1, at[0] // block
        level = np.array(
            [np.log(np.exp(rows[at >= j * block] @ keys[j] * scale).sum()) for j in range(visible)]
        )
        recent = range(max(home - pattern.recent_blocks + 1, 0), visible)
        dense = range(visible) if i >= -(-len(q) // block) - pattern.dense_blocks else ()
        forced = {0, *range(home, visible), *recent, *dense}
        forced = sorted(forced | {*range(min(pattern.sink_blocks, visible))})
        most = max(ceil(round(pattern.max_share * visible, 6)), len(forced))
        sets = []
        for slack in (1e-5, -1e-5):  # surely, perhaps
            near = level >= level.max() + np.log(pattern.alpha) + slack
            count = (near | np.isin(np.arange(visible), forced)).sum()
            sets.append(best(level - level.min() + 1, min(count, most), forced))
        blocks.append((sets[0][0], sets[1][1]))
    return sets_as_masks(blocks, q, k, block)


@row(
    "sparge",
    {
        "": dict(theta=0.0072, tau=0.8, max_share=0.3),
        "share": dict(theta=-0.1, tau=1.0, max_share=0.4),
    },
    everything={"": dict(theta=1.0), "share": dict(theta=-1.0, tau=1.0, max_share=1.0)},
)
def sparge(pattern, q, k, block: int, scale: float) -> Masks:
    query, _ = positions(q, k)
    keys, means, blocks = pooled(k, block), pooled(q, block), []
    alike_k = np.array([pair_cosine(piece) for piece in pieces(k - k.mean(0), block)])
    alike_q = np.array([pair_cosine(piece) for piece in pieces(q, block)])
    border = np.abs(np.concatenate([alike_k, alike_q]) - pattern.theta).min()
    assert border > 1e-7, "a block is as alike as theta says: take another"
    alike_k, alike_q = alike_k > pattern.theta, alike_q > pattern.theta
    for i in range(len(means)):
        at = query[i * block : (i + 1) * block, 0]
        visible = at[-1] // block + 1
        own = sorted({0, *range(at[0] // block, visible)})
        ranked = np.flatnonzero(alike_k[:visible]) if alike_q[i] else np.array([], int)
        whole = np.ones(visible, bool)
        whole[ranked] = False
        whole[own] = True
        if len(ranked) == 0:
            blocks.append((whole, whole))
            continue
        logits = keys[ranked] @ means[i] * scale
        mass = softmax(logits)
        forced = np.flatnonzero(np.isin(ranked, own))
        others = np.sort(np.delete(mass, forced))[::-1]
        before = mass[forced].sum() + np.cumsum([0, *others])[:-1]
        most = max(ceil(round(pattern.max_share * visible, 6)), len(forced))
        sets = []
        for slack in (-1e-5, 1e-5):
            wanted = len(ranked)
            if pattern.tau < 1:
                wanted = len(forced) + (before < pattern.tau * (1 + slack)).sum()
            sets.append(best(logits - logits.min() + 1, min(wanted, most), forced))
        both = whole.copy(), whole.copy()
        both[0][ranked] |= sets[0][0]
        both[1][ranked] |= sets[1][1]
        blocks.append(both)
    return sets_as_masks(blocks, q, k, block)


def pair_cosine(x: np.ndarray) -> float:
    """Mean cosine of all pairs of rows, a vector of no length being at right angles to all."""
    long = np.linalg.norm(x, axis=1, keepdims=True)
    units = np.divide(x, long, out=np.zeros_like(x), where=long > 1e-12)
    return float((units @ units.T).mean())


@row(
    "flexprefill",
    {
        "": dict(gamma=0.5, tau=0.0, min_budget=1, max_share=1.0),
        "aware": dict(gamma=0.3, tau=0.104, min_budget=40, max_share=0.2),
    },
    everything={
        "": dict(gamma=1.0, tau=0.0, max_share=1.0),
        "aware": dict(gamma=1.0, tau=1.0, min_budget=1, max_share=1.0),
        "budget": dict(gamma=0.1, min_budget=2000),
    },
)
def flexprefill(pattern, q, k, block: int, scale: float) -> Masks:
    query, key = positions(q, k)
    n, nq, nk = min(len(q), 128), -(-len(q) // block), -(-len(k) // block)
    weight = softmax(np.where(key <= query, q @ k.T * scale, -np.inf)[-n:]) / n
    distance = (query - key)[-n:]
    by_distance = np.bincount(np.maximum(distance, 0).ravel(), weight.ravel(), len(k))
    keys, true = pooled(k, block), np.add.reduceat(weight.sum(0), range(0, len(k), block))
    guess = softmax(keys @ q[-n:].mean(0) * scale)
    half = (true + guess) / 2
    apart = (true * np.log(true / half) + guess * np.log(guess / half)).sum() / 2
    apart = np.sqrt(max(apart, 0))
    assert pattern.tau == 0 or abs(apart - pattern.tau) > 1e-5, (
        "a head is as far off as tau: take another"
    )
    aware, least = apart < pattern.tau, ceil(pattern.min_budget / block)
    most = max(ceil(round(pattern.max_share * nk, 6)), least)
    bands = []
    for mass in (weight.sum(0), by_distance):
        chosen, whole = [], np.add.reduceat(mass, range(0, len(k), block))
        before = np.cumsum([0, *np.sort(mass)[::-1]])[:-1]
        for slack in (-1e-6, 1e-6):
            count = (before < pattern.gamma + slack).sum() // block + 1
            count = nk if pattern.gamma == 1 else count
            count = least if aware else max(count, least)
            chosen.append(best(whole, min(count, most), [0]))
        bands.append((chosen[0][0], chosen[1][1]))
    places = [(query[i * block, 0], query[min((i + 1) * block, len(q)) - 1, 0]) for i in range(nq)]
    maps = [np.zeros((nq, nk), bool), np.zeros((nq, nk), bool)]
    for which, kept in enumerate(maps):
        for i, (first, last) in enumerate(places):
            for j in range(last // block + 1):
                far = {first // block - j, last // block - j} - {-1}
                kept[i, j] = bands[0][which][j] | any(bands[1][which][t] for t in far)
                kept[i, j] |= j == 0 or j >= first // block
    if aware:
        inside = [(i, j) for i in range(nq) for j in range(places[i][1] // block + 1)]
        rows = [
            softmax(keys[: last // block + 1] @ mean * scale)
            for (_, last), mean in zip(places, pooled(q, block), strict=True)
        ]
        mass = np.concatenate(rows)
        before = np.cumsum([0, *np.sort(mass)[::-1]])[:-1]
        most = ceil(round(pattern.max_share * len(mass), 6))
        for which, slack in enumerate((-1e-6, 1e-6)):
            count = (before < (pattern.gamma + slack) * nq).sum()
            count = len(mass) if pattern.gamma == 1 else count
            for place in np.flatnonzero(best(mass, min(count, most), [])[which]):
                maps[which][inside[place]] = True
    return sets_as_masks(list(zip(*maps, strict=True)), q, k, block)


@row(
    "sample",
    {
        "": dict(alpha=0.7, stride=7, window=0.1, max_share=1.0),
        "cut": dict(alpha=0.9, stride=50, window=0.01, max_share=0.05),
    },
    everything={
        "": dict(alpha=1.0, window=0.01, max_share=1.0),
        "window": dict(alpha=0.1, window=1.0, max_share=0.01),
    },
)
def sample(pattern, q, k, block: int, scale: float) -> Masks:
    query, key = positions(q, k)
    logits = np.where(key <= query, q @ k.T * scale, -np.inf)[::-1][:: pattern.stride]
    weight = np.exp(logits - logits.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    mass = weight.sum(0) / len(weight)
    ranked = np.sort(mass)[::-1]
    before = np.cumsum([0, *ranked])[:-1]
    most, recent = (ceil(round(share * len(k), 6)) for share in (pattern.max_share, pattern.window))
    near = np.zeros((len(q), len(k)), bool)
    for i in range(0, len(q), block):
        for j in range(0, len(k), block):
            newest = min(j + block, len(k)) - 1
            near[i : i + block, j : j + block] = j == 0 or newest > query[i, 0] - recent
    sets = []
    for slack in (-1e-5, 1e-5):  # surely, perhaps
        target = (pattern.alpha if pattern.alpha < 1 else np.inf) * (1 + slack)
        sets.append(best(mass, min((before < target).sum(), most), []))
    return tuple((near | columns) & (key <= query) for columns in (sets[0][0], sets[1][1]))


@row(
    "hip",
    {
        "": dict(share=0.3, sink=40, recent=70),
        "one": dict(share=0.01, sink=0, recent=1),
    },
    everything={
        "": dict(share=1.0, sink=0, recent=1),
        "recent": dict(share=0.01, sink=0, recent=2000),
    },
)
def hip(pattern, q, k, block: int, scale: float) -> Masks:
    query, key = positions(q, k)

    def score(i: int, first: int, size: int) -> float:
        """Of the key that halving leaves of so many keys, for the queries from i on."""
        if size == 1:
            return (q[i : i + block : 4] @ k[first]).max()
        half = size // 2
        middles = [(q[i : i + block : 4] @ k[at + half // 2]).max() for at in (first, first + half)]
        return score(i, first + half * (middles[1] > middles[0]), half)

    masks = np.zeros((len(q), len(k)), bool), np.zeros((len(q), len(k)), bool)
    for i in range(0, len(q), block):
        at = query[i : i + block, 0]
        begins = range(0, at[-1] + 1, block)
        always = [
            j == 0 or j < pattern.sink or min(j + block, len(k)) - 1 > at[0] - pattern.recent
            for j in begins
        ]
        scores = [0 if a else score(i, j, block) for j, a in zip(begins, always, strict=True)]
        share = ceil(round(pattern.share * (len(always) - sum(always)), 6))
        kept = best(np.array(scores), sum(always) + share, np.flatnonzero(always))
        for mask, blocks in zip(masks, kept, strict=True):
            for j in np.flatnonzero(blocks):
                mask[i : i + block, j * block : (j + 1) * block] = True
    return masks[0] & (key <= query), masks[1] & (key <= query)


@row(
    "strided",
    {
        "": dict(sink=40, recent=50, stride=3, shift=1),
        "random": dict(sink=0, recent=1, stride=0, random=3, seed=5),
    },
    everything={
        "": dict(sink=0, recent=1, stride=1),
        "random": dict(sink=0, recent=1, stride=0, random=2000),
    },
)
def strided(pattern, q, k, block: int, scale: float) -> Masks:
    query, key = positions(q, k)
    kept = np.zeros((len(q), len(k)), bool)
    for i in range(0, len(q), block):
        at = query[i : i + block, 0]
        for own in {at[0] // block, at[-1] // block}:
            blocks = {j for j in range(own + 1) if j == 0 or j * block < pattern.sink}
            blocks |= {
                j for j in range(own + 1) if (j + 1) * block > own * block - pattern.recent + 1
            }
            if pattern.stride:
                blocks |= {j for j in range(own) if (own - j) % pattern.stride == pattern.shift}
            others = [j for j in range(own) if j not in blocks]
            others.sort(key=lambda j: drawn(drawn(drawn(pattern.seed) + own) + j))
            for j in blocks | {*others[: pattern.random]}:
                kept[i : i + block, j * block : (j + 1) * block] = True
    kept &= key <= query
    return kept, kept


def drawn(number: int) -> int:
    """32 bits that look random."""
    number &= 0xFFFFFFFF
    for _ in range(2):
        number = (number ^ number >> 16) * 0x45D9F3B & 0xFFFFFFFF
    return number ^ number >> 16


def largest_share(scores: np.ndarray) -> np.ndarray:
    """Votes [P]: the largest softmax of scores `[group, Q, P]` over the pages."""
    weight = np.exp(scores - scores.max(2, keepdims=True))
    return (weight / weight.sum(2, keepdims=True)).max((0, 1))


def quest(selector: Quest, q, k, scale: float, table, head: int) -> np.ndarray:
    bounds = []
    for unit in split(k, selector.unit):
        spans = [(span.min(0), span.max(0)) for span in split(unit, selector.bound)]
        bounds.append(max_of(np.maximum(q * low, q * high).sum(2) * scale for low, high in spans))
    return largest_share(np.stack(bounds, 2))


def lowrank(selector: LowRank, q, k, scale: float, table, head: int) -> np.ndarray:
    keys, queries = (table[name][0, head].double().numpy() for name in ("keys", "queries"))
    values, vectors = np.linalg.eigh(queries if selector.by == "scores" else np.eye(len(keys)))
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    best = np.linalg.eigh(root @ keys @ root)[1][:, ::-1][:, : selector.rank]
    best *= np.sign(np.take_along_axis(best, np.abs(best).argmax(0)[None], 0))
    at = np.arange(selector.rank)
    turn = np.cos(np.pi / len(at) * (at + 0.5) * at[:, None]) * np.sqrt(2 / len(at))
    turn[0] /= np.sqrt(2)
    best = best @ turn
    return by_tokens(selector, q @ inverse @ best, rounded(k @ root @ best, selector.bits), scale)


def landmarks(selector: Landmarks, q, k, scale: float, table, head: int) -> np.ndarray:
    chunks = split(k, 8)
    means = np.stack([chunk.mean(0) for chunk in chunks])
    cosines = [cosine(chunk, mean).min() for chunk, mean in zip(chunks, means, strict=True)]
    score = q @ means.T * scale
    first = np.argsort(np.float32(cosines), kind="stable")[
        : ceil(round(selector.outliers * len(chunks), 6))
    ]
    score[..., first] = score.max(2, keepdims=True)
    starts = range(0, len(chunks), selector.unit // 8)
    return largest_share(np.maximum.reduceat(score, starts, 2))


def lsh(selector: Lsh, q, k, scale: float, table, head: int) -> np.ndarray:
    """By counting in which of the planes' bits a key and a query agree, as if one in a table."""
    total = selector.bits * selector.tables
    planes = drawn_planes(selector.seed, head, k.shape[1], total).double().numpy()
    mine, theirs = q @ planes > 0, (k - table["mean"][0, head].double().numpy()) @ planes > 0
    agreeing = (mine[:, :, None] == theirs).sum(3)
    one = (np.maximum(agreeing, 0.5) / total) ** selector.bits
    none, L = 1 - one, selector.tables
    candidate = 1 - none ** (L - 1) * (L * one + none)
    parts = range(0, len(k), selector.unit)
    return largest_share(np.log(np.maximum.reduceat(candidate, parts, 2)))


def centroids(selector: Centroids, q, k, scale: float, table, head: int) -> np.ndarray:
    parts = range(0, len(k), selector.unit)
    part = max(selector.segment // 8, PAGE)
    built = (len(k) - q.shape[1]) // part * part if selector.segment > PAGE else 0
    means = [
        clustered(part, selector.clusters * len(part) // PAGE, len(part), 10)
        for part in (split(k[:built], selector.segment) if built else ())
    ]
    means += [clustered(page, selector.clusters) for page in split(k[built:], PAGE)]
    means = np.concatenate(means)
    return largest_share(np.maximum.reduceat(q @ means.T * scale, parts, 2))


def clustered(k: np.ndarray, clusters: int, size: int = PAGE, turns: int = 4) -> np.ndarray:
    """Each key's centroid, by some rounds of k-means of the directions of up to `size` keys."""
    ways = k / np.maximum(np.linalg.norm(k, axis=1, keepdims=True), 1e-12)
    centres = {c: ways[at] for c in range(clusters) if (at := c * size // clusters) < len(k)}
    for turn in range(turns):
        apart = [((ways - centre) ** 2).sum(1) for centre in centres.values()]
        near = np.argmin(apart, 0)
        for c in {*near.tolist()}:
            centres[c] = (k if turn == turns - 1 else ways)[near == c].mean(0)
    return np.stack([centres[c] for c in near.tolist()])


def cosine(k: np.ndarray, to: np.ndarray) -> np.ndarray:
    return k @ to / np.maximum(np.linalg.norm(k, axis=1) * np.linalg.norm(to), 1e-38)


def channels(selector: Channels, q, k, scale: float, table, head: int) -> np.ndarray:
    heavy = np.argsort(-table["weight"][0, head].double().numpy(), kind="stable")
    heavy = heavy[: selector.channels]
    return by_tokens(selector, q[..., heavy], rounded(k[:, heavy], selector.bits), scale)


def rounded(label: np.ndarray, bits: int) -> np.ndarray:
    """Labels `[n, rank]` in few bits: equal steps up to a token's largest."""
    if bits == 16:
        return label.astype(np.float16).astype(float)
    most = 2 ** (bits - 1) - 1
    step = np.maximum(np.abs(label).max(1, keepdims=True) / most, 2.0**-24)
    step = step.astype(np.float16).astype(float)
    return np.clip(np.rint(label / step), -most, most) * step


def by_tokens(selector, q, labels, scale: float) -> np.ndarray:
    """Votes for units that are worth what their best token is."""
    units = split(labels, selector.budget.unit)
    return largest_share(np.stack([(q @ unit.T).max(2) * scale for unit in units], 2))


def split(k: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Keys `[n, D]` in parts of so many."""
    return np.array_split(k, range(tokens, len(k), tokens))


def max_of(arrays) -> np.ndarray:
    """The largest, place by place."""
    return np.stack([*arrays]).max(0)


@dataclass(frozen=True)
class SelectorRow:
    """Settings by name, the oracle that they are all held against, and what they are bound to.

    `oracle(setting, q, k, scale, table, head) -> votes [P]` sees one row and kv head, in float64:
    its group's newest queries q `[group, Q, D]` over the row's keys k `[n, D]`, theirs included.
    """

    settings: dict[str, object]
    oracle: object = None
    table: Callable[[int, int, int], dict[str, Tensor]] | None = None  # of layers, heads, channels


def weights(layers: int, heads: int, dim: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(5)
    return {"weight": torch.rand(layers, heads, dim, generator=made)}


def means(layers: int, heads: int, dim: int) -> dict[str, Tensor]:
    return {"mean": weights(layers, heads, dim)["weight"] / 4}


def moments(layers: int, heads: int, dim: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(5)
    keys, queries = torch.randn(2, layers, heads, 5 * dim, dim, generator=made)
    return {name: t.mT @ t / (5 * dim) for name, t in (("keys", keys), ("queries", queries))}


SELECTOR_ROWS = {
    "centroids": SelectorRow(
        {
            "centroids": Centroids(share=0.2, min_pages=2, clusters=5),
            "centroids_segments": Centroids(0.2, 2, unit=8, clusters=16, segment=256),
            "centroids_16": Centroids(share=0.4, min_pages=2, unit=16, top_p=0.7, clusters=8),
        },
        centroids,
    ),
    "channels": SelectorRow(
        {
            "channels": Channels(0.2, 2, unit=64, channels=4, bits=4, means=True),
            "channels_all": Channels(1.0, 2, channels=3, bits=8),
            "channels_top_p": Channels(0.7, 2, top_p=0.5, channels=4, bits=16),
        },
        channels,
        weights,
    ),
    "quest": SelectorRow(
        {
            "quest": Quest(share=0.2, min_pages=2),
            "quest_few": Quest(share=0.01, min_pages=3),
            "quest_all": Quest(share=1.0, min_pages=2),
            "quest_top_p": Quest(share=0.7, min_pages=2, top_p=0.5),
            "quest_16": Quest(share=0.3, min_pages=2, unit=16, means=True),
            "quest_lserve": Quest(share=0.3, min_pages=2, bound=16),
        },
        quest,
    ),
    "landmarks": SelectorRow(
        {
            "landmarks": Landmarks(share=0.2, min_pages=2, outliers=0.05),
            "landmarks_16": Landmarks(share=0.4, min_pages=2, unit=16, top_p=0.6, outliers=0.0),
            "landmarks_all": Landmarks(share=1.0, min_pages=2, unit=64),
        },
        landmarks,
    ),
    "lowrank": SelectorRow(
        {
            "lowrank": LowRank(share=0.2, min_pages=2, rank=3, bits=8, by="keys"),
            "lowrank_tokens": LowRank(share=0.1, min_pages=2, unit=1, rank=4),
            "lowrank_top_p": LowRank(share=0.7, min_pages=2, top_p=0.5, unit=8, rank=4, bits=16),
        },
        lowrank,
        moments,
    ),
    "lsh": SelectorRow(
        {
            "lsh": Lsh(share=0.2, min_pages=2),
            "lsh_tokens": Lsh(share=0.4, min_pages=2, unit=1, top_p=0.6, bits=4, tables=20, seed=3),
        },
        lsh,
        means,
    ),
    "reuse": SelectorRow({}),  # what another layer's selector chose
}


def table_of(selector, layers: int = 1, heads: int = 2, dim: int = 8):
    """The table that a selector is bound to in tests; None where it needs none."""
    made = SELECTOR_ROWS[selector.kind].table
    return made and made(layers, heads, dim)


def oracle_pages(setting, q, k, scale: float, table=None, head: int = 0, slack=1e-5) -> Masks:
    """Units that a step must read and those that it may, of one row and kv head, tensors in.

    They differ where votes are nearer to one another than `slack`, of which 0 is for none.
    """
    q, k = (t.to(torch.float64).numpy() for t in (q, k))
    vote = SELECTOR_ROWS[setting.kind].oracle(setting, q, k, scale, table, head)
    total, budget, each = len(vote), setting.budget, PAGE // setting.budget.unit
    newest = (len(k) - q.shape[1]) // PAGE * each
    forced = sorted({*range(min(each, total)), *range(newest, total)})
    fewest = budget.min_pages * each
    most = max(ceil(round(budget.share * total, 6)), fewest)
    counts = [most, most]
    if budget.top_p:
        others = np.sort(np.delete(vote, forced))[::-1]
        before = vote[forced].sum() + np.cumsum([0, *others])[:-1]
        needed = vote.sum() * budget.top_p
        for i, more in enumerate((-slack, slack)):  # surely, perhaps
            wanted = len(forced) + (before < needed * (1 + more)).sum()
            counts[i] = min(most, max(wanted, fewest))
    if not slack:  # equal votes go to the lower page
        vote = vote.round(12) - np.arange(total) * 1e-15
    surely, perhaps = (best(vote, max(n, len(forced)), forced, slack) for n in counts)
    return surely[0], perhaps[1]


SETTINGS = {name: p for each in PATTERN_ROWS.values() for name, p in each.settings.items()}
EVERYTHING = {name: p for each in PATTERN_ROWS.values() for name, p in each.everything.items()}

# Kinds that stay what they are: choices of `balanced`, and chosen by Triton on a GPU. A new pattern
# need be neither.
CANDIDATES = ("streaming", "vertical_slash", "block_topk", "antidiagonal")
FUSED = (*CANDIDATES[1:], "energy", "flexprefill", "hip", "sample", "sparge")


def oracle_masks(name: str, q, k, block: int, scale: float) -> Masks:
    """The masks of a named setting for one row and head, tensors in."""
    pattern = SETTINGS[name]
    q, k = (t.to(torch.float64).numpy() for t in (q, k))
    return PATTERN_ROWS[pattern.kind].oracle(pattern, q, k, block, scale)


def heads(it: Batch) -> Tensor:
    """The kv head of each q head."""
    H = it.q.shape[1]
    return torch.arange(H) // (H // it.k.shape[1])


def mixed(it: Batch) -> BlockLists:
    """Each q head a pattern of its own, the first one full."""
    names, parts = [None, *SETTINGS], []
    for h, kv in enumerate(heads(it).tolist()):
        q, k, name = it.q[:, h : h + 1], it.k[:, kv : kv + 1], names[h % len(names)]
        full = BlockLists.of(it.grid, 1)
        parts.append(SETTINGS[name].lists(q, k, it.grid, it.scale) if name else full)
    return BlockLists.cat(parts)
