"""Where 4 bits lose, and what would lose less: `python -m benchmarks.studies.bits_ways MODEL`.

    [--tasks niah_multikey_2,niah_multikey_3] [--lengths 4096] [--samples 16] [--first 0]
    [--ways NAME …] [--mixed 8] [--seconds 60]

A prompt is read once, densely; then its answer over what a cache would hold of it, coded in many
ways. Right or wrong tells little of few samples, so each way is judged by margins: how far the
right token's logit lies above the best other's. What a way moves them by (root mean square) is
noise that falls on every choice. Beside it stand nats that an answer lost, and answers that were
not all first choices; samples that are not with every number as it came are left out. Of the task
`prose` the last tokens are the answer, right or not.

`--mixed n`: of the first n samples each kv head alone is coded in 4 bits, which gives its share of
the noise; of the others the heads with the largest shares have 8 bits and all others 4.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import sqrt
from statistics import mean

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.common.coded import TAILS, outliers, prompt_of, stepped
from benchmarks.common.options import numbers
from hfsparse.lists import PAGE
from hfsparse.models.loading import load
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.samples import Case, Maker
from hfsparse_eval.tasks import TASKS

Coder = Callable[[Tensor], Tensor]  # of pages [H, P, PAGE, D], as they come back
PROSE = "prose"
CHANNEL, TOKEN = -2, -1  # what ends are of: a page's channel, or a token
FINER = (1, 2, 4, 9, 18, 27)  # kv heads in more bits


def between(t: Tensor, low: Tensor, high: Tensor, levels: int, middle: bool) -> Tensor:
    """t in so many levels, from end to end; middle: they are the middles of as many equal parts."""
    if middle:
        step = ((high - low) / levels).clamp(min=1e-30)
        return low + (((t - low) / step).floor().clamp(0, levels - 1) + 0.5) * step
    step = ((high - low) / (levels - 1)).clamp(min=1e-30)
    return low + ((t - low) / step).round().clamp(0, levels - 1) * step


def coded(
    t: Tensor,
    over: int,
    bits: int = 4,
    group: int = 0,
    middle: bool = False,
    clip: tuple[float, ...] = (1.0,),
) -> Tensor:
    """Pages in steps between ends; group: of so many numbers; clip: shares of the ends' distance
    from their middle, of which the pair with the smallest square error is taken."""
    shape, t = t.shape, t.float()
    if group:
        t = t.unflatten(over, (-1, group))
    low, high = t.amin(over, keepdim=True), t.amax(over, keepdim=True)
    best, found, centre = None, t, (low + high) / 2
    for a in clip:
        for b in clip:
            ends = centre + (low - centre) * a, centre + (high - centre) * b
            back = between(t, *(each.bfloat16().float() for each in ends), 1 << bits, middle)
            error = (back - t).square().sum(over, keepdim=True)
            better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
            best = torch.where(better, error, error if best is None else best)
            found = torch.where(better, back, found)
    return found.reshape(shape)


def uneven(t: Tensor, few: int, many: int, by: str) -> Tensor:
    """Keys, half of the channels in more bits than the others.

    rope: those that turn the slowest, of halves (D / 4 to D / 2, and 3 D / 4 to D); span: of two
    channels, D / 4 apart, that whose ends are farther from one another; most: the half of all
    whose are.
    """
    t, D = t.float(), t.shape[-1]
    low, high = t.amin(CHANNEL, keepdim=True), t.amax(CHANNEL, keepdim=True)
    channel = torch.arange(D, device=t.device)
    slow, span = channel // (D // 4) % 2 == 1, high - low
    if by == "rope":
        fine = slow
    elif by == "span":
        other = span[..., torch.where(slow, channel - D // 4, channel + D // 4)]
        fine = (span > other) | ((span == other) & slow)
    else:
        fine = span.argsort(-1).argsort(-1) >= D // 2
    levels = torch.where(fine, 2.0**many, 2.0**few)
    step = ((high - low) / (levels - 1)).clamp(min=1e-30)
    return low + ((t - low) / step).round() * step


def hadamard(n: int) -> Tensor:
    made = torch.ones(1, 1)
    while len(made) < n:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / sqrt(n)


def turned(t: Tensor, coder: Coder) -> Tensor:
    """Coded in other axes, which have a part of every channel."""
    axes = hadamard(t.shape[-1]).to(t.device)
    return coder(t.float() @ axes) @ axes


def stretched(t: Tensor, coder: Coder) -> Tensor:
    """Where pairs of channels are larger, and their queries smaller by as much: `outliers`."""
    (by,) = outliers((1, t.shape[0], t.shape[-1]))
    by = by.to(t.device)
    return coder(t.float() * by) / by


def plain(t: Tensor) -> Tensor:
    return t


def exact_first(t: Tensor, coder: Coder) -> Tensor:
    """All but the prompt's first page."""
    return torch.cat([t[:, :1].float(), coder(t[:, 1:]).float()], 1)


