"""The full plan of a model as a file to edit: a line a layer, and every kind with its defaults."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any

import yaml

from hfsparse.evictions import EVICTIONS
from hfsparse.models.layers import layer_shapes
from hfsparse.patterns import PATTERNS
from hfsparse.plan.kept import Full
from hfsparse.plan.parts import ModelId, written_fields
from hfsparse.plan.plan import Plan
from hfsparse.selectors import SELECTORS

HEAD = """\
# The full plan: every head reads and keeps everything. Edit it, then see that it fits, and run it:
#   hfsparse check PLAN MODEL
#   hfsparse generate MODEL --plan PLAN --prompt-file FILE
# Every key, kind and parameter is described in docs/plans.md of the repository.
"""
PATTERNS_HEAD = """\
# Name what heads may follow. These are all the kinds, with the defaults of their parameters: take
# away the # of those that you want, change the numbers, call them what you like.
patterns:
"""
LAYERS_HEAD = """\
# A word a head; full*3 is the word three times.
#   prefill: full or the name of a prefill pattern, one a q head
#   cache:   full, or the name of a streaming pattern (a ring), of an eviction or of a full in fewer
#            bits or in host memory, one a kv head
#   decode:  full, or ring where the cache is a ring, or kept where it evicts, or the name of a
#            selector, one a kv head
layers:
"""


KINDS = {"prefill": PATTERNS, "decode selectors": SELECTORS, "cache evictions": EVICTIONS}
KINDS["cache in fewer bits or in host memory"] = {"held": Full}  # `full` itself is no name to give


def template(config: Any) -> str:
    """The full plan of a model's config, as commented YAML; PlanError if no plan can describe it.

    It reads as `Plan.full`. Rows of `patterns` are valid once their # is gone and no `?` is left; a
    selector that reads a table wants it beside the plan, too.
    """
    model = ModelId.of(config)
    identity, _, _ = Plan.full(model).dumps().partition("layers:\n")
    rows = [HEAD + identity + PATTERNS_HEAD.rstrip("\n")]
    for title, kinds in KINDS.items():
        rows.append(f"  # {title}:")
        rows += [f"  # {name}: {_flow(_defaults(cls))}{_table(cls)}" for name, cls in kinds.items()]
    rows.append("# Tokens in the row under which a head is computed, or kept, in full.")
    rows.append("below: {prefill: 0, decode: 0, cache: 0}")
    rows.append(LAYERS_HEAD.rstrip("\n"))
    parts = {"prefill": model.q_heads, "cache": model.kv_heads, "decode": model.kv_heads}
    words = _flow({part: f"full*{n}" if n > 1 else "full" for part, n in parts.items()})
    for index, shape in enumerate(layer_shapes(config)):
        note = ""
        if not shape.attends:
            note = "  # no attention: all stays full"
        elif shape.heads != model.heads:
            note = f"  # other heads, and a window of {shape.window} tokens: all stays full"
        elif shape.chunked:
            note = f"  # chunks of {shape.window} tokens of its own: all stays full"
        elif shape.window is not None:
            note = f"  # a window of {shape.window} tokens of its own: cache and decode stay full"
        elif shape.producer is not None:
            note = f"  # reads layer {shape.producer}'s keys: cache and decode are as there"
        rows.append(f"  {index}: {words}{note}")
    return "\n".join(rows) + "\n"


def _table(cls: type) -> str:
    """Where the table that a kind reads is from."""
    if not hasattr(cls, "calibrate"):
        return ""
    return f"  # and a table: hfsparse profile MODEL --selector {cls.kind}"


def _defaults(cls: type) -> dict[str, Any]:
    """A kind and its parameters; `?` stands for one that has no default."""
    given = {
        each.name: "?" if each.default is MISSING else each.default for each in written_fields(cls)
    }
    return {"kind": cls.kind, **given}


def _flow(values: dict[str, Any]) -> str:
    """A mapping on one line of YAML."""
    return yaml.safe_dump(
        values, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    ).strip()
