"""How much attention do patterns keep, beside skip-softmax as an oracle that sees every score?

    python -m benchmarks.recall MODEL [--length 8192] [--prompts 1] [--write FILE]

Every q head of every layer, dense forward passes over retrieval prompts (the profiler's). Skip-
softmax (BLASST, arXiv 2512.12087) computes each tile's scores before it drops the tile: what it
keeps is what a pattern should find without looking. Block density counts what a prompt computes;
recall is the share of the exact attention's mass that is kept, over all rows and over the last
block's, which ask the question. Rows of every `--stride`th query block are looked at.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from torch import Tensor

import hfsparse
from hfsparse.lists import Grid
from hfsparse.models.loading import load
from hfsparse.models.names import text_decoder
from hfsparse.patterns import PATTERNS
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.runtime.layer_plan import observed
from hfsparse_eval.run.machine import processor

BLOCK = 128
SKIPS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)  # nats


def arms(length: int) -> dict[str, object]:
    """Patterns at about the densities that skipping leaves, others as they come, by row title."""
    made: dict[str, object] = {}
    for share in (0.05, 0.1, 0.2, 0.35):
        made[f"block_topk share {share:g}"] = BlockTopK(share, min_blocks=2)
        columns, diagonals = round(length * share * 0.6), round(length * share * 0.2)
        made[f"vertical_slash {columns}x{diagonals}"] = VerticalSlash(columns, diagonals)
        recent = round(length * share * 0.5)
        made[f"streaming 64+{recent}"] = Streaming(64, recent)
    for tau in (0.8, 0.9, 0.95, 0.98):
        made[f"antidiagonal tau {tau:g}"] = Antidiagonal(tau, max_share=1.0)
    known = {pattern.kind for pattern in made.values()}
    return made | {
        f"{kind}, defaults": cls() for kind, cls in PATTERNS.items() if kind not in known
    }


def kept_by_skipping(scores: Tensor, diagonal: int, skip: float) -> Tensor:
    """Tiles kept, bool [nk]: scores [rows, nk * BLOCK] of a query block, -inf where unseen.

    As in the kernel, the block on the diagonal is read first and the others in order; a tile is
    kept if in any of its rows it reaches the running maximum less `skip`.
    """
    high = scores.unflatten(1, (-1, BLOCK)).amax(2)  # [rows, nk]
    kept = torch.zeros(high.shape[1], dtype=torch.bool, device=scores.device)
    kept[diagonal], top = True, high[:, diagonal]
    for j in range(diagonal):
        if bool((high[:, j] >= top - skip).any()):
            kept[j], top = True, torch.maximum(top, high[:, j])
    return kept


def row(recall: Tensor, last: float, kept: float = 0.0, seen: float = 0.0) -> Tensor:
    """[6] to add up: recall and weight, the same of last blocks, blocks kept and seen."""
    share = float(recall.mean())
    return torch.tensor([share, 1, share * last, last, kept, seen], dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    model, tokenizer = load(given.model, "auto", "auto")
    patterns = arms(given.length)
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros(6, dtype=torch.float64))

    def observe(module, q: Tensor, k: Tensor, v: Tensor, logits) -> None:
        length, group = q.shape[2], q.shape[1] // k.shape[1]
        grid = Grid.causal(1, length, BLOCK, q.device)
        seen = float(grid.blocks()[0])
        at = torch.arange(grid.nk * BLOCK, device=q.device)
        for head in range(q.shape[1]):
            own, keys = q[:, head : head + 1], k[:, head // group : head // group + 1]
            lists = {name: p.lists(own, keys, grid, logits.scale) for name, p in patterns.items()}
            padded = torch.nn.functional.pad(keys[0, 0], (0, 0, 0, len(at) - length)).float()
            for i in range(grid.nq - 1, -1, -given.stride):
                rows = torch.arange(i * BLOCK, min((i + 1) * BLOCK, length), device=q.device)
                scores = own[0, 0, rows].float() @ padded.T * logits.scale
                scores = scores.masked_fill(at > rows[:, None], -torch.inf)
                mass = torch.softmax(scores, 1)
                last = float(i == grid.nq - 1)
                by_block = mass.unflatten(1, (-1, BLOCK)).sum(2)
                for skip in SKIPS:
                    kept = kept_by_skipping(scores, i, skip)
                    number = float(kept.sum())
                    recall, name = by_block[:, kept].sum(1), f"skip-softmax {skip:g} nats"
                    totals[name] += row(recall, last, number, i + 1)
                for name, found in lists.items():
                    recall = (mass[:, :length] * found.mask(rows)[0, 0]).sum(1)
                    totals[name] += row(recall, last)
            for name, found in lists.items():
                totals[name][4:] += torch.tensor([float(found.blocks()), seen])

    prompts = make_prompts(tokenizer, given.length, given.prompts, 0, None)
    with hfsparse.patch(model), observed(model, observe), torch.inference_mode():
        for prompt in prompts:
            text_decoder(model)(input_ids=prompt.ids.to(model.device), use_cache=False)
    text = report(given, totals)
    print(text)
    if given.write:
        given.write.write_text(text, encoding="utf-8")


def report(given, totals: dict[str, Tensor]) -> str:
    lines = [
        f"{Path(given.model).name}, prompts: {given.prompts} of {given.length:,} tokens, blocks of "
        f"{BLOCK}, every {given.stride}th query block; mean over all q heads. {processor()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        "| what | block density | recall | recall, last block |",
        "| --- | --- | --- | --- |",
    ]
    for name, (recall, n, last, m, kept, seen) in totals.items():
        lines.append(f"| {name} | {kept / seen:.3f} | {recall / n:.3f} | {last / m:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
