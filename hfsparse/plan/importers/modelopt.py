"""NVIDIA ModelOpt's skip-softmax (BLASST, arXiv 2512.12087), as a plan's `skip`.

A checkpoint's config.json has `sparse_attention_config`, with a group whose `algorithm` is
`skip_softmax`. A tile of a prompt of L tokens is skipped where its largest probability, against the
largest so far, is under a threshold in each row:

    threshold = a * exp(b * target_sparsity) / L        skip = -ln(threshold)

So theirs falls as 1 / L, and ours is one number, the same at one length. Some files have a number
in place of the formula, log_a in place of a, or a fixed `threshold`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from hfsparse.errors import UsageError
from hfsparse.plan.importers.form import Found, describe, no_plan, note_unread, read_json
from hfsparse.plan.words import show

KEY = "sparse_attention_config"
ALGORITHMS = ("skip_softmax", "softmax_skip")  # now, and up to 0.44
FORMULA = "a * exp(b * target_sparsity)"
FORMULAS = (FORMULA, "exp(log_a + b * target_sparsity)", "log_a + b * target_sparsity")
TARGET = 0.5  # where a file states no target, as there
DENSE = ("ignore", "disabled_layers")  # names of layers that are left dense
READ = ("algorithm", "sparse_algo", "threshold", "threshold_scale_factor", "targets")
TARGETS = ("target_sparsity", "target_sparse_ratio")


def read(path: Path, length: int | None = None) -> Found:
    """A plan's `skip`, in nats, of a threshold at `length` tokens; it says nothing of heads."""
    data = read_json(path, "modelopt")
    block = data.get(KEY, data) if isinstance(data, dict) else data
    group, others = _find_group(path, block)
    if dense := [name for name in DENSE if group.get(name)]:
        raise no_plan(path, "modelopt", f"{dense[0]} leaves layers dense, and skip is of all")
    notes = [
        "a tile is compared with the largest logit so far, and a row's diagonal is read first "
        "(there: keys from left to right), so more tiles may be skipped",
        "the form says nothing of cache and decode: every key is kept and read",
    ]
    if others:
        notes.append(f"groups of other algorithms are left out: {', '.join(map(show, others))}")
    if "threshold" in group:
        skip = -math.log(_number(path, "threshold", group["threshold"], above=0))
        if length is not None:
            raise UsageError(f"{path} has one threshold for every length: leave --length out")
    else:
        scale, more = _find_scale(path, group, block)
        notes += more
        skip = _at_length(path, scale, length)
        notes.append(
            f"skip {skip:.6g} is its threshold at {length} tokens (there: it falls as 1 / length, "
            "so longer prompts skip less, shorter ones more)"
        )
    if round(skip, 6) <= 0:
        raise UsageError(
            f"{path}: its threshold {'' if length is None else f'at {length} tokens '}is "
            f"{math.exp(-skip):.4g}, and one of 1 or more skips nothing: give a longer --length"
        )
    notes += note_unread(group, *READ, *TARGETS)
    return Found([], "q_heads", False, notes, round(skip, 6))


def _find_group(path: Path, block: Any) -> tuple[dict, list]:
    """The one group of skip-softmax, and the algorithms of the others."""
    if not isinstance(block, dict):
        raise no_plan(path, "modelopt", f"it is {describe(block)}")
    groups = block.get("config_groups", {"": block})
    if not isinstance(groups, dict) or not all(isinstance(each, dict) for each in groups.values()):
        raise no_plan(path, "modelopt", f"config_groups is {describe(groups)}")
    named = [(each.get("algorithm", each.get("sparse_algo")), each) for each in groups.values()]
    ours = [each for name, each in named if name in ALGORITHMS]
    if not ours:
        raise no_plan(path, "modelopt", f"it is {describe(block)}, without skip_softmax")
    if len(ours) > 1:
        raise no_plan(path, "modelopt", f"it has {len(ours)} groups of skip_softmax, not one")
    return ours[0], [name for name, each in named if each is not ours[0]]


def _find_scale(path: Path, group: dict, block: dict) -> tuple[float, list[str]]:
    """The logarithm of what is divided by the length, for prompts, and notes."""
    name, notes = "threshold_scale_factor", []
    found = group.get(name, block.get(name))
    if isinstance(found, dict):
        if (formula := found.get("formula", FORMULA)) not in FORMULAS:
            known = ", ".join(FORMULAS)
            raise no_plan(path, "modelopt", f"its formula is {show(formula)}, known are {known}")
        if "decode" in found:
            notes.append("a step reads every key (there: steps skip tiles, too)")
        found = found.get("prefill", found.get("coefficients"))
    if found is None:
        raise no_plan(path, "modelopt", "it states no threshold for prompts")
    if not isinstance(found, dict):
        return math.log(_number(path, name, found, above=0)), notes
    target, more = _find_target(path, group, block)
    if "log_a" in found:
        log_a = _number(path, "log_a", found["log_a"])
    else:
        log_a = math.log(_number(path, "a", found.get("a"), above=0))
    return log_a + _number(path, "b", found.get("b")) * target, notes + more


def _find_target(path: Path, group: dict, block: dict) -> tuple[float, list[str]]:
    """The share of tiles that is to be skipped in prompts, and a note where none is stated."""
    places = [(each, name) for each in (group, block) for name in TARGETS if name in each]
    found = places[0][0][places[0][1]] if places else None
    if isinstance(found, dict):
        found = found.get("prefill")
    if found is None:
        return TARGET, [f"no target_sparsity is stated: {TARGET} is taken, as ModelOpt does"]
    return _number(path, "target_sparsity", found), []


def _at_length(path: Path, scale: float, length: int | None) -> float:
    if length is None:
        raise UsageError(
            f"{path}: its threshold falls with a prompt's length, and skip is one number: give "
            "--length, the tokens at which they are to be the same"
        )
    if length < 1:
        raise UsageError(f"length is {length}: give 1 token or more")
    return math.log(length) - scale


def _number(path: Path, name: str, value: Any, above: float = -math.inf) -> float:
    sound = type(value) in (int, float) and above < value and abs(value) <= sys.float_info.max
    if not sound:  # NaN too
        wanted = "a number" if above < 0 else f"a number above {above}"
        raise no_plan(path, "modelopt", f"{name} is {describe(value)}, not {wanted}")
    return float(value)
