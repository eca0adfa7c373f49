"""Do our RULER tasks score a model as those of lm-evaluation-harness do?

    pip install 'lm-eval[ruler]>=0.4.13'
    python -m benchmarks.studies.agreement MODEL [--length 1024] [--samples 32]
                                                 --keep FILE --write FILE

Both make samples of their own, of the eleven tasks that need no data, and the model answers them
greedily; ours are as long as theirs. A difference of the two means beyond its 95 % interval is a
finding. Each --check'th prompt of theirs also goes through our generation and scorer, which has to
give the same score. Nothing is downloaded: their essays are replaced by our prose, their sentence
splitter by ours.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from math import sqrt
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import norm

from benchmarks.common.journal import Journal
from hfsparse.models.loading import load
from hfsparse.models.weights import weights_mark
from hfsparse_eval.run.generate import answer
from hfsparse_eval.run.machine import processor
from hfsparse_eval.run.prompter import Prompter, Sample
from hfsparse_eval.run.samples import Suite
from hfsparse_eval.tasks import TASKS, of_suite
from hfsparse_eval.tasks.haystack import prose, prose_source, split_sentences
from hfsparse_eval.tasks.scores import score
from hfsparse_eval.tasks.word_counting import CommonWords

NO_DATA = [name for name, task in of_suite("ruler").items() if task.ruler][:11]
THEIRS = {name: name if name.startswith("niah") else f"ruler_{name}" for name in NO_DATA}


ZERO_SHOT = CommonWords(example=None)  # as the harness asks cwe: the prompt shows no example


@contextmanager
def offline():
    """The harness's RULER without its downloads."""
    with patch("nltk.data.find"):
        from lm_eval.tasks.ruler import prepare_niah
    theirs = prepare_niah.get_haystack

    def haystack(type_haystack):
        if type_haystack == "essay":
            return " ".join(prose()).split()
        return theirs(type_haystack)

    with (
        patch.object(prepare_niah, "get_haystack", haystack),
        patch.object(prepare_niah, "cached_sent_tokenize", split_sentences),
        patch("lm_eval.evaluator.add_env_info", lambda results: None),
    ):
        yield


def by_the_harness(model, tokenizer, name: str, options) -> list[dict]:
    """Prompt, answers, output and score of each of their samples."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch),
        tasks=[THEIRS[name]],
        limit=options.samples,
        metadata={"pretrained": options.model, "max_seq_lengths": [options.length]},
        gen_kwargs={"max_gen_toks": min(options.cap, TASKS[name].new_tokens)},
        bootstrap_iters=0,
    )
    return [
        {
            "prompt": sample["arguments"][0][0],
            "answers": sample["doc"]["outputs"],
            "output": sample["resps"][0][0],
            "score": sample[str(options.length)],
        }
        for sample in found["samples"][THEIRS[name]]
    ]


def compare(model, tokenizer, name: str, options) -> dict:
    """Scores of both on samples of their own, and of ours on theirs."""
    theirs = by_the_harness(model, tokenizer, name, options)
    task = ZERO_SHOT if name == "cwe" else TASKS[name]
    tokens = round(np.mean([len(tokenizer(said["prompt"]).input_ids) for said in theirs]))
    length = tokens + task.new_tokens  # prompts as long as theirs
    suite = Suite([task], [length], options.samples, Prompter(tokenizer, "never"))

    def ours(sample: Sample) -> float:
        return score(answer(model, tokenizer, sample, options.cap).text, sample.answers)

    samples = [suite.sample(case) for case in suite.cases]
    checked = [
        (
            said["score"],
            ours(replace(samples[0], ids=ids, answers=tuple(said["answers"]))),
        )
        for said in theirs[:: options.check]
        if (ids := tuple(tokenizer(said["prompt"]).input_ids))
    ]
    return {
        "theirs": [said["score"] for said in theirs],
        "ours": [ours(sample) for sample in samples],
        "checked": checked,
        "tokens": [tokens, round(np.mean([len(sample.ids) for sample in samples]))],
    }


def difference(found: dict) -> tuple[float, float]:
    """Ours minus theirs in points, and half of its 95 % interval."""
    ours, theirs = (100 * np.array(found[side]) for side in ("ours", "theirs"))
    half = norm.ppf(0.975) * sqrt(sum(a.var(ddof=1) / len(a) for a in (ours, theirs)))
    return ours.mean() - theirs.mean(), half


def within(found: dict) -> bool:
    middle, half = difference(found)
    return abs(middle) <= half


def row(name: str, found: dict) -> str:
    ours, theirs = (100 * np.mean(found[side]) for side in ("ours", "theirs"))
    middle, half = difference(found)
    same = sum(a == b for a, b in found["checked"])
    cells = [name, f"{len(found['ours'])}", f"{theirs:.1f}", f"{ours:.1f}"]
    cells += [f"{middle:+.1f} ± {half:.1f}", "yes" if within(found) else "no"]
    cells += [f"{same} of {len(found['checked'])}", "{} / {}".format(*found["tokens"])]
    return f"| {' | '.join(cells)} |"


def page(rows: dict[str, dict], options, model) -> str:
    sides = "ours", "theirs", "checked"
    outside = [name for name, found in rows.items() if not within(found)]
    every = {side: [*chain.from_iterable(r[side] for r in rows.values())] for side in sides}
    every["tokens"] = [round(np.mean([r["tokens"][i] for r in rows.values()])) for i in (0, 1)]
    head = "task|n|lm-eval|hfsparse|difference ± 95 %|within|same score on their prompts|tokens l/h"
    body = [row(name, found) for name, found in rows.items()]
    table = ["| " + head.replace("|", " | ") + " |", "|" + " --- |" * 8, *body, row("all", every)]
    return f"""# Agreement with lm-evaluation-harness

