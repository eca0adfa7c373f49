"""Whether a plan keeps the answers, and which heads are given back until it does.

    plan = hfsparse.verify(model, plan, tokenizer, out="proved.yaml")

`refine` is the end of a profile; `verify` gives the same proof to a plan of whatever making.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfsparse.profiler.settings import Settings, with_keywords

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfsparse.plan import Plan


@with_keywords(Settings, part="proof")
def verify(model: PreTrainedModel, plan: Plan, tokenizer, settings: Settings) -> Plan:
    """The plan with a proof of what `model` loses under it (docs/proof.md).

    Nothing is chosen and no head given back: the plan keeps its hash. It is tried on the trials and
    texts by which `profile` tells what a plan loses (`verify_samples` a length, `drop` and `nats`
    as there), and `made["verified"]` says what was found, `kept` among it: whether it stays within
    these limits. `expected` has what it computes of prompts, keeps and reads at `lengths`, in
    tokens; None gives those of `profile` at which it is not full. A plan of `profile` gets the
    proof that it got there, if `seed`, lengths and limits are the same; texts that calibrated it
    stay out, with the same `data`, too. Saved to `out` if given, and then a killed run goes on.
    Raises PlanMismatch for a plan of another model, UsageError for what can't be done.
    """
    from hfsparse.profiler.verify.given import run  # torch, only once it is called

    return run(model, plan, tokenizer, settings)
