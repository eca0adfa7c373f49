"""What is asked of a plan: answers and key tokens, some to choose it by, and others that tell.

The trials that a plan was chosen by underestimate its loss. So what is written into `plan.made` is
measured on as many trials and texts more. They are asked once, when the plan is final, and nothing
follows from them: a plan that loses more than its limits on these stays, and says so. To choose
again, and draw again until a draw looks good, would make that draw one more choice.
"""

from __future__ import annotations

from itertools import chain

from hfsparse.plan import Plan
from hfsparse.plan.plan import NONE
from hfsparse.profiler.job import Job
from hfsparse.profiler.verify import key_tokens, trials
from hfsparse.profiler.verify.answers import (
    Answers,
    ask_dense,
    draw_trials,
    list_first_round,
    list_trials,
    select_solved,
)
from hfsparse.profiler.verify.give_back import Criterion
from hfsparse.profiler.verify.key_tokens import TEXTS, KeyTokens
from hfsparse.profiler.verify.runs import Runs


def check_lengths(job: Job) -> None:
    """Raise UsageError for lengths that hold no trial."""
    for tasks in trials.LEVELS:
        draw_trials(job, list_first_round(tasks), tasks)


class Proof:
    """`verify_samples` trials a length, of tasks that the dense model can do once it has been asked
    each task, and the first half of `job.held` choose; as many trials more and the other half tell.
    """

    def __init__(self, job: Job):
        self.job = job
        self.asked = Runs(job, "trial", trials.run_trial)
        self.read = Runs(job, "text", key_tokens.measure_losses)
        self.shares, self.tasks = ask_dense(self.asked)
        self.names = select_solved(self.shares)

    def draw_choosing(self) -> list[Criterion]:
        """What a plan may be chosen by."""
        return [*self._draw_answers(0), *self._find_key_tokens(slice(TEXTS))]

    def tell(self, plan: Plan) -> dict:
        """For `made`: what trials and texts that chose nothing say of a plan, or why they can't."""
        chose = self._list_trials(0) if self.names else []
        last = max([*list_first_round(self.tasks), *chose])
        answers = self._draw_answers(last + 1)
        texts = self._find_key_tokens(slice(TEXTS, None))
        return {"lengths": list(self.job.prompts), **_report(plan, self.shares, answers, texts)}

    def _list_trials(self, first: int) -> list[int]:
        return list_trials(self.names, self.job.settings.verify_samples, first, self.tasks)

    def _draw_answers(self, first: int) -> list[Answers]:
        """Trials from this one on; none where the dense model can do no task."""
        if not self.names:
            return []
        drawn = draw_trials(self.job, self._list_trials(first), self.tasks)
        return [Answers(self.asked, drawn, self.job.settings.drop)]

    def _find_key_tokens(self, half: slice) -> list[KeyTokens]:
        """Key tokens of these texts; none where there are too few."""
        texts = list(chain(*(each[half] for each in self.job.held.values())))
        keys = KeyTokens(self.read, texts, self.job.settings.nats)
        return [keys] if keys.suffice else []


def _report(
    plan: Plan, shares: dict[str, float], answers: list[Answers], texts: list[KeyTokens]
) -> dict:
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
