"""Verify a plan of a method: change it until it loses little enough, then tell its loss.

Two things are asked of the dense and of the patched model on the same tokens: answers, of tasks
that the dense model can do (`answers`), and tokens that need the far context in texts held out from
calibration, which any model predicts (`key_tokens`). Where a plan loses too much of either, kv
heads are given back, or its budgets widened (`give_back`). Other trials tell what it then loses
(`proof`).
"""

from __future__ import annotations

import time
from dataclasses import asdict

from hfsparse.plan import Plan
from hfsparse.profiler.job import Found, Job
from hfsparse.profiler.verify.give_back import keep_within
from hfsparse.profiler.verify.proof import Proof


def refine(job: Job, found: Found) -> Plan:
    """The plan found, more of it full, or one of wider budgets, that loses no more than its limits.

    Limits are the share `drop` of the answers and `nats` a key token. `made["verified"]` says what
    it loses on trials and texts that chose nothing.
    """
    start, proof = time.time(), Proof(job)
    final, given, budget = keep_within(job, found, proof.draw_choosing())
    wider = {k: v for k, v in asdict(budget).items() if v != getattr(job.budget, k)}
    final.made = found.plan.made | {
        "verified": {
            **proof.tell(final),
            **({"budgets": wider} if wider else {}),
            "given_back": [_name_unit(*unit) for unit in given],
            "seconds": round(time.time() - start, 1),
        }
    }
    return final


def _name_unit(layer: int, head: int, bits: int | None = None) -> str:
    return f"layer {layer} kv head {head}{'' if bits is None else f', in {bits} bits'}"
