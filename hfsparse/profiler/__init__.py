"""Offline calibration: look at how each head attends, and write a plan.

    plan = hfsparse.profile(model, tokenizer, out="plan.yaml", lengths=(2048,))

A method of METHODS chooses; what it measures is kept beside `out` until the plan is written, so
that a killed run goes on where it was. Most capture (a forward and a backward pass a prompt),
measure (what candidates keep and lose) and allocate (one choice a head under the budgets).
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from functools import partial
from itertools import chain
from math import inf
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.models.fingerprint import linear_layers, windows
from hfsparse.models.weights import weights_mark
from hfsparse.models.window import SHORTEST, calibration_lengths, limit
from hfsparse.plan import ModelId, Plan
from hfsparse.plan.headmap import write_png
from hfsparse.profiler.job import Job
from hfsparse.profiler.measure.proxies import PROXIES
from hfsparse.profiler.methods import (
    balanced,
    duo,
    minference,
    minference_error,
    mixed,
    moa,
    streaming_llm,
)
from hfsparse.profiler.parts import Parts
from hfsparse.profiler.progress import bar, silent
from hfsparse.profiler.prompts.calibration import Prompt, samples
from hfsparse.profiler.solve.allocation import Budget
from hfsparse.profiler.verify import key_tokens
from hfsparse.profiler.verify import refine as proof
from hfsparse.progress import Clock
from hfsparse.version import __version__

METHODS = {
    "balanced": balanced,
    "minference": minference,
    "minference-error": minference_error,
    "moa": moa,
    "duo": duo,
    "streaming-llm": streaming_llm,
}
DRAWN = ("balanced", "minference", "minference-error")  # measure candidates on every head


def profile(
    model: PreTrainedModel,
    tokenizer,
    *,
    out: str | Path | None = None,
    lengths: tuple[int, ...] | None = None,
    samples: int = 6,
    prefill_density: float = 0.4,
    cache_share: float = 0.8,
    decode_share: float = 0.25,
    loss: float | None = None,
    seed: int = 0,
    data: str | Path | None = None,
    method: str = "balanced",
    prefill_method: str | None = None,
    verify: bool = True,
    drop: float = 0.01,
    nats: float = key_tokens.LIMIT,
    verify_samples: int = 12,
    proxy: str | None = None,
    recipe: str | None = None,
    curves: str | Path | None = None,
    beyond_window: bool = False,
    progress: bool = False,
) -> Plan:
    """Measure `model` on calibration prompts and return its plan, saved to `out` if given.

    Budgets are shares of what the layers without a sliding window of their own do without a plan,
    the part that a plan may change: query-key pairs of a prompt, bytes of cache, keys read by a
    decode step (docs/figures.md). 1 is no limit. They are met at the longest of `lengths` (tokens;
    by `moa` at each and beyond); `expected` says what that makes of the whole model, too. None
    gives the lengths of `window.calibration_lengths`; `beyond_window` takes some that the model was
    not made for. With `loss`, a share of what the worst rings on every head would lose, methods in
    DRAWN look for the smallest shares within these budgets that are expected to lose no more.
    `samples` prompts a length, made offline or taken from `data` (JSONL with "text" or "prompt").
    `prefill_method` chooses for prompts what `method` leaves full in the cache (`mixed`). With
    `verify` the plan is then tried on `verify_samples` retrieval trials a length, of tasks that the
    model can do, and on texts held out from calibration; kv heads are given back until it loses at
    most the share `drop` of the answers against the dense model, or two, or what may be chance, and
    at most `nats` on a token that needs the far context. Where budgets wider by a few steps do that
    with less, the plan is of those. Either may pass the budgets, and `expected` says by how much.
    What the plan loses in the end, `made` tells by as many trials and texts more. `proxy` (one of
    PROXIES) ranks heads for `duo` in place of its training. `recipe` names where the settings come
    from (see `hfsparse.recipe`), for `made`. `curves` is a PNG to write (`profiler.curves`), for
    methods in DRAWN. Raises UsageError for what can't be done.
    """
    check_settings(
        method=method,
        prefill_method=prefill_method,
        prefill_density=prefill_density,
        cache_share=cache_share,
        decode_share=decode_share,
        loss=loss,
        drop=drop,
        nats=nats,
        verify_samples=verify_samples,
        proxy=proxy,
    )
    check_curves(curves, method, prefill_method)
    lengths = calibration_lengths(model) if lengths is None else lengths
    _check(model, lengths, samples, beyond_window)
    budget = Budget(prefill_density, cache_share, decode_share, loss)
    start, lengths = time.time(), tuple(sorted(set(lengths)))
    count = samples + 2 * key_tokens.TEXTS if verify else samples
    prompts, held = {n: prompts_of(tokenizer, n, count, seed, data) for n in lengths}, {}
    if verify:
        prompts, held = key_tokens.hold_out(prompts, samples)
        held = key_tokens.filled_up(tokenizer, held, seed)
    methods = method if prefill_method is None else f"{prefill_method} and {method}"
    parts = Parts(out, _settings(model, methods, prompts))
    shown = partial(bar, Clock()) if progress else silent
    job = Job(model, tokenizer, prompts, budget, parts, shown, seed, proxy, held=held)
    if verify:
        proof.check_lengths(job)  # ahead of all work
    if prefill_method is None:
        plan = METHODS[method].plan(job)
    else:
        plan = mixed.plan(job, METHODS[prefill_method].plan, METHODS[method].plan)
    seconds = time.time() - start
    if verify:
        plan = proof.refine(job, plan, drop, verify_samples, nats)
    plan.made = {
        "version": __version__,
        "method": method,
        **({} if prefill_method is None else {"prefill_method": prefill_method}),
        "recipe": recipe,
        "model": Path(model.config._name_or_path or "unnamed").name,
        "seed": seed,
        "samples": samples,
        "seconds": round(seconds, 1),
        "peak_gib": round(_peak_bytes(model) / 2**30, 2),
        **plan.made,
    }
    plan.validate()
    if curves is not None:
        write_png(job.draw(), curves)
    if out is not None:
        plan.save(out)
        parts.remove()
    return plan


def budgets_told(
    plan: Plan, prefill_density: float, cache_share: float, decode_share: float
) -> str:
    """One line: which of the budgets a plan with `expected` meets at its longest length."""
    longest = max(plan.expected)
    expected = plan.expected[longest]
    rows = (
        ("pairs", "pair_density", prefill_density),
        ("cache", "cache_share", cache_share),
        ("reads", "decode_share", decode_share),
    )
    parts, missed = [], False
    for word, name, budget in rows:
        used = expected.get(f"{name}_free", expected.get(name))
        if used is None:
            continue
        met = budget >= 1 or used <= budget + 1e-3
        missed = missed or not met
        parts.append(f"{word} {used:.2f} of {budget:.2f} {'met' if met else 'not met'}")
    told = f"budgets at {longest} tokens: {'; '.join(parts)}"
    if missed and (plan.verified.get("given_back") or plan.verified.get("budgets")):
        told += ": more is kept so that the plan loses no more than its limits"
    return told


def doubt(plan: Plan) -> str | None:
    """What to say last of a plan whose proof told nothing, or too much; None of any other."""
    if plan.unproved:
        return (
            f"nothing verified this plan: {plan.unproved}. Compare it with dense on your own "
            "questions, by hfsparse eval custom"
        )
    if not plan.verified.get("kept", True):
        return (
            "this plan loses more than its limits on what was asked after it was chosen. Give "
            "wider budgets, or choose by more --verify-samples"
        )
    return None


prompts_of = samples  # `profile` has an argument of that name


def check_settings(
    *,
    method: str,
    prefill_method: str | None,
    loss: float | None,
    drop: float,
    nats: float,
    verify_samples: int,
    proxy: str | None,
    **others,
) -> None:
    """Raise UsageError for settings of `profile` that can't work, whatever the model."""
    for each in (method, prefill_method or method):
        if each not in METHODS:
            raise UsageError(f"no method {each}: there is {', '.join(METHODS)}")
    check_proof(drop, nats, verify_samples)
    check_proxy(proxy, method)
    check_loss(loss, method, prefill_method)
    for name in ("prefill_density", "cache_share", "decode_share"):
        share = others[name]
        if not 0 < share <= 1:
            raise UsageError(f"{name} is {share}: give more than 0 and at most 1")


