"""Does `extend` keep a model's head beyond the length that it was trained on?

    python -m benchmarks.studies.extend MODEL --out FILE [--trained 8192] [--lengths 8192,16384]
        [--arms plain,dca,dca:0.05] [--last 1024] [--chunk 1024]

Nats a token of the same last tokens of a text, which is read from further and further back, in
chunks of the prompt: a model that can use a longer context loses nothing by it. `plain` follows the
full plan, `dca` its `extend` as well, with an mscale behind the colon. The last lines are the table
of all rows that FILE holds; a killed run goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy

import hfsparse
from benchmarks.common.journal import Journal, end_in_order
from benchmarks.common.options import numbers
from hfsparse.models.loading import device_name, load
from hfsparse.models.names import cache_name, text_decoder
from hfsparse.plan import ModelId, Plan
from hfsparse.plan.extend import DualChunk
from hfsparse_eval.tasks.haystack import prose, prose_source


@torch.no_grad()
def loss(model, ids: list[int], last: int, chunk: int) -> float:
    """Mean nats of the last tokens of a text, the first of them not counted."""
    decoder, cache = text_decoder(model), None
    states, given = [], torch.tensor([ids], device=model.device)
    for part in given.split(chunk, 1):
        more = {} if cache is None else {cache_name(decoder): cache}
        out = decoder(input_ids=part, use_cache=True, **more)
        states.append(out.last_hidden_state[0])
        states, cache = states[-(-last // chunk) - 1 :], out.past_key_values
    logits = model.lm_head(torch.cat(states)[-last:-1]).float()
    return cross_entropy(logits, given[0, 1 - last :]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trained", type=int, default=8192)
    parser.add_argument("--lengths", type=numbers, default=[8192, 16384])
    parser.add_argument("--arms", default="plain,dca,dca:0.05")
    parser.add_argument("--last", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=1024)
    args = parser.parse_args()
    end_in_order()
    model, tokenizer = load(args.model, dtype="float32")
    text = tokenizer(" ".join(prose()), add_special_tokens=False, verbose=False).input_ids
    made = (
        f"{Path(args.model).name}, the last {args.last:,} of {len(text):,} tokens of "
        f"{prose_source()}, float32, {device_name(model.device)}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    journal, whole = Journal(args.out, made), Plan.full(ModelId.of(model))
    for length in args.lengths:
        for arm in args.arms.split(","):
            kind, _, mscale = arm.partition(":")
            rule = DualChunk(args.trained, mscale=float(mscale or 0)) if kind == "dca" else None

            def run(rule=rule, length=length) -> dict:
                begun = time.perf_counter()
                with hfsparse.patch(model, replace(whole, extend=rule)):
                    nats = loss(model, text[-length:], args.last, args.chunk)
                return {"nats": round(nats, 4), "seconds": round(time.perf_counter() - begun)}

            trained = "" if rule is None else f", trained {args.trained:,}"
            journal.row(f"{length:,} | {arm}{trained}", run)
    print(f"{made}.\n\n| tokens read | arm | nats a token |\n| ---: | --- | ---: |")
    for name, row in journal.rows.items():
        print(f"| {name} | {row.get('nats', row.get('failed'))} |")


if __name__ == "__main__":
    main()
