"""Would queries of a window choose pages better than a step's own query does?

    python -m benchmarks.studies.window_queries MODEL [--length 4096] [--prompts 4] [--seed 0]

The table has how many of the pages are found that a prompt's last query attends to most: by the
query itself, and by probes of ActQKV's kind, queries of a window added up, each channel weighted by
its squared distance from the mean of the row's queries over their variance. Pages are ranked by
their best key or by quest's bounds; of a group's heads the largest softmax over pages counts. Means
over kv heads of all layers and prompts, with their 95 % interval over prompts.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from hfsparse.interval import interval
from hfsparse.lists import PAGE
from hfsparse.models.loading import load
from hfsparse.profiler.measure.capture import Given, forward
from hfsparse.profiler.prompts.calibration import make_prompts

WINDOWS = (8, 32, 64)  # queries
PROBES = ("the query", *(f"{n} queries" for n in WINDOWS))
PARTS = (0.06, 0.12)  # of the pages


def probes(q: Tensor) -> dict[str, Tensor]:
    """What stands for the last query of q `[Hq, L, D]`, by name, `[Hq, D]`."""
    mean, variance = q.mean(1, keepdim=True), q.var(1, keepdim=True)
    found = [q[:, -1]]
    for n in WINDOWS:
        weight = (q[:, -n:] - mean).square() / variance
        found.append((weight * q[:, -n:]).sum(1) / weight.sum(1))
    return dict(zip(PROBES, found, strict=True))


def best_pages(score: Tensor, heads: int, part: float) -> Tensor:
    """The best pages `[heads, n]` by scores in nats `[Hq, P]`."""
    votes = score.softmax(-1).unflatten(0, (heads, -1)).amax(1)
    return votes.topk(max(1, round(part * score.shape[1])), -1).indices


def find_pages(given: Given) -> dict[str, np.ndarray]:
    """Of one layer, the share of the best pages `[heads]` that each probe finds."""
    heads, length, dim = given.k.shape[1:]
    whole, group = length // PAGE * PAGE, given.q.shape[1] // heads
    q, k = (t[0, :, :whole].float() for t in (given.q, given.k))
    pages = k.repeat_interleave(group, 0).unflatten(1, (-1, PAGE))  # [Hq, P, PAGE, D]
    low, high = pages.amin(2), pages.amax(2)

    def products(probe: Tensor) -> Tensor:
        return torch.einsum("hpsd,hd->hps", pages, probe) * dim**-0.5

    attended, found = products(q[:, -1]).logsumexp(-1), {}
    for name, probe in probes(q).items():
        bounds = torch.maximum(low * probe[:, None], high * probe[:, None]).sum(-1) * dim**-0.5
        for by, rank in (("best key", products(probe).amax(-1)), ("bounds", bounds)):
            for part in PARTS:
                true, said = (best_pages(each, heads, part) for each in (attended, rank))
                same = (true[:, :, None] == said[:, None]).any(-1).float().mean(-1)
                found[f"{name}, {by}, {part:g}"] = same.numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load(args.model, "cpu", "float32")
    prompts = make_prompts(tokenizer, args.length, args.prompts, args.seed)
    found = [forward(model, prompt.ids, find_pages) for prompt in prompts]
    print("| probe | pages ranked by | " + " | ".join(f"{part:.0%}" for part in PARTS) + " |")
    print("| --- | --- |" + " --- |" * len(PARTS))
    for name in PROBES:
        for by in ("best key", "bounds"):
            cells = []
            for part in PARTS:
                key = f"{name}, {by}, {part:g}"
                each = [float(np.mean([layer[key] for layer in layers])) for layers in found]
                low, high = interval(each)
                cells.append(f"{np.mean(each):.2f} [{low:.2f}, {high:.2f}]")
            print(f"| {name} | {by} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