KEYS, VALUES = partial(coded, over=CHANNEL), partial(coded, over=TOKEN)
LESS = (1.0, 0.92, 0.84, 0.76, 0.68)
STORES, UNEVEN = partial(stepped, bits=4), partial(uneven, few=3, many=5)
WAYS: dict[str, tuple[Coder, Coder]] = {
    "int8": (partial(KEYS, bits=8), partial(VALUES, bits=8)),
    "int4": (KEYS, VALUES),
    "int4, as the stores have it": (partial(STORES, over=CHANNEL), partial(STORES, over=TOKEN)),
    "int4, keys alone": (KEYS, plain),
    "int4, values alone": (plain, VALUES),
    "keys in 5 bits": (partial(KEYS, bits=5), plain),
    "keys in 5, values in 3": (partial(KEYS, bits=5), partial(VALUES, bits=3)),
    "keys in 8, values in 4": (partial(KEYS, bits=8), VALUES),
    "keys in 3 or 5 by rope": (partial(UNEVEN, by="rope"), plain),
    "keys in 3 or 5 by span": (partial(UNEVEN, by="span"), plain),
    "keys in 3 or 5, most": (partial(UNEVEN, by="most"), plain),
    "keys in 2 or 6 by rope": (partial(uneven, few=2, many=6, by="rope"), plain),
    "keys in 2 or 6 by span": (partial(uneven, few=2, many=6, by="span"), plain),
    "keys by 32": (partial(KEYS, group=32), plain),
    "keys by 16": (partial(KEYS, group=16), plain),
    "keys by token": (partial(coded, over=TOKEN), plain),
    "keys, middles": (partial(KEYS, middle=True), plain),
    "keys, clipped": (partial(KEYS, clip=LESS), plain),
    "keys, first page exact": (partial(exact_first, coder=KEYS), plain),
    "keys, turned, by channel": (partial(turned, coder=KEYS), plain),
    "keys, turned, by token": (partial(turned, coder=VALUES), plain),
    "values by 32": (plain, partial(VALUES, group=32)),
    "values by 16": (plain, partial(VALUES, group=16)),
    "values by channel": (plain, KEYS),
    "values, middles": (plain, partial(VALUES, middle=True)),
    "values, clipped": (plain, partial(VALUES, clip=LESS)),
    "values, first page exact": (plain, partial(exact_first, coder=VALUES)),
    "values, turned": (plain, partial(turned, coder=VALUES)),
    "outliers, keys, in 4": (partial(stretched, coder=KEYS), plain),
    "outliers, keys, as the stores": (
        partial(stretched, coder=partial(STORES, over=CHANNEL)),
        plain,
    ),
    "outliers, keys, by token": (partial(stretched, coder=VALUES), plain),
}


Cache = list[tuple[Tensor, Tensor]]  # keys and values [H, N, D] of each layer


def stored(cache: Cache, way: tuple[Coder, Coder]) -> Cache:
    """What a cache holds of the same: the newest page, which is not full, as it came."""

    def one(t: Tensor, coder: Coder) -> Tensor:
        full = t.shape[1] // PAGE * PAGE
        back = coder(t[:, :full].unflatten(1, (-1, PAGE))).flatten(1, 2)
        return torch.cat([back.to(torch.bfloat16).to(t.dtype), t[:, full:]], 1)

    return [tuple(map(one, layer, way)) for layer in cache]


@torch.inference_mode()
def prompt(model, ids: list[int]) -> Cache:
    """Keys and values of all tokens but the last, rounded to bfloat16 as a cache has them."""
    ids = torch.tensor([ids[:-1]], device=model.device)
    cache = model(input_ids=ids, logits_to_keep=1).past_key_values
    return [
        tuple(t[0].bfloat16().to(t.dtype) for t in (each.keys, each.values))
        for each in cache.layers
    ]


@torch.inference_mode()
def margins(model, cache: Cache, last: int, answer: list[int]) -> tuple[Tensor, float]:
    """By token how far the right logit is above the best other `[n]`, and nats of the answer."""
    held = DynamicCache()
    for layer, pair in enumerate(cache):
        held.update(*(t[None] for t in pair), layer)
    ids = torch.tensor([last, *answer[:-1]], device=model.device)[None]
    logits = model(input_ids=ids, past_key_values=held).logits[0].float()
    right = torch.tensor(answer, device=model.device)[:, None]
    own = logits.gather(1, right)[:, 0]
    nats = (logits.logsumexp(1) - own).sum().item()
    return own - logits.scatter(1, right, float("-inf")).amax(1), nats


def asked(name: str, maker: Maker | None, length: int, i: int, prompter: Prompter):
    """Ids of a prompt, and those of its answer."""
    if maker is None:
        ids = prompt_of(prompter.tokenizer, name, length, i).ids[0].tolist()
        return ids[: -TAILS[name]], ids[-TAILS[name] :]
    sample = maker.sample(Case(name, length, None, i))
    return list(sample.ids), list(prompter.ids(f" {sample.answers[0]}"))


