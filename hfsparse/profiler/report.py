"""What is said of a plan once it is made: under `made`, and at the end of the command."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hfsparse.models.layers import layer_shapes
from hfsparse.patcher.figures import predict
from hfsparse.patcher.memory import cache_bytes
from hfsparse.plan import Plan
from hfsparse.plan.words import series
from hfsparse.profiler.methods import METHODS
from hfsparse.profiler.settings import Settings
from hfsparse.version import __version__

ORDER = "version method prefill_method recipe model seed samples seconds peak_gib".split()


def describe_run(model: PreTrainedModel, settings: Settings, seconds: float) -> dict[str, Any]:
    """What a plan says under `made` of the run that chose it."""
    found = {
        "version": __version__,
        "recipe": None,
        "model": name_weights(model),
        "seconds": round(seconds, 1),
        "peak_gib": round(peak_bytes(model) / 2**30, 2),
        **settings.provenance,
    }
    if idle := [i for i, shape in enumerate(layer_shapes(model)) if not shape.attends]:
        found["no_attention"] = idle
    return {name: found[name] for name in (*ORDER, *found) if name in found}


def name_weights(model: PreTrainedModel) -> str:
    """What a plan calls a model's weights: the last part of where they came from."""
    return Path(model.config._name_or_path or "unnamed").name


def peak_bytes(model: PreTrainedModel) -> int:
    """The most memory that this process has held: on the model's GPUs, else in the CPU's."""
    devices = {weight.device for weight in model.parameters()}
    if cards := [device for device in devices if device.type == "cuda"]:
        return sum(torch.cuda.max_memory_allocated(card) for card in cards)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_budgets(plan: Plan, settings: Settings, model: PreTrainedModel) -> str:
    """One line: which of the budgets a plan with `expected` meets at its longest length, and why
    it doesn't meet others.
    """
    longest = max(plan.expected)
    expected = plan.expected[longest]
    rows = (
        ("pairs", "pair_density", settings.prefill_density),
        ("cache", "cache_share", settings.cache_share if settings.cache_gib is None else None),
        ("reads", "decode_share", settings.decode_share),
    )
    parts, missed = [], False
    for word, name, budget in rows:
        share = expected.get(f"{name}_free", expected.get(name))
        if share is None or budget is None:
            continue
        met = budget >= 1 or share <= budget + 1e-3
        missed = missed or not met
        parts.append(f"{word} {share:.2f} of {budget:.2f} {'met' if met else 'not met'}")
        parts[-1] += tell_halved(plan, longest, model) if name == "cache_share" else ""
    if settings.cache_gib is not None:
        tokens, most = settings.at or longest, settings.cache_gib
        taken, _ = cache_bytes(model.config, plan, tokens, itemsize=model.dtype.itemsize)
        met = taken <= most * 1.001 * 2**30
        missed = missed or not met
        told = f"{taken / 2**30:.3g} of {most:.3g} GiB at {tokens} tokens"
        parts.append(f"cache {told} {'met' if met else 'not met'}")
    line = f"budgets at {longest} tokens: {'; '.join(parts)}"
    why = []
    left = () if METHODS[settings.method].one_pass else enumerate(layer_shapes(model))
    full = Plan.full(plan.model).layers
    bound = [at for at, shape in left if shape.free and not shape.alone]
    if bound := [at for at in bound if plan.layers[at] == full[at]]:
        why.append(f"layers {series(bound)} share keys and stay full, the others keep the budgets")
    if plan.verified.get("given_back") or plan.verified.get("budgets"):
        why.append("more is kept so that the plan loses no more than its limits")
    return f"{line}: {'; '.join(why)}" if missed and why else line


def tell_halved(plan: Plan, tokens: int, model: PreTrainedModel) -> str:
    """What of the cache a plan keeps in a type of two bytes, where it was profiled in a wider one,
    of which indexes and fewer bits are another share."""
    sizes = model.dtype.itemsize, min(model.dtype.itemsize, 2)
    each = (predict(model.config, plan, tokens, itemsize=size) for size in sizes)
    share, halved = (f"{stats.free.cache_share:.2f}" for stats in each)
    return "" if halved == share else f" ({halved} in a type of two bytes)"


def find_unused(plan: Plan, settings: Settings) -> str | None:
    """A warning about a plan in which no head has the selector or the eviction that was asked
    for."""
    longer = "a smaller --decode-share, or longer --lengths, where fewer reads save more"
    for kind, does, advice in (
        (settings.selector, "reads by", longer),
        (settings.eviction, "keeps by", "a smaller --cache-share"),
    ):
        if kind is not None and all(pattern.kind != kind for pattern in plan.patterns.values()):
            return (
                f"no head of this plan {does} {kind}: full heads and rings keep the budgets and "
                f"lose less. Give {advice}"
            )
    return None


def find_doubt(plan: Plan, given: bool = False) -> str | None:
    """A warning about a plan whose verification showed nothing, or a loss beyond its limits.

    given: `verify` was given the plan; else `profile` chose it, and could choose another.
    """
    if plan.unproved:
        return (
            f"nothing verified this plan: {plan.unproved}. Compare it with dense on your own "
            "questions, by hfsparse eval custom"
        )
    if not plan.verified.get("kept", True):
        if given:
            return (
                "this plan loses more than its limits on this model. Give it more (full heads, "
                "wider rings), or have a plan chosen for this model: hfsparse profile"
            )
        return (
            "this plan loses more than its limits on what was asked after it was chosen. Give "
            "wider budgets, or choose by more --verify-samples"
        )
    return None
