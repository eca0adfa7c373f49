"""Densities and shares mean one thing: in `expected`, `stats()`, `hfsparse eval` and `check`."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    cache_utils,
)
from typer.testing import CliRunner

import hfsparse
from hfsparse import cli
from hfsparse.errors import UsageError
from hfsparse.patcher import figures, memory
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan, headmap
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.profiler.report import describe_budgets
from hfsparse.profiler.settings import Settings
from hfsparse.selectors.quest import Quest
from hfsparse.stats import FIGURES
from hfsparse_eval.arms import Sparse
from hfsparse_eval.run import runner
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.results import Results
from hfsparse_eval.run.results import Settings as RunSettings
from hfsparse_eval.run.samples import Suite
from hfsparse_eval.run.world import Session
from hfsparse_eval.tasks import TASKS
from tests import tiny
from tests.support import models

WINDOW = 96
SIZES = dict(
    vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=5,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
    bos_token_id=0, eos_token_id=None, sliding_window=WINDOW,
    layer_types=[f"{kind}_attention" for kind in "sliding sliding full sliding full".split()],
)  # fmt: skip


def gemma3():
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)).eval()


def gpt_oss():
    """Windows, and sink logits that take a part of every softmax."""
    torch.manual_seed(0)
    experts = dict(num_local_experts=4, num_experts_per_tok=2)
    return models.random(GptOssForCausalLM(GptOssConfig(**SIZES, **experts)))


def plain():
    return tiny.llama(window=2048)


FAMILIES = {"plain": plain, "gemma3": gemma3, "gpt_oss": gpt_oss}
METHODS = {
    "balanced": dict(method="balanced"),
    "in bits": dict(method="balanced", bits=(16, 8, 4), cache_share=0.4, decode_share=0.7),
    "minference": dict(method="minference"),
    "moa": dict(method="moa", prefill_density=0.9, cache_share=0.95),
    "duo": dict(method="duo", proxy="error", decode_share=0.8, prefill_density=1.0),
    "streaming-llm": dict(method="streaming-llm"),
    "mixed": dict(
        method="duo", prefill_method="minference", proxy="error", decode_share=1.0
    ),
}  # fmt: skip
SETTINGS = dict(lengths=(700,), samples=1, verify=False, cache_share=0.75, decode_share=0.6)


def by_hand(model) -> Plan:
    """A ring that grows and one that doesn't, and chosen pages, in layers that may be sparse."""
    this, patterns = ModelId.of(model), {}
    patterns |= {"near": Streaming(8, 100), "grow": Streaming(8, 32, 0.125), "q": Quest(0.25, 3)}
    full = Plan.full(this).layers[0]
    rings = Layer(("near",) * 2 + ("grow",) * 2, ("near", "grow"), ("ring",) * 2)
    pages = Layer(("near", "full", "full", "grow"), ("full",) * 2, ("q", "full"))
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * this.layers
    free = iter([pages, rings] * this.layers)
    layers = tuple(next(free) if kind == "full_attention" else full for kind in kinds)
    plan = Plan(this, patterns, layers)
    plan.check(model)
    return plan


def ran(model, plan, ids) -> hfsparse.stats.Stats:
    """Under a plan: a prompt and one step."""
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        out = model(ids[:, :-1])
        model(ids[:, -1:], past_key_values=out.past_key_values)
        return handle.stats()


