"""Verify a plan that is given, of whatever making: what it loses is told, and nothing is changed.

It is asked what tells of a plan that `profile` makes (`proof`), so that a plan of a profile gets
the same proof again. What it does in prompts is counted on those that would calibrate.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from math import nan

import numpy as np
import torch
from transformers import PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.lists import PAGE
from hfsparse.models.window import calibration_lengths
from hfsparse.patcher import patch, supported
from hfsparse.patcher.figures import Prompts, predict
from hfsparse.patcher.handle import Patched
from hfsparse.plan import Plan
from hfsparse.profiler.job import Job
from hfsparse.profiler.methods.one_pass import average
from hfsparse.profiler.prompts.calibration import Prompt
from hfsparse.profiler.report import name_weights
from hfsparse.profiler.run import check_model, prepare
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.verify.proof import Proof, check_lengths
from hfsparse.profiler.verify.trials import open_reader
from hfsparse.version import __version__

# Words by which a part of a plan leaves nothing out; the cache does, where it's `ring` or `kept`.
PARTS = {"prefill": {"full"}, "cache": {"full"}, "decode": {"full", "ring", "kept"}}
KEPT = ("budgets", "given_back")  # of a profile's proof: how the plan came to be


def run(model: PreTrainedModel, plan: Plan, tokenizer, settings: Settings) -> Plan:
    """The plan with its proof under `made`, and with figures that it expects; saved if asked to."""
    supported.check_model(model)
    plan.check(model)
    lengths = choose_lengths(model, plan, settings.lengths)
    check_model(model, lengths, settings.beyond_window)
    start, job = time.time(), prepare_job(model, plan, tokenizer, settings, lengths)
    check_lengths(job)  # ahead of all work
    bare = replace(plan, made={})  # what an earlier proof couldn't tell is no warning now
    verified = {
        **Proof(job).tell(bare),
        **{name: plan.verified[name] for name in KEPT if name in plan.verified},
        "version": __version__,
        "model": name_weights(model),
        "seed": settings.seed,
    }
    expected = plan.expected | {
        n: plan.expected.get(n, {}) | figures for n, figures in count_figures(job, bare).items()
    }
    verified["seconds"] = round(time.time() - start, 1)
    proved = replace(plan, expected=expected, made=plan.made | {"verified": verified})
    proved.validate()
    if settings.out is not None:
        proved.save(settings.out)
        job.parts.remove()
    return proved


def choose_lengths(
    model: PreTrainedModel, plan: Plan, given: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Those given, or those of `profile` at which the plan does something.

    UsageError: the plan is full at one of those given, or at all, so nothing could be lost.
    """
    floor = find_floor(plan)
    usual = calibration_lengths(model)
    lengths = given if given is not None else tuple(n for n in usual if n >= floor) or usual
    if any(n < floor for n in lengths):
        raise UsageError(
            f"lengths {lengths}: the plan is full below {floor} tokens, where nothing can be lost: "
            "give longer --lengths"
        )
    return lengths


def find_floor(plan: Plan) -> int:
    """Tokens in a row below which all of the plan's heads are full."""
    words = {part: {w for layer in plan.layers for w in getattr(layer, part)} for part in PARTS}
    floors = [
        getattr(plan.below, part)
        for part, full in PARTS.items()
        if words[part] - full or (part == "prefill" and plan.skip is not None)
    ]
    if any(getattr(plan.patterns.get(word), "bits", 16) != 16 for word in words["cache"]):
        floors.append(PAGE)  # of which the first is packed
    return min(floors, default=0)


def prepare_job(
    model: PreTrainedModel, plan: Plan, tokenizer, settings: Settings, lengths: tuple[int, ...]
) -> Job:
    """Prompts and held-out texts, drawn as the plan's profile drew them if it has one.

    Own texts that calibrated the plan are then no part of the proof, whatever the seed.
    """
    drawn = replace(settings, out=None if settings.out is None else f"{settings.out}.verify")
    if _is_count(samples := plan.made.get("samples"), least=1):
        drawn = replace(drawn, samples=samples)
    if settings.data is not None and _is_count(seed := plan.made.get("seed")):
        drawn = replace(drawn, seed=seed)
    return replace(prepare(model, tokenizer, drawn, lengths), settings=settings)


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


def count_figures(job: Job, plan: Plan) -> dict[int, dict[str, float]]:
    """What the plan computes of the job's prompts, in mean, keeps and reads, by length."""
    config, device, size = job.model.config, job.model.device, job.model.dtype.itemsize
    return {
        n: predict(config, plan, n, each, device, size).figures()
        for n, each in _count_prompts(job, plan).items()
    }


def _count_prompts(job: Job, plan: Plan) -> dict[int, Prompts]:
    rows = [(n, i, prompt) for n, each in job.prompts.items() for i, prompt in enumerate(each)]
    found: dict[int, list[dict[str, np.ndarray]]] = {n: [] for n in job.prompts}
    with patch(job.model, plan) as handle:
        for n, i, prompt in job.progress((f"plan, {row[2].name}", row) for row in rows):
            compute = partial(_count_prompt, handle, prompt)
            found[n].append(job.parts.get(f"prompt-{plan.hash()[7:19]}-{n}-{i}", compute))
    return {n: Prompts(**_trim(average(each))) for n, each in found.items()}


@torch.no_grad()
def _count_prompt(handle: Patched, prompt: Prompt) -> dict[str, np.ndarray]:
    """Shares of dense attention `[layers, q heads]`; nan past the heads that a layer has."""
    read = open_reader(handle.model)
    handle.reset_stats()
    read(prompt.ids[0].tolist())
    layers = handle.stats().layers
    shares = {"pairs": [layer.pair_density for layer in layers]}
    shares["blocks"] = [layer.block_density for layer in layers]
    return {name: np.array([*zip_longest(*rows, fillvalue=nan)]).T for name, rows in shares.items()}


def _trim(shares: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """By layer, the shares of the heads that it has."""
    return {name: [row[~np.isnan(row)] for row in rows] for name, rows in shares.items()}
