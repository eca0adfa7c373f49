"""Are projections of keys better measured before RoPE, as Loki may have them, or behind it?

    python -m benchmarks.studies.rope_projections MODEL [--length 4096] [--prompts 4] [--seed 0]

The table has the share of a prompt's last queries' attention that lies on the tokens that scores in
few dimensions rank highest: the principal ones of keys before RoPE and behind it, both of keys as
they are read, behind it (Loki, arXiv 2406.02542), and those that tell products with queries best
(`lowrank`, `by: scores`). A group's heads vote by the largest softmax; numbers are not rounded.
Moments are means over as many other prompts. Means over kv heads of all layers and prompts, with
their 95 % interval over prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hfsparse.interval import interval
from hfsparse.models.loading import load
from hfsparse.models.names import text_decoder
from hfsparse.profiler.measure.capture import Given, forward
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.selectors.lowrank import by_keys, by_scores

RANKS, PARTS = (16, 32), (0.02, 0.06)  # numbers of a key, tokens of the row
ASKED = 16  # queries
WAYS = ("keys before RoPE", "keys behind RoPE", "scores")


def turned_back(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys `[H, L, D]` as they were before RoPE, which turns channel c with c + D / 2."""
    first, second = k.chunk(2, -1)
    return k * cos - torch.cat([-second, first], -1) * sin


def moments(turn: Callable[[Tensor], Tensor]) -> Callable[[Given], dict[str, np.ndarray]]:
    """What looks at a layer: second moments `[H, D, D]` of keys, less their mean, and queries."""

    def look(given: Given) -> dict[str, np.ndarray]:
        k = given.k[0].float()
        q = given.q[0].float().unflatten(0, (len(k), -1)).flatten(1, 2)
        both = {"before": turn(k), "behind": k}
        found = {name: t - t.mean(1, keepdim=True) for name, t in both.items()} | {"queries": q}
        return {name: (t.mT @ t / t.shape[1]).numpy() for name, t in found.items()}

    return look


def projections(known: dict[str, np.ndarray], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """By way, those of keys and of queries, `[H, D, rank]`."""
    before, behind, queries = (
        torch.from_numpy(known[name]).double() for name in ("before", "behind", "queries")
    )
    made = by_keys(before, queries, rank), by_keys(behind, queries, rank)
    made = (*made, by_scores(behind, queries, rank))
    return {way: (k.float(), q.float()) for way, (k, q) in zip(WAYS, made, strict=True)}


def kept(given: Given, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of one layer, the share of the attention `[heads]` on what each way ranks highest."""
    k, found = given.k[0].float(), {}
    heads, length, dim = k.shape
    q = given.q[0, :, -ASKED:].float().unflatten(0, (heads, -1))  # [H, group, ASKED, D]
    later = torch.arange(length) > torch.arange(length - ASKED, length)[:, None]

    def attended(q: Tensor, k: Tensor) -> Tensor:
        logits = torch.einsum("hgqd,hld->hgql", q, k) * dim**-0.5
        return logits.masked_fill(later, -torch.inf).softmax(-1)

    true = attended(q, k)
    for rank in RANKS:
        for way, (of_keys, of_queries) in projections(known, rank).items():
            votes = attended(torch.einsum("hgqd,hdr->hgqr", q, of_queries), k @ of_keys).amax(1)
            for part in PARTS:
                best = votes.topk(round(part * length), -1).indices[:, None]
                on = true.gather(3, best.expand(-1, true.shape[1], -1, -1)).sum(-1)
                found[f"{way}, {rank}, {part:g}"] = on.mean((1, 2)).numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load(args.model, "cpu", "float32")
    prompts = make_prompts(tokenizer, args.length, 2 * args.prompts, args.seed)
    decoder = text_decoder(model)
    at = torch.arange(args.length)[None]
    cos, sin = (t[0].float() for t in decoder.rotary_emb(torch.zeros(1), at))
    look = moments(lambda k: turned_back(k, cos[: k.shape[1]], sin[: k.shape[1]]))
    seen = [forward(model, prompt.ids, look) for prompt in prompts[1::2]]
    known = [
        {name: np.mean([layers[i][name] for layers in seen], 0) for name in seen[0][i]}
        for i in range(len(seen[0]))
    ]
    found = []
    for prompt in prompts[::2]:
        layers = iter(known)
        found.append(forward(model, prompt.ids, lambda given, own=layers: kept(given, next(own))))
    print("| principal dimensions of | numbers | " + " | ".join(f"{p:.0%}" for p in PARTS) + " |")
    print("| --- | ---: |" + " --- |" * len(PARTS))
    for rank in RANKS:
        for way in WAYS:
            cells = []
            for part in PARTS:
                key = f"{way}, {rank}, {part:g}"
                each = [float(np.mean([layer[key] for layer in layers])) for layers in found]
                low, high = interval(each)
                cells.append(f"{np.mean(each):.3f} [{low:.3f}, {high:.3f}]")
            print(f"| {way} | {rank} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
