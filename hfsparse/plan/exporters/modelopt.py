"""A plan's `skip` as `sparse_attention_config`, which ModelOpt and TensorRT-LLM read.

The readers know a threshold that falls as 1 / L for a prompt of L tokens (`importers.modelopt` has
the formula). With b = 0 it is a / L whatever the target, so a = length * e^-skip makes it the
plan's at one length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from hfsparse.errors import UsageError
from hfsparse.plan.importers.modelopt import FORMULA, KEY, TARGET
from hfsparse.plan.plan import Plan
from hfsparse.version import __version__


def write(plan: Plan, length: int | None) -> tuple[str, list[str]]:
    """A JSON object with the key `sparse_attention_config`, and what it leaves out."""
    if plan.skip is None:
        raise UsageError(
            "the plan has no skip, and modelopt can say nothing else of a plan: give one with a "
            "skip, such as skip: 4.0"
        )
    if length is None:
        raise UsageError(
            "modelopt's threshold falls with a prompt's length, and skip is one number: give "
            "--length, the tokens at which they are to be the same"
        )
    if length < 1:
        raise UsageError(f"length is {length}: give 1 token or more")
    a = length * math.exp(-plan.skip)
    if not a > 0:
        raise UsageError(f"skip is {plan.skip:g}: e^-skip is 0 in modelopt's form, so leave it out")
    group = {
        "algorithm": "skip_softmax",
        "targets": ["Attention"],
        "threshold_scale_factor": {"formula": FORMULA, "prefill": {"a": a, "b": 0.0}},
        "target_sparsity": {"prefill": TARGET},
    }
    producer = {"name": "hfsparse", "version": __version__}
    found = {KEY: {"config_groups": {"group_0": group}, "producer": producer}}
    return json.dumps(found, indent=2) + "\n", list(_list_lost(plan, length, a))


def _list_lost(plan: Plan, length: int, a: float) -> Iterator[str]:
    yield (
        f"the threshold is e^-{plan.skip:g} at {length} tokens, and falls as 1 / length there: "
        f"longer prompts skip less, shorter ones more, up to {math.floor(a)} tokens nothing"
    )
    yield "target_sparsity sets nothing: b is 0, so the threshold is the same for every target"
    for what, part in (
        ("q heads follow a pattern in prompts: all read every tile that is not skipped", "prefill"),
        ("kv heads drop keys: all keep every key", "cache"),
        ("kv heads read less in decode: all read every key", "decode"),
    ):
        heads = [word for layer in plan.layers for word in getattr(layer, part)]
        if sparse := sum(word != "full" for word in heads):
            yield f"left out: {sparse} of {len(heads)} {what}"
    if plan.extend is not None:
        yield "left out: extend, by which rows longer than the model was trained on are read"
    if plan.below.prefill:
        yield f"left out: below {plan.below.prefill} tokens the plan skips nothing"
