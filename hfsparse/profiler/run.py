"""One profile run, from settings to a plan: calibrate, choose, verify, write."""

from __future__ import annotations

import time
from functools import partial
from itertools import chain

from transformers import PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.models.layers import layer_shapes
from hfsparse.models.loading import check_ids
from hfsparse.models.rope import forget_lengths
from hfsparse.models.sharding import group_of
from hfsparse.models.window import SHORTEST, calibration_lengths, limit
from hfsparse.patcher import supported
from hfsparse.plan import ModelId, Plan
from hfsparse.plan.headmap import write_png
from hfsparse.profiler.job import Found, Job
from hfsparse.profiler.methods import METHODS, mixed
from hfsparse.profiler.parts import Parts, identify_run
from hfsparse.profiler.progress import bar, silent
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.profiler.report import describe_run
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.solve.allocation import Budget
from hfsparse.profiler.solve.room import Room
from hfsparse.profiler.verify import key_tokens
from hfsparse.profiler.verify.proof import check_lengths
from hfsparse.profiler.verify.refine import refine
from hfsparse.progress import Clock


def run(model: PreTrainedModel, tokenizer, settings: Settings) -> Plan:
    """The plan that the settings ask for, saved to `settings.out` if given."""
    supported.check_model(model)  # what no plan can be measured on, since none can be patched in
    lengths = calibration_lengths(model) if settings.lengths is None else settings.lengths
    methods = settings.method, settings.prefill_method or settings.method
    together = all(METHODS[each].one_pass for each in methods)
    check_model(model, lengths, settings.beyond_window, together)
    cache = find_cache_budget(model, settings, lengths)  # ahead of all work
    start = time.time()
    job = prepare(model, tokenizer, settings, lengths, cache)
    if settings.verify:
        check_lengths(job)  # ahead of all work
    found = choose(job)
    seconds, plan = time.time() - start, found.plan
    if settings.verify:
        plan = refine(job, found)
    plan.made = describe_run(model, settings, seconds) | plan.made
    plan.validate()
    if settings.curves is not None:
        write_png(found.draw(), settings.curves)
    if settings.out is not None:
        plan.save(settings.out)
        job.parts.remove()
    return plan


def check_model(
    model: PreTrainedModel, lengths: tuple[int, ...], beyond_window: bool, together: bool = True
) -> None:
    """Raise UsageError for a model that can't be profiled, or not at these lengths.

    together: whether a method chooses for layers that share keys, too.
    """
    if group_of(model) is not None:
        raise UsageError(
            f"this {type(model).__name__} is tensor parallel, and a plan is measured and verified "
            "on all heads at once: load it whole, or by device_map='auto', and patch the plan in "
            "where ranks share the heads"
        )
    ModelId.of(model)  # PlanError for what no plan can describe
    window = limit(model, beyond_window)
    problems = [
        (not lengths, "no lengths given: name at least one, in tokens"),
        (model.training, "the model is in training mode: call model.eval() first"),
        (
            any(n < SHORTEST for n in lengths),
            f"lengths {lengths}: give {SHORTEST} tokens or more",
        ),
        (
            window is not None and any(n > window for n in lengths),
            f"lengths {lengths}: the model's window is {window} tokens (beyond_window passes it)",
        ),
    ]
    for wrong, sentence in problems:
        if wrong:
            raise UsageError(sentence)
    if not any(shape.may_be_sparse(together) for shape in layer_shapes(model)):
        raise UsageError(
            f"every attention layer of this {type(model).__name__} has a sliding window of its "
            "own, or keys that layers share: there is nothing to make sparse. "
            "hfsparse.patch(model) runs it without a plan"
        )


def find_cache_budget(
    model: PreTrainedModel, settings: Settings, lengths: tuple[int, ...]
) -> float:
    """The budget of cache, a share of what the layers that may be sparse hold without a plan.

    UsageError for one in GiB that the other layers fill, or of rows in which every head is full.
    """
    if settings.cache_gib is None:
        return settings.cache_share
    at, floor = settings.at or max(lengths), min(lengths) // 2
    if at < floor:
        raise UsageError(
            f"at is {at}: below {floor} tokens, half of the shortest of lengths, every head of the "
            "plan is full. Give more, or shorter --lengths"
        )
    together = METHODS[settings.method].one_pass
    return Room.of(model, at, together).share(settings.cache_gib)


def prepare(
    model: PreTrainedModel,
    tokenizer,
    settings: Settings,
    lengths: tuple[int, ...],
    cache: float = 1.0,
) -> Job:
    """Prompts to calibrate on and texts held out from them, and what earlier runs measured.

    cache: the budget of it, a share.
    """
    count = settings.samples + (2 * key_tokens.TEXTS if settings.verify else 0)
    prompts = {
        n: make_prompts(tokenizer, n, count, settings.seed, settings.data)
        for n in sorted(set(lengths))
    }
    held = {}
    if settings.verify:
        prompts, held = key_tokens.hold_out(prompts, settings.samples)
        held = key_tokens.fill_up(tokenizer, held, settings.seed)
    for each in chain(*prompts.values(), *held.values()):
        check_ids(model, [int(each.ids.max())])
    budget = Budget(settings.prefill_density, cache, settings.decode_share, settings.loss)
    alone = partial(forget_lengths, model)
    parts = Parts(settings.out, identify_run(model, settings, prompts), alone)
    shown = partial(bar, Clock()) if settings.progress else silent
    return Job(model, tokenizer, prompts, budget, parts, shown, settings, held)


def choose(job: Job) -> Found:
    """What the methods of the settings find."""
    method, prefill_method = job.settings.method, job.settings.prefill_method
    if prefill_method is None:
        return METHODS[method].plan(job)
    return mixed.plan(job, METHODS[prefill_method].plan, METHODS[method].plan)
