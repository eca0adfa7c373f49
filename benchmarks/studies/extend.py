"""Does `extend` keep a model's head beyond the length that it was trained on?

    python -m benchmarks.studies.extend MODEL --out FILE [--trained 8192] [--lengths 8192,16384]
        [--arms plain,dca,dca:0.05] [--last 1024] [--chunk 1024]
    python -m benchmarks.studies.extend MODEL --out FILE --texts 24 --trained 32768 …

Nats a token of the same last tokens of a text, which is read from further and further back, in
chunks of the prompt: a model that can use a longer context loses nothing by it. `plain` follows the
full plan, `dca` its `extend` as well, with an mscale behind the colon. With `--texts`, answers
instead: so many texts of each length hide facts, one is asked for at their end (those of
`frontier`), and an answer counts as said if each of its tokens is the model's first choice. The
last lines are the table of all rows that FILE holds; a killed run goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import hfsparse
from benchmarks.common.facts import judge, make_text, read, tail_of
from benchmarks.common.journal import Journal, end_in_order
from benchmarks.common.options import numbers
from hfsparse.models.loading import device_name, load
from hfsparse.models.logits import read_logits
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


@torch.inference_mode()
def answered(model, tokenizer, length: int, texts: int, chunk: int) -> dict:
    """How many of so many answers were said, and nats a token of them all."""
    said, nats = 0, []
    for index in range(texts):
        text, cache = make_text(tokenizer, length, index), DynamicCache()
        wanted = [text.turns[0][1]]
        for part in torch.tensor([text.text], device=model.device).split(chunk, 1):
            hidden = [read(model, part, cache)[:, -1:]]
        for token in tail_of(wanted, model.device)[:, :-1].T[:, None]:
            hidden.append(read(model, token, cache))
        found = judge(read_logits(model, torch.cat(hidden, 1)), wanted)
        said += int(found["said"][0])
        nats.append(float(found["loss"][0]))
    return {"said": said, "texts": texts, "nats": round(sum(nats) / texts, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trained", type=int, default=8192)
    parser.add_argument("--lengths", type=numbers, default=[8192, 16384])
    parser.add_argument("--arms", default="plain,dca,dca:0.05")
    parser.add_argument("--last", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--texts", type=int, help="ask for answers to so many of each length")
    args = parser.parse_args()
    end_in_order()
    model, tokenizer = load(args.model, dtype="auto" if args.texts else "float32")
    text = tokenizer(" ".join(prose()), add_special_tokens=False, verbose=False).input_ids
    what = f"the last {args.last:,} of {len(text):,} tokens of {prose_source()}"
    made = (
        f"{Path(args.model).name}, {'answers' if args.texts else what}, {model.dtype}, "
        f"{device_name(model.device)}, torch {torch.__version__}, "
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
                    if args.texts:
                        found = answered(model, tokenizer, length, args.texts, args.chunk)
                    else:
                        nats = loss(model, text[-length:], args.last, args.chunk)
                        found = {"nats": round(nats, 4)}
                return {**found, "seconds": round(time.perf_counter() - begun)}

            trained = "" if rule is None else f", trained {args.trained:,}"
            journal.row(f"{length:,} | {arm}{trained}", run)
    print(f"{made}.\n\n| tokens read | arm | nats a token | answers |\n| ---: | --- | ---: | --- |")
    for name, row in journal.rows.items():
        said = f"{row['said']} of {row['texts']}" if "said" in row else ""
        print(f"| {name} | {row.get('nats', row.get('failed'))} | {said} |")


if __name__ == "__main__":
    main()
