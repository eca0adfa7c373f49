"""Answers over caches in fewer bits: RULER's tasks, each prompt read once for all bits of a plan.

    python -m benchmarks.studies.bits_answers MODEL --out DIR [--plan QUARTER]
        [--lengths 4096,8192,16384,32768] [--tasks …] [--bits 8,4] [--arms dense quarter]
        [--beside PLAN …] [--outliers] [--samples 50] [--batch 25] [--seed 0] [--seconds 200]
    python -m benchmarks.studies.bits_answers --out DIR

A plan says how prompts are read, and what is kept; bits change only the latter. So the prompt but
its last token is read under the plan alone, and its keys and values are put into a cache of each
arm; greedy answers follow, scored as `hfsparse eval ruler` scores them. Arms are the dense model
with every key in 16 bits and in --bits, and --plan as it is, in 4 bits, and as --beside keeps it;
--arms names one of the two groups. With --outliers the model is the same function with channels of
keys up to 30 times as large. --samples is of each task at each length. The last lines are the table
of all that DIR holds, points that an arm lost on the same samples; without a model they are all.
When --seconds are over it ends after the batch; start it again and it goes on. Several may run at
once, each of other lengths.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import hfsparse
from benchmarks.common.coded import outliers
from benchmarks.common.journal import Journal, end_in_order, rows_of
from benchmarks.common.options import numbers
from benchmarks.common.shapes import tidy
from hfsparse.interval import interval
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.packed import BITS, Bits, said
from hfsparse.models.loading import device_name, load
from hfsparse.models.names import text_decoder
from hfsparse.patcher.adopt import adopt
from hfsparse.plan import ModelId, Plan
from hfsparse.plan.sources import open_plan
from hfsparse.runtime.layer_plan import observed
from hfsparse_eval.run.generate import together
from hfsparse_eval.run.prompter import Prompter, Sample
from hfsparse_eval.run.samples import Case, Maker
from hfsparse_eval.tasks import TASKS

DENSE, QUARTER = "dense", "a quarter full"
GROUPS = {"dense": DENSE, "quarter": QUARTER}  # by --arms: the arm whose plan prompts are read by
ROOM = 160  # tokens of an answer, at most: RULER asks for 128


def arms_of(model, among: list[Bits], plan: str | None, beside: list[str]) -> dict:
    """By the plan that prompts are read by: arms, and what they keep."""
    whole = Plan.full(ModelId.of(model))
    made = {DENSE: {DENSE: whole}}
    made[DENSE] |= {said(bits): whole.with_bits(bits, model) for bits in among}
    if plan is not None:
        given = open_plan(plan)
        made[QUARTER] = {QUARTER: given, f"{QUARTER}, 4 bits": given.with_bits(4, model)}
        made[QUARTER] |= {f"{QUARTER}, {Path(each).stem}": open_plan(each) for each in beside}
    return made


@torch.no_grad()
def stretch(model) -> None:
    """Times keys' channels and divides queries' by as much (`outliers`): weights have neither a
    bias nor a norm behind them. In 16 bits they are rounded anew."""
    this = ModelId.of(model)
    times = outliers((this.layers, this.kv_heads, this.head_dim))
    for layer, by in zip(text_decoder(model).layers, times, strict=True):
        for weight, scale in (
            (layer.self_attn.k_proj.weight, by),
            (layer.self_attn.q_proj.weight, 1 / by),
        ):
            scale = scale.flatten(1).to(weight.device)  # [Hkv, D]
            group = weight.shape[0] // scale.numel()
            rows = scale.repeat_interleave(group, 0).reshape(-1, 1)
            weight.copy_(weight.float() * rows)


@torch.inference_mode()
def read(model, plan: Plan, samples: list[Sample]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[B, H, S, D]` of each layer, of the prompts but their last tokens, as the
    plan reads them; each prompt begins at its row's first slot."""
    made: list[tuple[Tensor, Tensor]] = []
    width = max(len(sample.ids) for sample in samples) - 1
    with hfsparse.patch(model, plan):
        for row, sample in enumerate(samples):

            def keep(module, q, k, v, logits, row=row) -> None:
                if module.layer_idx == len(made):
                    shape = len(samples), k.shape[1], width
                    made.append(tuple(t.new_zeros(*shape, t.shape[3]) for t in (k, v)))
                for held, t in zip(made[module.layer_idx], (k, v), strict=True):
                    held[row, :, : t.shape[2]] = t[0]

            ids = torch.tensor([sample.ids[:-1]], device=model.device)
            with observed(model, keep):
                text_decoder(model)(input_ids=ids, use_cache=False)
    return made


def filled(model, keys: list[tuple[Tensor, Tensor]], samples: list[Sample]) -> DynamicCache:
    """A cache of the patch that is on the model, with what was read before."""
    rows, width = [len(sample.ids) - 1 for sample in samples], keys[0][0].shape[2]
    cache, lengths = DynamicCache(), Lengths([0] * len(rows), rows, width)
    adopt(cache, text_decoder(model), reserve=width + ROOM)
    with torch.inference_mode(False), torch.no_grad():
        for layer, (k, v) in zip(cache.layers, keys, strict=True):
            layer.lazy_initialization(k, v)
            for store in layer.stores:
                at = list(store.group.heads)
                store.append(k[:, at], v[:, at], lengths)
            layer.rows, layer.seen, layer.stored = rows, width, width
    return cache


