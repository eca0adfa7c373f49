"""Run a suite on a model, dense and under other arms, on identical token ids."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby

from hfsparse.errors import UsageError
from hfsparse.progress import Bar
from hfsparse_eval.arms import Arm
from hfsparse_eval.run.generate import answer, together
from hfsparse_eval.run.machine import device_name
from hfsparse_eval.run.prompter import Sample
from hfsparse_eval.run.results import Results
from hfsparse_eval.run.samples import Case, Suite

MEASURED = ("pair_density", "block_density", "decode_share", "cache_share")


def run(
    model,
    tokenizer,
    suite: Suite,
    results: Results,
    arms: Sequence[Arm] = (),
    cap: int | None = None,
    batch: int = 1,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Fill `results` with what it lacks: a length at a time, dense first, then under each arm.

    batch: samples that run together, of one task and length. share (i, n): only each n-th case
    from the i-th on. An arm that fails at a length is noted as failed and left there; the next
    goes on.
    """
    first, step = share
    cases = suite.cases[first::step]
    rounds = [
        (arm, todo)
        for length in dict.fromkeys(case.length for case in cases)
        for arm in (Arm(), *arms)
        if (todo := [c for c in cases if c.length == length and not done(c, arm, results)])
    ]
    for arm in dict.fromkeys(arm for arm, _ in rounds):
        arm.prepare(tokenizer, {case.length for case in suite.cases})  # alike in all processes
    with Bar() as shown:
        total = sum(case.length for _, todo in rounds for case in todo)
        bar = shown.add_task("", total=total, left=sum(len(todo) for _, todo in rounds))
        for arm, todo in rounds:
            at = todo[0]
            try:
                with arm.on(model) as handle:
                    for group in _groups(todo, batch if arm.batches else 1):
                        at = group[0]
                        shown.update(bar, description=f"{at.id} {arm.title}")
                        samples = [suite.sample(case) for case in group]
                        for line in _measure(model, tokenizer, samples, results, arm, handle, cap):
                            results.append(line)
                        shown.update(bar, advance=sum(case.length for case in group))
            except UsageError:
                raise
            except Exception as error:
                traceback.print_exception(error)
                results.append(_failed(model, at, results, arm, error))


def _measure(model, tokenizer, samples: Sequence[Sample], results, arm, handle, cap) -> list[dict]:
    """A line for each of these samples, which run together; densities are of all of them."""
    if handle:
        arm.ask(samples[0])
        handle.reset_stats()
    if len(samples) == 1:
        said = [answer(model, tokenizer, samples[0], cap)]
    else:
        said = together(model, tokenizer, samples, cap)
    measured = densities(handle)
    return [
        {
            **about(model, sample, results, arm),
            "score": one.score,
            "answers": sample.answers,
            "output": one.text,
            "gold": sample.gold,
            "metric": sample.metric,
            "real": sample.real,
            "prompt_tokens": len(sample.ids) + sum(len(turn.ids) for turn in sample.turns),
            "new_tokens": one.new_tokens,
            "seconds": one.seconds,
            "first_token_seconds": one.first_token_seconds,
            "batch": len(samples),
            **measured,
            **one.more,
        }
        for sample, one in zip(samples, said, strict=True)
    ]


def by_case(
    model,
    cases: Sequence,
    results: Results,
    arms: Sequence[Arm],
    look: Callable,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Fill `results` with what it lacks, a case at a time: dense first, then under each arm.

    look(case, arms): reads what these arms share; it gives what tells, of an arm that is on, the
    fields of its line. Where that fails the next case goes on.
    """
    first, step = share
    left = [(c, [a for a in (Arm(), *arms) if not done(c, a, results)]) for c in cases[first::step]]
    left = [(case, todo) for case, todo in left if todo]
    with Bar() as shown:
        bar = shown.add_task("", total=sum(case.length for case, _ in left))
        for case, todo in left:
            arm = todo[0]
            try:
                shown.update(bar, description=case.id)
                tell = look(case, todo)
                for arm in todo:
                    shown.update(bar, description=f"{case.id} {arm.title}")
                    with arm.on(model) as handle:
                        if handle:
                            handle.reset_stats()
                        told = tell(arm) | densities(handle)
                    results.append(about(model, case, results, arm) | told)
            except UsageError:
                raise
            except Exception as error:
                traceback.print_exception(error)
                results.append(_failed(model, case, results, arm, error))
            shown.update(bar, advance=case.length)


def about(model, sample, results, arm) -> dict:
    """Which sample, under what, where."""
    return {
        "id": sample.id,
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "arm": arm.name,
        "plan": arm.hash,
        "model": results.settings.fingerprint,
        "transformers": version("transformers"),
        "device": device_name(model.device),
    }


def _failed(model, case, results, arm, error: Exception) -> dict:
    told = " ".join(f"{type(error).__name__}: {error}".split())
    return {**about(model, case, results, arm), "failed": told[:500]}


def done(case, arm: Arm, results: Results) -> bool:
    rest = (arm.name, arm.hash, results.settings.fingerprint, version("transformers"))
    return (case.id, *rest) in results.done


def _groups(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    """What runs together is of one task, so that densities and times are."""
    for _, same in groupby(cases, lambda case: case.task):
        same = list(same)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def densities(handle) -> dict:
    """What the arm measured since the last reset; None of everything for the dense model."""
    stats = handle.stats() if handle else None
    measured = {name: number(stats, name) for name in MEASURED}
    return measured | {"kv_bytes": getattr(stats, "kv_bytes", None)}


def number(stats, name: str) -> float | None:
    """What was measured; None where nothing ran, as NaN is no JSON."""
    value = getattr(stats, name, math.nan)
    return None if math.isnan(value) else round(value, 6)
