"""Prove a plan: change it until it loses little enough, then tell its loss by what chose nothing.

Two things are asked of the dense and of the patched model on the same tokens: answers, of tasks
that the dense model can do (`answers`), and tokens that need the far context in texts held out from
calibration, which any model predicts (`key_tokens`). Where a plan loses too much of either, kv
heads are given back, or its budgets widened (`give_back`).

What a plan was chosen by tells its loss too small. So what is written into `plan.made` is told by
as many trials and texts more. They are asked once, when the plan is final, and nothing follows from
them: a plan that loses more than its limits on these stays, and says so. To choose again, and draw
again until a draw looks good, would make that draw one more choice.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import chain

from hfsparse.plan import Plan
from hfsparse.plan.plan import NONE
from hfsparse.profiler.job import Job
from hfsparse.profiler.verify import key_tokens, trials
from hfsparse.profiler.verify.answers import Answers, able, ask_dense, draw, first_round, indices
from hfsparse.profiler.verify.give_back import Criterion, until_within
from hfsparse.profiler.verify.key_tokens import TEXTS, KeyTokens
from hfsparse.profiler.verify.runs import Runs


def check_lengths(job: Job) -> None:
    """Raise UsageError for lengths that hold no trial."""
    for tasks in trials.LEVELS:
        draw(job, first_round(tasks), tasks)


def refine(job: Job, plan: Plan, drop: float, samples: int, nats: float = key_tokens.LIMIT) -> Plan:
    """`plan`, more of it full, or one of wider budgets, that loses no more than its limits allow.

    Limits are the share `drop` of the answers and `nats` a key token. `samples` trials a length, of
    tasks that the dense model can do once it has been asked each task, and the first half of
    `job.held` choose; as many trials more and the other half tell. `made["verified"]` says what was
    found.
    """
    start = time.time()
    asked = Runs(job, "trial", lambda model, trial: trials.run(model, trial))
    read = Runs(job, "text", key_tokens.losses)
    shares, tasks = ask_dense(asked)
    names = able(shares)

    def answers(first: int) -> list[Answers]:
        """Trials from this one on; none where the dense model can do no task."""
        if not names:
            return []
        return [Answers(asked, draw(job, indices(names, samples, first, tasks), tasks), drop)]

    def texts(half: slice) -> list[KeyTokens]:
        """Key tokens of these texts; none where there are too few."""
        found = KeyTokens(read, list(chain(*(each[half] for each in job.held.values()))), nats)
        return [found] if found.tell else []

    choosing: list[Criterion] = [*answers(0), *texts(slice(TEXTS))]
    final, given, budget = until_within(job, plan, choosing)
    seen = max([*first_round(tasks), *(indices(names, samples, 0, tasks) if names else ())])
    told, keys = answers(seen + 1), texts(slice(TEXTS, None))
    wider = {k: v for k, v in asdict(budget).items() if v != getattr(job.budget, k)}
    final.made = plan.made | {
        "verified": {
            "lengths": list(job.prompts),
            **_report(final, shares, told, keys),
            **({"budgets": wider} if wider else {}),
            "given_back": [f"layer {at} kv head {g}" for at, g in given],
            "seconds": round(time.time() - start, 1),
        }
    }
    return final


def _report(
    plan: Plan, shares: dict[str, float], answers: list[Answers], texts: list[KeyTokens]
) -> dict:
    """For `made`: what trials and texts that chose nothing tell of a plan, or why they can't."""
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
    kept = not any(each.beyond(plan) for each in (*answers, *texts))
    if not kept:
        sentences.append("so it loses more than its limits, which was asked after all was chosen")
    return {"told": "; ".join(sentences), **found, "tasks": tasks, "kept": kept}