def batches(tokenizer, given, done) -> Iterator[tuple[str, list[Future]]]:
    """Names and samples: a batch of each task at each length, and again until there are enough, but
    for those that are done.

    They are made beside the GPU's work, the next while it has one.
    """
    prompter = Prompter(tokenizer)
    with ThreadPoolExecutor() as pool:
        units = [(length, name) for length in given.lengths for name in given.tasks]
        makers = {
            unit: pool.submit(Maker, TASKS[unit[1]], unit[0], prompter, given.seed)
            for unit in units
        }

        def made(length: int, name: str, index: int) -> Sample:
            return makers[length, name].result().sample(Case(name, length, None, index))

        whole = []
        for first in range(0, given.samples, given.batch):
            at = range(first, min(first + given.batch, given.samples))
            whole += [(f"{name}/{n}/{at.start}-{at.stop}", n, name, at) for n, name in units]
        ahead = []
        try:
            for name, *unit, at in whole:
                if done(name):
                    continue
                ahead.append((name, [pool.submit(made, *unit, i) for i in at]))
                if len(ahead) > 2:
                    yield ahead.pop(0)
            yield from ahead
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def ask(model, tokenizer, journals: dict[str, Journal], arms, given) -> None:
    begun, last = time.perf_counter(), [arm for group in arms.values() for arm in group][-1]

    def done(name: str) -> bool:
        return f"{last}|{name}" in journals[name.split("/")[1]].rows

    for name, futures in batches(tokenizer, given, done):
        if time.perf_counter() - begun > given.seconds:
            return print("out of time: start this again, it goes on", flush=True)
        samples, told = [future.result() for future in futures], []
        journal = journals[name.split("/")[1]]
        for read_by, group in arms.items():
            start = time.perf_counter()
            keys = read(model, group[read_by], samples)
            told.append(f"read {time.perf_counter() - start:.1f}")
            for arm, plan in group.items():
                start = time.perf_counter()
                with hfsparse.patch(model, plan) as handle:
                    cache = filled(model, keys, samples)
                    found = together(model, tokenizer, samples, cache=cache)
                    stats = handle.stats()
                scores = [each.score for each in found]
                seconds = time.perf_counter() - start
                journal.add(f"{arm}|{name}", scores=scores, share=round(stats.cache_share, 4))
                told.append(f"{arm} {np.mean(scores):.3f} in {seconds:.1f}")
                del cache
                tidy()
            del keys
        print(f"{time.perf_counter() - begun:.0f} s: {name}: {'; '.join(told)}", flush=True)


def table(folder: Path) -> str:
    """Markdown: by arm and length, points lost on the same samples."""
    rows = rows_of(folder)
    if not rows:
        return "nothing was asked yet"
    found: dict[str, dict[str, list[float]]] = defaultdict(dict)
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, row in rows.items():
        arm, batch = name.split("|")
        found[arm][batch] = row["scores"]
        shares[arm, batch.split("/")[1]].append(row["share"])
    lengths = sorted({length for _, length in shares}, key=int)
    heads = [f"{int(n):,}: score | lost" for n in lengths]
    lines = [f"| arm | bytes at {int(lengths[-1]):,} | {' | '.join(heads)} | all: lost, n |"]
    lines.append("| --- |" + " ---: |" * (2 * len(lengths) + 2))
    for arm, batches in found.items():
        beside = found.get(QUARTER if arm.startswith(f"{QUARTER}, ") else DENSE, {})
        cells = [f"{np.mean(shares[arm, lengths[-1]] or [np.nan]):.3f}"]
        for length in (*lengths, ""):
            own = [each for each in batches if length in (each.split("/")[1], "")]
            if not own:
                cells += ["", ""]
                continue
            score = f"{100 * np.concatenate([batches[each] for each in own]).mean():.1f}"
            both = [each for each in own if each in beside]
            if not both:
                cells += [score, ""] if length else [""]
                continue
            mine, other = (np.concatenate([t[each] for each in both]) for t in (batches, beside))
            lost = 100 * (other - mine)
            low, high = interval(lost, worst=100.0)
            told = f"{lost.mean():.2f} [{low:.2f}, {high:.2f}]"
            cells += [score, told] if length else [f"{told}, {len(lost)}"]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", help="of which a quarter of the kv heads is full")
    parser.add_argument("--lengths", type=numbers, default=[4096, 8192, 16384, 32768])
    parser.add_argument(
        "--tasks",
        type=lambda text: text.split(","),
        default=["niah_multikey_2", "niah_multikey_3", "niah_multiquery", "vt"],
    )
    parser.add_argument(
        "--bits",
        type=lambda text: [each for each in BITS[1:] if str(each) in text.split(",")],
        default=BITS[1:],
    )
    parser.add_argument("--arms", nargs="+", choices=GROUPS, default=[*GROUPS])
    parser.add_argument(
        "--beside", nargs="+", default=[], help="plans that keep otherwise what --plan reads"
    )
    parser.add_argument("--outliers", action="store_true", help="channels up to 30 times as large")
    parser.add_argument("--samples", type=int, default=50, help="of each task at each length")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=200)
    given = parser.parse_args()
    if given.model is None:
        return print(table(given.out))
    end_in_order()
    model, tokenizer = load(given.model, "auto", "auto")
    if given.outliers:
        stretch(model)
    arms = arms_of(model, given.bits, given.plan, given.beside)
    arms = {name: arms[name] for name in map(GROUPS.get, given.arms) if name in arms}
    if not arms:
        parser.error("--arms quarter alone was given; it is of a --plan: give that, too")
    made = (
        f"{Path(given.model).name}{', outliers' * given.outliers}, {model.dtype}, "
        f"seed {given.seed}; {device_name(model.device)}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    journals = {f"{n}": Journal(given.out / f"{n}.jsonl", made) for n in given.lengths}
    try:
        ask(model, tokenizer, journals, arms, given)
    finally:
        print(f"{made}\n\n{table(given.out)}")


if __name__ == "__main__":
    main()