def agree(said: dict[str, float], stats, end: str = "") -> None:
    for name in FIGURES:
        if name + end in said:
            assert getattr(stats, name) == pytest.approx(said[name + end], rel=0.01), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_profile_expects_what_the_patched_model_measures(family, method):
    model, tokenizer = FAMILIES[family](), tiny.tokenizer()
    if method == "in bits" and family == "plain":
        model = model.bfloat16()  # scales and newest pages are another share of it
    plan = hfsparse.profile(model, tokenizer, **SETTINGS | METHODS[method])
    assert {word for layer in plan.layers for word in layer.cache} != {"full"}
    (prompt,) = make_prompts(tokenizer, 700, 1, 0)
    stats = ran(model, plan, prompt.ids)
    said = plan.expected[700]
    assert {*FIGURES} <= said.keys()
    agree(said, stats)
    kept = [plan.patterns.get(word) for layer in plan.layers for word in layer.cache]
    assert any(getattr(each, "bits", 16) == 4 for each in kept) == (method == "in bits")
    assert said.get("cache_share_free", said["cache_share"]) <= {"in bits": 0.4}.get(method, 1.2)
    assert any("_free" in name for name in said) == (family != "plain")
    agree(said, stats.free, "_free")
    Plan.loads(plan.dumps())


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_figures_are_sums_of_work_and_of_bytes(family):
    """In plain words: `by_hand`'s plan at 701 tokens, counted layer by layer."""
    model = FAMILIES[family]()
    plan, L = by_hand(model), 701
    ids = torch.arange(L)[None] % 390 + 2
    stats = ran(model, plan, ids)
    pairs = cells = kept = whole = read = total = 0
    for words, layer in zip(plan.layers, stats.layers, strict=True):
        window = layer.window or L
        causal = [min(p + 1, window) for p in range(L - 1)]
        for word in words.prefill:
            pattern = plan.patterns.get(word)
            reach = [L] * L if pattern is None else reaches(pattern, L)
            pairs += sum(map(min, causal, reach))
            cells += sum(causal)
        for cache, decode in zip(words.cache, words.decode, strict=True):
            pages = -(-L // 64)
            held = 64 * pages + (2 * pages / 2 if decode == "q" else 0)  # 2 vectors a page
            seen = min(L, window)
            if layer.window or cache != "full":
                band = Streaming(0, window).band if layer.window else plan.patterns[cache].band
                held, seen = band.sink + size(band, L), min(L, band.sink + band.span(L - 1))
            if decode == "q":
                seen = 3 * 64 - -L % 64
            kept, whole = kept + held, whole + min(L, window)
            read, total = read + seen, total + min(L, window)
    assert stats.pair_density == pytest.approx(pairs / cells)
    assert stats.cache_share == pytest.approx(kept / whole)
    assert stats.decode_share == pytest.approx(read / total)


def reaches(pattern: Streaming, length: int) -> list[int]:
    return [pattern.sink + pattern.band.span(p) for p in range(length)]


def size(band, tokens: int) -> int:
    """Slots behind a ring's sink: 32 tokens of slack, and whole pages where it grows."""
    slots = band.span(tokens) + 32
    return -(-slots // 64) * 64 if band.rate else slots


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
@pytest.mark.parametrize("length", [40, 300])
def test_the_stock_cache_counts_as_what_transformers_holds(family, length):
    """A layer with a window holds its tokens when a step has joined them to the new one."""
    model, ids = FAMILIES[family](), torch.arange(length)[None] % 390 + 2
    stats = ran(model, by_hand(model), ids)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        model(ids[:, -1:], past_key_values=cache)
    stored = [t.untyped_storage().nbytes() for x in cache.layers for t in (x.keys, x.values)]
    assert stats.kv_bytes_dense == sum(stored)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_next", "lfm2"])
@pytest.mark.parametrize("length", [300, 1100])
def test_check_predicts_what_stats_tells(family, length, tmp_path):
    """Hybrids, too: their linear layers' states are in no share, and counted beside the cache.
    The plain model's longer cache is in 4 bits."""
    hybrid = family not in FAMILIES
    if hybrid and not hasattr(cache_utils, "LinearAttentionLayer"):
        pytest.skip("hybrids are followed from transformers 5.17 on")
    model = models.tiny(family) if hybrid else FAMILIES[family]()
    plan = by_hand(model)
    if family == "plain" and length > 1000:
        plan = plan.with_bits(4, model)
    ids = torch.arange(length)[None] % 90 + 2
    stats = ran(model, plan, ids[:, :length])
    model.save_pretrained(tmp_path)
    plan.save(tmp_path / "plan.yaml")
    command = ["check", str(tmp_path / "plan.yaml"), str(tmp_path), "--length", str(length)]
    told = CliRunner().invoke(cli.app, [*command, "--dtype", "float32"])
    assert told.exit_code == 0, told.output
    assert ("work + states = peak" in told.output) == hybrid
    assert memory.predict(model.config, plan, length, itemsize=4).states == stats.state_bytes
    lines = re.findall(r"shares .*: cache share ([\d.]+), decode share ([\d.]+)", told.output)
    parts = {"": stats} if hybrid or family == "plain" else {"": stats, "_free": stats.free}
    assert len(lines) == len(parts)
    for (cache, decode), part in zip(lines, parts.values(), strict=True):
        assert part.cache_share == pytest.approx(float(cache), rel=0.01)
        assert part.decode_share == pytest.approx(float(decode), rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_tells_of_a_sample_what_the_plan_and_its_length_do(family, tmp_path):
    """Room for answers that may still come is no part of a share."""
    model, tokenizer = FAMILIES[family](), tiny.tokenizer()
    plan = by_hand(model)
    suite = Suite([TASKS["niah_single_1"]], [1024], 1, Prompter(tokenizer, "never"))
    settings = RunSettings(
        "ruler", "tiny", "sha256:m", "w", "0.1.0", "float32", 0, "never", 100, "prose"
    )
    found = Results(tmp_path, settings, {"machine": "this"})
    runner.run(Session(model, tokenizer, found, [Sparse(plan)]), suite, 100)
    (line,) = [line for line in found.lines if line["arm"] == "sparse"]
    tokens = line["prompt_tokens"] + line["new_tokens"] - 1
    told = figures.predict(model.config, plan, tokens)
    assert line["cache_share"] == pytest.approx(told.cache_share, rel=0.01)
    assert line["decode_share"] == pytest.approx(told.decode_share, rel=0.01)
    (sample,) = map(suite.sample, suite.cases)
    stats = ran(model, plan, torch.tensor([[*sample.ids, 5]]))
    assert line["pair_density"] == pytest.approx(stats.pair_density, abs=1e-6)
    assert line["block_density"] == pytest.approx(stats.block_density, abs=1e-6)


def test_room_reserved_for_an_answer_is_allocated_and_in_no_share():
    model = plain()
    ids = torch.arange(500)[None] % 390 + 2
    with hfsparse.patch(model) as handle:
        model.generate(ids, max_new_tokens=400, stop_strings=None, eos_token_id=list(range(400)))
        stats = handle.stats()
    assert stats.kv_bytes > 1.7 * stats.kv_bytes_dense
    assert stats.cache_share == 512 / 500


# ---- budgets


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_budgets_are_shares_of_what_a_plan_may_change(family):
    model, tokenizer = FAMILIES[family](), tiny.tokenizer()
    budgets = dict(prefill_density=0.5, cache_share=0.6, decode_share=0.4)
    plan = hfsparse.profile(model, tokenizer, **SETTINGS | budgets)
    said = plan.expected[700]
    for name, share in zip(
        ("pair_density", "cache_share", "decode_share"), budgets.values(), strict=True
    ):
        assert said[f"{name}_free"] <= share + 1e-4, name
        assert said[f"{name}_free"] < said[name] - 0.02, name
    assert said["cache_share_free"] > 0.45  # what may be kept is kept
    assert said["recall"] < 1


def test_a_budget_that_cannot_be_met_says_the_smallest_that_can():
    model, tokenizer = gemma3(), tiny.tokenizer()
    settings = SETTINGS | dict(prefill_density=1.0, decode_share=1.0)
    with pytest.raises(UsageError, match="can be by itself") as error:
        hfsparse.profile(model, tokenizer, **settings | {"cache_share": 0.05})
    least = float(re.search(r"itself: .*cache share ([\d.]+), decode", str(error.value))[1])
    plan = hfsparse.profile(model, tokenizer, **settings | {"cache_share": least + 1e-3})
    assert plan.expected[700]["cache_share_free"] == pytest.approx(least, abs=1e-3)


def held(model, plan, length) -> float:
    """GiB that the patched model's cache allocates for a prompt of this length."""
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        model(torch.arange(length)[None] % 390 + 2)
        return handle.stats().kv_bytes / 2**30


@pytest.mark.parametrize("method", ["balanced", "duo", "streaming-llm"])
@pytest.mark.parametrize("family", ["plain", "gemma3"])
def test_a_budget_in_gib_is_of_the_whole_cache_at_its_length(family, method):
    """Rings are a smaller share of a longer row: the budget is kept, and filled, there."""
    model, tokenizer, at = FAMILIES[family](), tiny.tokenizer(), 1400
    asked = SETTINGS | METHODS[method] | dict(prefill_density=1.0, decode_share=1.0, at=at)
    del asked["cache_share"]
    dense = held(model, Plan.full(ModelId.of(model)), at)
    plan = hfsparse.profile(model, tokenizer, **asked, cache_gib=0.7 * dense)
    assert 0.5 * dense < held(model, plan, at) <= 0.7 * dense
    assert (plan.made["cache_gib"], plan.made["at"]) == (0.7 * dense, at)
    told = describe_budgets(plan, Settings(**asked, cache_gib=0.7 * dense), model)
    assert re.search(rf"cache \S+ of {0.7 * dense:.3g} GiB at 1400 tokens met", told)
    if family == "gemma3":
        with pytest.raises(UsageError, match="Give") as error:
            hfsparse.profile(model, tokenizer, **asked, cache_gib=0.14 * dense)
    if family == "gemma3" and method == "balanced":
        least = float(re.search(r"([\d.e-]+) GiB of the", str(error.value))[1])
        plan = hfsparse.profile(model, tokenizer, **asked, cache_gib=1.01 * least)
        assert held(model, plan, at) == pytest.approx(least, rel=0.02)


def test_a_legend_tells_the_part_that_a_plan_may_change_apart():
    model = gemma3()
    plan = by_hand(model)
    plan.expected = {700: figures.predict(model.config, plan, 700).figures() | {"recall": 0.5}}
    told = headmap.legend(plan).plain
    first, second = re.findall(r"^ +(?:700|free)  .*$", told, re.MULTILINE)
    assert float(first.split()[1]) > float(second.split()[1])
    assert "budgets are shares of it" in told
    plan.expected = {700: {"cache_share": 0.5}}
    assert "free" not in headmap.legend(plan).plain