def check_proof(drop: float, nats: float, samples: int) -> None:
    """Raise UsageError for settings of the verification that can't work."""
    if not 0 <= drop < 1:
        raise UsageError(f"drop is {drop}: give 0 or more, and less than 1")
    if not 0 <= nats < inf:
        raise UsageError(f"nats is {nats}: give 0 or more, what a key token may lose")
    if samples < 1:
        raise UsageError(f"verify_samples is {samples}: give 1 or more, or no verification")


def check_proxy(proxy: str | None, method: str) -> None:
    """Raise UsageError for a proxy that `method` can't rank heads by."""
    if proxy is None:
        return
    if method != "duo":
        raise UsageError(f"proxy {proxy} ranks heads for duo, not for {method}: leave it out")
    if proxy not in PROXIES:
        raise UsageError(f"no proxy {proxy}: there is {', '.join(PROXIES)}")


def check_loss(loss: float | None, method: str, prefill_method: str | None) -> None:
    """Raise UsageError for a budget of loss that can't be kept."""
    if loss is None:
        return
    if prefill_method or method not in DRAWN:
        methods = f"{prefill_method} with {method}" if prefill_method else method
        raise UsageError(
            f"{methods} knows no loss to keep within {loss}: leave it out, or use "
            f"{', '.join(DRAWN)} alone"
        )
    if not 0 <= loss <= 1:
        raise UsageError(f"loss is {loss}: give 0 to 1, a share of what rings alone would lose")


