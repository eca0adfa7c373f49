"""The whole job on SmolLM2-135M at 1,536 tokens: which heads a plan keeps decides everything."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from unittest.mock import patch

import pytest
import torch
from transformers import DynamicCache

import hfsparse
from hfsparse.kernels import cpu
from hfsparse.models.loading import load
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, Plan
from hfsparse.profiler import run
from hfsparse.profiler.prompts.calibration import Prompt, make_prompts
from hfsparse.stats import Stats
from hfsparse_eval.run.generate import answer
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.samples import Suite
from hfsparse_eval.tasks import TASKS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # profiling takes some minutes
LENGTH, SAMPLES = 1536, 3
BUDGETS = dict(prefill_density=0.36, cache_share=0.415, decode_share=0.3)
PROFILE = dict(samples=3, method="minference", verify=False, **BUDGETS)


@pytest.fixture(scope="module")
def real(smollm2):
    return load(str(smollm2))


@pytest.fixture(scope="module")
def plan(real) -> Plan:
    """Of one prompt that hides facts: each more takes a minute."""

    def first(*args) -> list[Prompt]:
        return [prompt for prompt in make_prompts(*args) if prompt.answer_span is not None][:1]

    every = patch.object(cpu, "GATHERING_PAYS", 0)  # patterns that gather, too
    with patch.object(run, "make_prompts", first), every:
        return hfsparse.profile(*real, lengths=(LENGTH,), **PROFILE)


@pytest.fixture(scope="module")
def needles(real):
    """Prompts that hide a number in prose; the dense model finds each (checked below)."""
    prompter = Prompter(real[1], "auto")
    suite = Suite([TASKS["niah_single_2"]], [LENGTH], SAMPLES, prompter, 0, (None,))
    return [suite.sample(case) for case in suite.cases]


@pytest.fixture(scope="module")
def profiled(real, needles, plan) -> tuple[int, Stats]:
    return found(real, needles, plan)


def found(real, needles, plan: Plan | None) -> tuple[int, Stats | None]:
    """How many needles are answered, and what the last answer measured."""
    if plan is None:
        return sum(n.answers[0] in answer(*real, n, 12).text for n in needles), None
    with hfsparse.patch(real[0], plan) as handle:
        count = sum(n.answers[0] in answer(*real, n, 12).text for n in needles)
        return count, handle.stats()


def shuffled(plan: Plan, seed: int) -> Plan:
    """The same words for other heads: kv groups drawn at random, so every density is the same."""
    group = plan.model.q_heads // plan.model.kv_heads
    groups = [
        (layer.prefill[g * group : (g + 1) * group], layer.cache[g], layer.decode[g])
        for layer in plan.layers
        for g in range(plan.model.kv_heads)
    ]
    Random(seed).shuffle(groups)
    layers = []
    for i in range(0, len(groups), plan.model.kv_heads):
        prefill, cache, decode = zip(*groups[i : i + plan.model.kv_heads], strict=True)
        layers.append(Layer(sum(prefill, ()), cache, decode))
    return replace(plan, layers=tuple(layers))


def test_the_dense_model_finds_every_needle(real, needles):
    assert found(real, needles, None)[0] == SAMPLES


def test_the_profiled_plan_keeps_the_needle_at_its_budgets(profiled):
    count, stats = profiled
    assert count >= SAMPLES - 1
    assert stats.pair_density <= 0.40
    assert stats.cache_share <= 0.45
    assert stats.decode_share <= 0.33


def test_a_plan_of_streaming_heads_only_loses_the_needle(real, needles, plan):
    model = plan.model
    short = Layer(("s",) * model.q_heads, ("s",) * model.kv_heads, ("ring",) * model.kv_heads)
    streaming = replace(plan, patterns={"s": Streaming(64, 256)}, layers=(short,) * model.layers)
    assert found(real, needles, streaming)[0] <= 1  # one of them stands near the end


def test_the_same_densities_on_heads_drawn_at_random_lose_the_needle(real, needles, plan, profiled):
    """Each needle under another draw."""
    count = 0
    for seed, needle in enumerate(needles):
        one, stats = found(real, [needle], shuffled(plan, seed))
        count += one
        assert stats.cache_share == pytest.approx(profiled[1].cache_share, abs=0.02)
        assert stats.pair_density == pytest.approx(profiled[1].pair_density, abs=0.05)
    assert count <= 1


def test_a_prompt_in_chunks_says_nearly_the_same(real, needles, plan):
    """Heads that choose by content choose for each chunk anew; the rest give the same."""
    model, ids = real[0], torch.tensor([needles[0].ids])

    def said(chunk: int) -> torch.Tensor:
        """Log-probabilities of the last 64 tokens."""
        cache, parts = DynamicCache(), []
        for part in ids.split(chunk, 1):
            mask = torch.ones(1, cache.get_seq_length() + part.shape[1])
            parts.append(model(part, past_key_values=cache, attention_mask=mask).logits)
        return torch.cat(parts, 1)[0, -64:].log_softmax(-1)

    full = replace(plan.below, prefill=0, cache=0)
    with torch.inference_mode(), hfsparse.patch(model, replace(plan, below=full)):
        whole, chunked = said(LENGTH), said(LENGTH // 4)
    apart = (whole.exp() * (whole - chunked)).sum(1).mean().item()
    print(f"KL of one-shot to chunks of {LENGTH // 4}: {apart:.4f}")
    assert 0 < apart < 0.002
