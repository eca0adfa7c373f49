"""Verify a plan: change it until it loses little enough, then report its loss on other trials.

Two things are asked of the dense and of the patched model on the same tokens: answers, of tasks
that the dense model can do (`answers`), and tokens that need the far context in texts held out from
calibration, which any model predicts (`key_tokens`). Where a plan loses too much of either, kv
heads are given back, or its budgets widened (`give_back`).

The trials that a plan was chosen by underestimate its loss. So what is written into `plan.made` is
measured on as many trials and texts more. They are asked once, when the plan is final, and nothing
follows from them: a plan that loses more than its limits on these stays, and says so. To choose
again, and draw again until a draw looks good, would make that draw one more choice.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import chain

from hfsparse.plan import Plan
from hfsparse.plan.plan import NONE
from hfsparse.profiler.job import Found, Job
from hfsparse.profiler.verify import key_tokens, trials
from hfsparse.profiler.verify.answers import (
    Answers,
    ask_dense,
    draw_trials,
    list_first_round,
    list_trials,
    select_solved,
)
from hfsparse.profiler.verify.give_back import Criterion, keep_within
from hfsparse.profiler.verify.key_tokens import TEXTS, KeyTokens
from hfsparse.profiler.verify.runs import Runs


def check_lengths(job: Job) -> None:
    """Raise UsageError for lengths that hold no trial."""
    for tasks in trials.LEVELS:
        draw_trials(job, list_first_round(tasks), tasks)


def refine(job: Job, found: Found) -> Plan:
    """The plan found, more of it full, or one of wider budgets, that loses no more than its limits.

    Limits are the share `drop` of the answers and `nats` a key token. `verify_samples` trials a
    length, of tasks that the dense model can do once it has been asked each task, and the first
    half of `job.held` choose; as many trials more and the other half report. `made["verified"]`
    says what was found.
    """
    start, settings = time.time(), job.settings
    samples = settings.verify_samples
    asked = Runs(job, "trial", trials.run_trial)
    read = Runs(job, "text", key_tokens.measure_losses)
    shares, tasks = ask_dense(asked)
    names = select_solved(shares)

    def draw_answers(first: int) -> list[Answers]:
        """Trials from this one on; none where the dense model can do no task."""
        if not names:
            return []
        drawn = draw_trials(job, list_trials(names, samples, first, tasks), tasks)
        return [Answers(asked, drawn, settings.drop)]

    def find_key_tokens(half: slice) -> list[KeyTokens]:
        """Key tokens of these texts; none where there are too few."""
        texts = list(chain(*(each[half] for each in job.held.values())))
        keys = KeyTokens(read, texts, settings.nats)
        return [keys] if keys.suffice else []

    choosing: list[Criterion] = [*draw_answers(0), *find_key_tokens(slice(TEXTS))]
    final, given, budget = keep_within(job, found, choosing)
    chose = list_trials(names, samples, 0, tasks) if names else []
    last = max([*list_first_round(tasks), *chose])
    answers, keys = draw_answers(last + 1), find_key_tokens(slice(TEXTS, None))
    wider = {k: v for k, v in asdict(budget).items() if v != getattr(job.budget, k)}
    final.made = found.plan.made | {
        "verified": {
            "lengths": list(job.prompts),
            **_report(final, shares, answers, keys),
            **({"budgets": wider} if wider else {}),
            "given_back": [f"layer {at} kv head {g}" for at, g in given],
            "seconds": round(time.time() - start, 1),
        }
    }
    return final


def _report(
    plan: Plan, shares: dict[str, float], answers: list[Answers], texts: list[KeyTokens]
) -> dict:
    """For `made`: what trials and texts that chose nothing say of a plan, or why they can't."""
    found, tasks = {}, {task: {"dense": round(share, 4)} for task, share in shares.items()}
    sentences = []
    for each in answers:
        found = each.report(plan)
        for task, drop in found.pop("tasks").items():
            tasks[task] |= drop
        sentences.append(found.pop("told"))
    if not answers:
        sentences.append("the dense model can do none of the tasks that were asked")
    for each in texts:
        found["key_tokens"] = each.report(plan)
        sentences.append(found["key_tokens"].pop("told"))
    if not (answers or texts):
        unseen = "no two texts have tokens that need the far context"
        return {"told": f"{NONE}: {sentences[0]}, and {unseen}", "tasks": tasks}
    kept = not any(each.rejects(plan) for each in (*answers, *texts))
    if not kept:
        sentences.append("so it loses more than its limits, which was asked after all was chosen")
    return {"told": "; ".join(sentences), **found, "tasks": tasks, "kept": kept}