def check_curves(curves: str | Path | None, method: str, prefill_method: str | None) -> None:
    """Raise UsageError where no curves are measured, or by two methods."""
    if curves is not None and (prefill_method or method not in DRAWN):
        methods = f"{prefill_method} with {method}" if prefill_method else method
        wanted = f"leave them out, or use {', '.join(DRAWN)} alone"
        raise UsageError(f"{methods} draws no curves: {wanted}")


def _check(
    model: PreTrainedModel, lengths: tuple[int, ...], samples: int, beyond_window: bool
) -> None:
    ModelId.of(model)  # PlanError for what no plan can describe
    window = limit(model, beyond_window)
    problems = [
        (not lengths, "no lengths given: name at least one, in tokens"),
        (model.training, "the model is in training mode: call model.eval() first"),
        (samples < 1, f"samples is {samples}: give 1 or more"),
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
    if linear_layers(model):
        raise UsageError(
            f"this {type(model).__name__} has layers without attention, which the profiler can't "
            "measure yet: write a plan by hand, with full in those layers, and hfsparse.patch it"
        )
    if None not in windows(model):
        raise UsageError(
            f"every layer of this {type(model).__name__} has a sliding window of its own: there is "
            "nothing to make sparse. hfsparse.patch(model) runs it without a plan"
        )


def _settings(model: PreTrainedModel, method: str, prompts: dict[int, list[Prompt]]) -> str:
    """What measurements depend on: config, weights, method, prompts, versions."""
    seen = hashlib.sha256()
    for prompt in chain.from_iterable(prompts.values()):
        seen.update(prompt.ids.cpu().numpy().tobytes())
    settings = {
        "versions": [__version__, torch.__version__, transformers.__version__],
        "model": [ModelId.of(model).fingerprint, weights_mark(model), str(model.dtype)],
        "seen": seen.hexdigest(),
    }
    return json.dumps(settings | {"method": method}, sort_keys=True)


def _peak_bytes(model: PreTrainedModel) -> int:
    devices = {weight.device for weight in model.parameters()}
    if cards := [device for device in devices if device.type == "cuda"]:
        return sum(torch.cuda.max_memory_allocated(card) for card in cards)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
