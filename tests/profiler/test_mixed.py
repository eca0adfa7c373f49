"""Methods mixed by phase: rings stream in prompts, other heads take the prompts' method."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.patcher.figures import Prompts
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler.job import Forecast, Found, Job
from hfsparse.profiler.methods import mixed
from hfsparse.profiler.parts import Parts
from hfsparse.profiler.progress import silent
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.solve.allocation import Budget
from tests import tiny

SETTINGS = dict(lengths=(1024,), samples=1, verify=False, decode_share=1.0)


def test_a_mixed_plan_takes_prompts_from_one_method_and_the_rest_from_another():
    model, tok = tiny.llama(window=1024), tiny.tokenizer()
    whole = dict(cache_share=1.0, prefill_density=0.4, method="minference")
    rest = dict(cache_share=0.7, proxy="error", method="duo")
    one = hfsparse.profile(model, tok, **SETTINGS | whole)
    other = hfsparse.profile(model, tok, **SETTINGS | rest, prefill_density=1.0)
    both = dict(prefill_density=0.4, prefill_method="minference")
    plan = hfsparse.profile(model, tok, **SETTINGS | rest, **both)
    plan.check(model)
    assert (plan.made["method"], plan.made["prefill_method"]) == ("duo", "minference")
    assert {word for layer in plan.layers for word in layer.cache} == {"full", "stream"}
    for layer, mine, theirs in zip(plan.layers, one.layers, other.layers, strict=True):
        assert (layer.cache, layer.decode) == (theirs.cache, theirs.decode)
        for q, word in enumerate(layer.prefill):
            ring = layer.cache[q // 2] == "stream"
            assert word == (theirs if ring else mine).prefill[q]
    expected = plan.expected[1024]
    assert "recall" not in expected  # duo measures none
    (prompt,) = make_prompts(tok, 1024, 1, 0)
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        model(prompt.ids)
        stats = handle.stats()
    assert stats.pair_density == pytest.approx(expected["pair_density"], abs=1e-3)
    assert stats.cache_share == pytest.approx(expected["cache_share"], abs=1e-3)


def test_a_word_that_means_two_things_is_renamed_and_each_method_hears_its_own():
    model, heard, whole = tiny.llama(), {}, Prompts(np.ones((2, 4)), np.ones((2, 4)))
    full = Plan.full(ModelId.of(model))

    def method(who: str, recent: int, cache: tuple[str, ...]):
        words = tuple(word for word in cache for _ in range(2))
        reads = tuple("full" if word == "full" else "ring" for word in cache)

        def plan(job):
            layers = (Layer(("near",) * 4 if who == "one" else words, cache, reads),) * 2
            heard[who] = job.budget
            made = replace(full, layers=layers, patterns={"near": Streaming(4, recent)})
            hear = lambda layers: heard.update({f"{who} layer": layers[0]}) or {8: whole}  # noqa: E731
            return Found(made, Forecast(job, {}, hear))

        return plan

    job = Job(model, None, {8: []}, Budget(0.1, 0.2, 0.3), Parts(None, ""), silent)
    one, other = method("one", 8, ("full", "full")), method("other", 16, ("near", "full"))
    plan = mixed.plan(job, one, other).plan
    plan.validate()
    assert plan.layers[0].prefill == ("near", "near", "near-prompt", "near-prompt")
    assert plan.patterns == {"near": Streaming(4, 16), "near-prompt": Streaming(4, 8)}
    assert heard["one layer"] == Layer(("full", "full", "near", "near"), *[("full",) * 2] * 2)
    assert heard["other layer"] == replace(plan.layers[0], prefill=("near", "near", "full", "full"))
    assert (heard["one"], heard["other"]) == (Budget(0.1, 1, 1), Budget(1, 0.2, 0.3))


def test_a_method_that_tells_nothing_of_its_plan_is_refused_in_a_mix():
    model, settings = tiny.llama(window=1024), Settings(method="duo", prefill_method="moa")
    job = Job(model, None, {8: []}, Budget(0.1, 0.2, 0.3), Parts(None, ""), silent, settings)

    def tell_nothing(job):
        return Found(Plan.full(ModelId.of(model)))

    with pytest.raises(UsageError, match="method moa does not tell what a plan computes"):
        mixed.plan(job, tell_nothing, tell_nothing)
