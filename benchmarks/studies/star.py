"""What does a model lose when ranks read a prompt in the way of Star Attention?

    python -m benchmarks.studies.star MODEL --out DIR [--length 24576] [--first 0] [--texts 48]
        [--blocks 2,4,8] [--anchor part,1024] [--question 128] [--seconds N]
    python -m benchmarks.studies.star --out DIR

One process reads what so many ranks would: each block of a text behind the anchor, by itself, then
the question and the answer over the keys of all blocks (`hfsparse.ContextParallel`, way `star`).
The model is stock, dense in each block: what is lost is the star's. Texts hide facts, one of which
is asked for at the end (those of `frontier`); an answer counts as said if each of its tokens is the
model's first choice. The last lines are the table of all rows that DIR holds, by task; without a
model they are all. A killed run goes on; several may run at once, each of other texts (--first).
Two blocks behind an anchor of their own size read every key, so lose nothing.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache

from benchmarks.common.facts import judge, make_text, read, tail_of
from benchmarks.common.journal import Journal, end_in_order, rows_of
from benchmarks.common.options import numbers
from hfsparse.interval import interval
from hfsparse.models.loading import device_name, load
from hfsparse.models.logits import read_logits
from hfsparse.models.names import cache_name, text_decoder
from hfsparse.runtime.parts import share_as_star

UNIT = 128  # tokens that no block divides
EXACT = "exact"


class Star(NamedTuple):
    """As a rank is told of its group."""

    ranks: int
    question: int
    anchor: int | None

    def __str__(self) -> str:
        return f"{self.ranks} blocks, anchor {'a block' if self.anchor is None else self.anchor}"


def read_star(model, ids: Tensor, star: Star) -> tuple[Tensor, Cache]:
    """Hidden states of the question `[1, n, hidden]`, and the keys of all blocks and of it."""
    decoder, cache = text_decoder(model), DynamicCache()
    parts = share_as_star(ids.shape[1], UNIT, star)
    for runs in parts.read:
        at = torch.cat([torch.arange(*run, device=ids.device) for run in runs])
        alone = DynamicCache()
        given = {cache_name(decoder): alone, "position_ids": at[None], "use_cache": True}
        decoder(input_ids=ids[:, at], **given)
        start, end = runs[-1]
        for index, layer in enumerate(alone.layers):
            own = (t[:, :, t.shape[2] - (end - start) :] for t in (layer.keys, layer.values))
            cache.update(*own, index)
    return read(model, ids[:, parts.tokens :], cache), cache


@torch.inference_mode()
def answered(model, text, star: Star | None) -> dict:
    """Whether the answer was said, and its nats a token."""
    ids, value = torch.tensor([text.text], device=model.device), [text.turns[0][1]]
    if star is None:
        cache = DynamicCache()
        hidden = read(model, ids, cache)
    else:
        hidden, cache = read_star(model, ids, star)
    hidden = [hidden[:, -1:]]
    for token in tail_of(value, model.device)[:, :-1].T[:, None]:
        hidden.append(read(model, token, cache))
    found = judge(read_logits(model, torch.cat(hidden, 1)), value)
    return {"said": int(found["said"][0]), "nats": round(float(found["loss"][0]), 4)}


def table(folder: Path) -> str:
    """By task and of all: answers said under each arm, and nats a token lost against exact."""
    rows, tasks = rows_of(folder), defaultdict(list)
    if not rows:
        return "nothing was asked yet"
    arms = [arm for arm in next(iter(rows.values())) if arm != "task"]
    for row in rows.values():
        tasks[row["task"]].append(row)
        tasks["all"].append(row)
    tasks["all"] = tasks.pop("all", [])
    lines = [f"| task | texts | {' | '.join(arms)} |", f"| --- | ---: |{' --- |' * len(arms)}"]
    for task, found in tasks.items():
        cells = []
        for arm in arms:
            lost = [row[arm]["nats"] - row[EXACT]["nats"] for row in found]
            cell = f"{sum(row[arm]['said'] for row in found)} said"
            if arm != EXACT and len(lost) > 1:
                low, high = interval(lost)
                cell += f", {sum(lost) / len(lost):+.3f} nats ({low:+.3f} to {high:+.3f})"
            cells.append(cell)
        lines.append(f"| {task} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=24576)
    parser.add_argument("--first", type=int, default=0, help="text that this process begins with")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--blocks", type=numbers, default=[2, 4, 8])
    parser.add_argument("--anchor", default="part,1024")
    parser.add_argument("--question", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no text behind these")
    args = parser.parse_args()
    if args.model is None:
        return print(table(args.out))
    end_in_order()
    begun = time.perf_counter()
    model, tokenizer = load(args.model)
    anchors = [None if anchor == "part" else int(anchor) for anchor in args.anchor.split(",")]
    stars = [Star(n, args.question, anchor) for n in args.blocks for anchor in anchors]
    arms = {EXACT: None, **{f"{star}": star for star in stars}}
    made = (
        f"{Path(args.model).name}, {args.length:,} tokens, the last {args.question} read all, "
        f"{model.dtype}, {device_name(model.device)}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    journal = Journal(args.out / f"{args.first}.jsonl", made)
    for index in range(args.first, args.first + args.texts):
        if time.perf_counter() - begun > args.seconds:
            break

        def run(index: int = index) -> dict:
            text = make_text(tokenizer, args.length, index)
            return {"task": text.task} | {arm: answered(model, text, x) for arm, x in arms.items()}

        journal.row(f"{index}", run)
    print(f"{made}.\n\n{table(args.out)}")


if __name__ == "__main__":
    main()
