"""Offline calibration: look at how each head attends, and write a plan.

    plan = hfsparse.profile(model, tokenizer, out="plan.yaml", lengths=(2048,))

A method of METHODS chooses; what it measures is kept beside `out` until the plan is written, so
that a killed run goes on where it was. Most capture (a forward and a backward pass a prompt),
measure (what candidates keep and lose) and allocate (one choice a head under the budgets).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfsparse.profiler.settings import Settings, with_keywords

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfsparse.plan import Plan


@with_keywords(Settings)
def profile(model: PreTrainedModel, tokenizer, settings: Settings) -> Plan:
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
    from hfsparse.profiler.run import run  # torch, only once it is called

    return run(model, tokenizer, settings)
