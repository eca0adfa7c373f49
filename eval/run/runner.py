"""Run a suite on a model, dense and under other arms, on identical token ids."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby

from hfsparse.errors import UsageError
from hfsparse.progress import Bar
from hfsparse_eval.arms import Arm, Dense, Meter
from hfsparse_eval.run.generate import answer, together
from hfsparse_eval.run.machine import device_name
from hfsparse_eval.run.prompter import Sample
from hfsparse_eval.run.results import Results
from hfsparse_eval.run.samples import Case, Samples
from hfsparse_eval.run.world import Session

MEASURED = ("pair_density", "block_density", "decode_share", "cache_share")


def run(
    session: Session,
    suite: Samples,
    cap: int | None = None,
    batch: int = 1,
    arms: Sequence[Arm] | None = None,
) -> None:
    """Fill the results with what they lack: a length at a time, under one arm after the other.

    cap: of new tokens of an answer, where its task allows more. batch: samples that run together,
    of one task and length. arms: else dense, then those of the session. An arm that fails at a
    length is noted as failed and left there; the next goes on.
    """
    arms = (Dense(), *session.arms) if arms is None else arms
    cases = session.world.share(suite.cases)
    rounds = [
        (arm, todo)
        for length in dict.fromkeys(case.length for case in cases)
        for arm in arms
        if (todo := [c for c in cases if c.length == length and not done(c, arm, session.results)])
    ]
    lengths = {case.length for case in suite.cases}  # alike in all processes
    for arm in dict.fromkeys(arm for arm, _ in rounds):
        arm.prepare(session.tokenizer, lengths)
    with Bar() as shown:
        total = sum(case.length for _, todo in rounds for case in todo)
        bar = shown.add_task("", total=total, left=sum(len(todo) for _, todo in rounds))
        for arm, todo in rounds:
            at = todo[0]
            try:
                with arm.on(session.model) as meter:
                    for group in _groups(todo, batch if arm.batches else 1):
                        at = group[0]
                        shown.update(bar, description=f"{at.id} {arm.title}")
                        samples = [suite.sample(case) for case in group]
                        for line in _measure(session, samples, arm, meter, cap):
                            session.results.append(line)
                        shown.update(bar, advance=sum(case.length for case in group))
            except UsageError:
                raise
            except Exception as error:
                _note_failure(session, at, arm, error)


def _measure(
    session: Session, samples: Sequence[Sample], arm: Arm, meter: Meter, cap
) -> list[dict]:
    """A line for each of these samples, which run together; densities are of all of them."""
    meter.begin(samples[0])
    if len(samples) == 1:
        said = [answer(session.model, session.tokenizer, samples[0], cap)]
    else:
        said = together(session.model, session.tokenizer, samples, cap)
    measured = densities(meter.stats())
    return [
        {
            **about(session, sample, arm),
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


def by_case(session: Session, cases: Sequence, look: Callable) -> None:
    """Fill the results with what they lack, a case at a time: dense first, then under each arm.

    look(case, arms): reads what these arms share; it gives what tells, of an arm that is on, the
    fields of its line. Where that fails the next case goes on.
    """
    left = [
        (case, todo)
        for case in session.world.share(cases)
        if (todo := [a for a in (Dense(), *session.arms) if not done(case, a, session.results)])
    ]
    with Bar() as shown:
        bar = shown.add_task("", total=sum(case.length for case, _ in left))
        for case, todo in left:
            arm = todo[0]
            try:
                shown.update(bar, description=case.id)
                tell = look(case, todo)
                for arm in todo:
                    shown.update(bar, description=f"{case.id} {arm.title}")
                    with arm.on(session.model) as meter:
                        meter.begin(None)
                        told = tell(arm) | densities(meter.stats())
                    session.results.append(about(session, case, arm) | told)
            except UsageError:
                raise
            except Exception as error:
                _note_failure(session, case, arm, error)
            shown.update(bar, advance=case.length)


def about(session: Session, sample, arm: Arm) -> dict:
    """Which sample (or what names one), under what, where."""
    return {
        "id": sample.id,
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "arm": arm.name,
        "plan": arm.hash,
        "model": session.results.settings.fingerprint,
        "transformers": version("transformers"),
        "device": device_name(session.model.device),
    }


def _note_failure(session: Session, case, arm: Arm, error: Exception) -> None:
    traceback.print_exception(error)
    told = " ".join(f"{type(error).__name__}: {error}".split())
    session.results.append({**about(session, case, arm), "failed": told[:500]})


def done(case, arm: Arm, results: Results) -> bool:
    rest = (arm.name, arm.hash, results.settings.fingerprint, version("transformers"))
    return (case.id, *rest) in results.done


def _groups(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    """What runs together is of one task, so that densities and times are."""
    for _, same in groupby(cases, lambda case: case.task):
        same = list(same)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def densities(stats) -> dict:
    """What an arm measured; None of everything for the dense model."""
    measured = {name: number(stats, name) for name in MEASURED}
    return measured | {"kv_bytes": getattr(stats, "kv_bytes", None)}


def number(stats, name: str) -> float | None:
    """What was measured; None where nothing ran, as NaN is no JSON."""
    value = getattr(stats, name, math.nan)
    return None if math.isnan(value) else round(value, 6)