class Tally:
    """What ways did to answers."""

    def __init__(self):
        self.rows: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)

    def add(self, way: str, got: tuple[Tensor, float], dense: tuple[Tensor, float]) -> float:
        """Mean square of what margins moved by; kept with nats lost, and whether all are right."""
        moved = (got[0] - dense[0]).square().mean().item()
        self.rows[way].append((moved, got[1] - dense[1], bool((got[0] > 0).all())))
        return moved

    def table(self) -> str:
        lines = ["| way | noise | nats an answer | most | wrong | n |", "| --- |" + " ---: |" * 5]
        for way, rows in self.rows.items():
            noise = sqrt(mean(row[0] for row in rows))
            nats = [row[1] for row in rows]
            wrong = sum(not row[2] for row in rows)
            told = f"{noise:.3f} | {mean(nats):+.4f} | {max(nats):.2f} | {wrong} | {len(rows)}"
            lines.append(f"| {way} | {told} |")
        return "\n".join(lines)


def alone(model, cache: Cache, coarse: Cache, last: int, answer: list[int], dense) -> Tensor:
    """By layer and kv head what margins move by, mean square, where it alone is coarse."""
    found = torch.zeros(len(cache), len(cache[0][0]))
    for layer, (fine, rough) in enumerate(zip(cache, coarse, strict=True)):
        for head in range(len(fine[0])):
            one = tuple(t.clone() for t in fine)
            for t, other in zip(one, rough, strict=True):
                t[head] = other[head]
            mixed = [*cache[:layer], one, *cache[layer + 1 :]]
            got = margins(model, mixed, last, answer)
            found[layer, head] = (got[0] - dense[0]).square().mean().item()
    return found


def with_heads(cache: Cache, finer: Cache, heads: Tensor) -> Cache:
    """The cache with those heads `[layers, H]` bool of the finer one."""
    return [
        tuple(
            torch.where(own.to(a.device)[:, None, None], b, a)
            for a, b in zip(rough, fine, strict=True)
        )
        for rough, fine, own in zip(cache, finer, heads, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--tasks",
        type=lambda text: text.split(","),
        default=["niah_multikey_2", "niah_multikey_3"],
    )
    parser.add_argument("--lengths", type=numbers, default=[4096])
    parser.add_argument("--samples", type=int, default=16, help="of each task at each length")
    parser.add_argument("--first", type=int, default=0, help="the first sample's number")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--mixed", type=int, default=0, help="samples that give shares of noise")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    begun = time.perf_counter()
    model, tokenizer = load(given.model, "auto", given.dtype)
    prompter, tally, left, shares = Prompter(tokenizer), Tally(), 0, []
    for length in given.lengths:
        makers = {
            name: None if name == PROSE else Maker(TASKS[name], length, prompter, 0)
            for name in given.tasks
        }
        for i in range(given.first, given.first + given.samples):
            for name, maker in makers.items():
                if time.perf_counter() - begun > given.seconds:
                    break
                ids, answer = asked(name, maker, length, i, prompter)
                cache, last = prompt(model, ids), ids[-1]
                dense = margins(model, cache, last, answer)
                if maker is not None and not (dense[0] > 0).all():
                    left += 1
                    continue
                tally.add("dense", dense, dense)
                for way in given.ways:
                    got = margins(model, stored(cache, WAYS[way]), last, answer)
                    tally.add(way, got, dense)
                if not given.mixed:
                    continue
                coarse, fine = stored(cache, WAYS["int4"]), stored(cache, WAYS["int8"])
                if len(shares) < given.mixed:
                    shares.append(alone(model, cache, coarse, last, answer, dense))
                    continue
                order = torch.stack(shares).mean(0).flatten().argsort(descending=True)
                half = stored(cache, WAYS["keys in 8, values in 4"])
                for few in FINER:
                    heads = torch.zeros(order.numel(), dtype=torch.bool)
                    heads[order[:few]] = True
                    for told, finer in (("", fine), ("'s keys", half)):
                        mixed = with_heads(coarse, finer, heads.view(shares[0].shape))
                        got = margins(model, mixed, last, answer)
                        tally.add(f"{few} heads{told} in int8", got, dense)
    print(f"{given.tasks} {given.lengths}: {left} left out, {time.perf_counter() - begun:.0f} s")
    if shares:
        noise = torch.stack(shares).mean(0)
        top = noise.flatten().sort(descending=True)
        told = [f"{at // noise.shape[1]}.{at % noise.shape[1]}" for at in top.indices[:18].tolist()]
        part = top.values.cumsum(0) / top.values.sum()
        print(
            f"noise of heads alone: the first {', '.join(told)}; of all, the first 2 have "
            f"{part[1]:.2f}, 5 {part[4]:.2f}, 9 {part[8]:.2f}, 18 {part[17]:.2f}, 45 {part[44]:.2f}"
        )
    print(tally.table(), flush=True)


if __name__ == "__main__":
    main()