Script: `benchmarks/studies/agreement.py`. RULER's tasks that need no data, by lm-eval \
{version("lm_eval")} and by `hfsparse eval`, each on samples of its own; \
{Path(options.model).name}, {str(model.dtype)[6:]}, {options.length} tokens, at most \
{options.cap} new ones, no chat template, greedy. Means in percent.

{chr(10).join(table)}

- Not in the table: {", ".join(name for name in THEIRS if name not in rows) or "none"}.
- Within: whether the difference lies inside its 95 % interval. {len(outside)} of {len(rows)} lie \
outside ({", ".join(outside) or "none"}); about one in twenty would by chance. In the last row \
differences of both signs cancel.
- Same score on their prompts: each {options.check}th prompt of the harness, answered and scored \
by ours. Ours ran alone and theirs in batches of {options.batch}: whether rounding explains what \
differs was not tested.
- The harness downloads its essays and its sentence splitter; here both used our prose \
({prose_source()}) and our splitter. Its qa_1 and qa_2 need SQuAD and HotpotQA: not run.
- Its prompts of {options.length} tokens are shorter than that: its haystacks grow in larger \
steps, and cwe's leave room for an example that is not shown. Ours are made about as long as its \
are on average (tokens l/h).
- cwe is asked without a solved example, as the harness does; `hfsparse eval` shows one, as RULER.

{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, \
transformers {version("transformers")}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument("--tasks", default=",".join(THEIRS), help="by commas; or all eleven")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=32, help="of each task, on each side")
    parser.add_argument("--cap", type=int, default=48, help="new tokens at most, for both")
    parser.add_argument("--batch", type=int, default=8, help="of the harness")
    parser.add_argument("--check", type=int, default=8, help="each how manieth prompt of theirs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", type=Path, help="journal: a job that was killed goes on")
    parser.add_argument("--write", type=Path, help="the page")
    options = parser.parse_args()
    model, tokenizer = load(options.model, "cpu", options.dtype)
    asked = {k: v for k, v in vars(options).items() if k not in ("model", "keep", "write", "tasks")}
    journal = Journal(options.keep, f"{weights_mark(model)} {asked}")
    with offline():
        rows = {
            name: journal.row(name, lambda name=name: compare(model, tokenizer, name, options))
            for name in options.tasks.split(",")
        }
    text = page({name: found for name, found in rows.items() if "ours" in found}, options, model)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
