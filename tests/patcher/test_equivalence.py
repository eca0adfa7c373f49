"""A patched model is the dense model under the plan's boolean mask: families x plans x ways in."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

import hfsparse
from hfsparse import kernels
from hfsparse.kernels import reference
from hfsparse.lists import Grid
from hfsparse.patterns import PATTERNS
from hfsparse.runtime.call import use_tables
from tests.patcher.families import (
    BLOCKS,
    FAMILIES,
    VS,
    by_content_in_windows,
    corrected,
    evicting,
    full,
    growing,
    left_padded,
    mixed,
    own_window,
    plan_of,
    straddled,
    streaming,
    tiny,
    tokens,
    wide_window,
)
from tests.patcher.oracle import oracle
from tests.patcher.runs import both, close, continue_with, far, forward, generate, same_generation

LENGTH = 260  # with 0, 7 and 13 pads: rows of 260, 253 and 247 tokens


def under(model):
    """Thresholds no row reaches: everything is dense."""
    return mixed(model, below=(9999, 9999, 9999))


PLANS = {
    plan.__name__: plan
    for plan in (full, streaming, growing, mixed, evicting, straddled, corrected, under)
}
DENSE = ("full", "under")

every_family = pytest.mark.parametrize("family", FAMILIES)
every_plan = pytest.mark.parametrize("plan", PLANS)


@every_family
@every_plan
def test_one_forward_equals_the_oracle(family, plan):
    model = tiny(family)
    ids, mask = left_padded(LENGTH)
    dense = forward(model, ids, mask).logits
    got, want, stats = both(
        model, PLANS[plan](model), lambda m, cache: forward(m, ids, mask, **cache).logits
    )
    close(got, want, mask)
    if plan in DENSE:
        close(got, dense, mask)
        assert stats.pair_density == 1
    else:
        far(got, dense, mask)
        assert stats.pair_density < (0.95 if plan == "growing" else 0.8)


@every_family
@every_plan
def test_greedy_generation_equals_the_oracle(family, plan):
    model = tiny(family)
    ids, mask = left_padded(LENGTH)
    got, want, stats = both(
        model, PLANS[plan](model), lambda m, cache: generate(m, ids, mask, **cache)
    )
    same_generation(got, want)
    if plan in DENSE or all(own_window(model)):
        assert stats.decode_share == 1
    else:
        assert stats.decode_share < 0.85


@every_family
def test_sampled_generation_equals_the_oracle(family):
    model = tiny(family)
    ids, mask = left_padded(LENGTH)
    got, want, _ = both(
        model, straddled(model), lambda m, cache: generate(m, ids, mask, do_sample=True, **cache)
    )
    same_generation(got, want)
    greedy = generate(model, ids, mask)
    assert got.sequences.tolist() != greedy.sequences.tolist()


@every_family
@every_plan
@pytest.mark.parametrize("new", [9, 40], ids=["decode", "chunk"])
def test_a_second_turn_equals_the_oracle(family, plan, new):
    """9 new tokens on the filled cache are decoded, 40 are a chunk."""
    model = tiny(family)
    ids, mask = left_padded(LENGTH)
    more = tokens(3, new, seed=1)

    def turns(m, cache):
        first = forward(m, ids, mask, **cache)
        longer = continue_with(ids, mask, new)
        return forward(m, more, longer, cache=first.past_key_values).logits

    got, want, stats = both(model, PLANS[plan](model), turns)
    close(got, want)
    if plan not in DENSE:
        assert min(stats.pair_density, stats.decode_share if new == 9 else 1) < 0.95


@pytest.mark.parametrize("plan", PLANS)
def test_a_conversation_of_four_turns_equals_the_oracle(plan):
    """Turns by `generate` on the returned cache: prompt, short, long, short."""
    model = tiny("llama")

    def talk(m, cache):
        ids, mask = left_padded(230)
        turns = [generate(m, ids, mask, **cache)]
        for turn, new in enumerate((9, 40, 1)):
            ids = torch.cat([turns[-1].sequences, tokens(3, new, seed=turn)], 1)
            mask = continue_with(ids, mask, ids.shape[1] - mask.shape[1])
            turns.append(generate(m, ids, mask, cache=turns[-1].past_key_values, do_sample=True))
        return turns

    got, want, _ = both(model, PLANS[plan](model), talk)
    for ours, truth in zip(got, want, strict=True):
        same_generation(ours, truth)


@every_family
@pytest.mark.parametrize("plan", ["growing", "mixed", "straddled"])
def test_each_left_padded_row_equals_its_unpadded_run(family, plan):
    model = tiny(family)
    ids, mask = left_padded(LENGTH)
    with hfsparse.patch(model, PLANS[plan](model)):
        together = generate(model, ids, mask)
        for row, pads in enumerate((0, 7, 13)):
            alone = generate(model, ids[row : row + 1, pads:])
            assert together.sequences[row, pads:].tolist() == alone.sequences[0].tolist()
            close(torch.stack(together.logits, 1)[row], torch.stack(alone.logits, 1)[0])


@every_family
@pytest.mark.parametrize("plan", ["growing", "mixed"])
def test_without_a_cache_equals_the_oracle(family, plan):
    model = tiny(family)
    ids, mask = left_padded(LENGTH)
    got, want, stats = both(
        model, PLANS[plan](model), lambda m, cache: generate(m, ids, mask, new=3, use_cache=False)
    )
    same_generation(got, want)
    assert stats.pair_density < 0.95


def test_heads_that_choose_by_content_inside_a_window_equal_the_oracle():
    """One shot by their lists; behind a past they read the whole window."""
    model, more = wide_window(), tokens(3, 40, seed=1)
    ids, mask = left_padded(400)

    def turns(m, cache):
        first = forward(m, ids, mask, **cache)
        second = forward(m, more, continue_with(ids, mask, 40), cache=first.past_key_values)
        return first.logits, second.logits

    (first, second), (want_first, want_second), stats = both(
        model, by_content_in_windows(model), turns
    )
    close(first, want_first, mask)
    close(second, want_second)
    assert stats.pair_density < 0.7


def test_sampled_columns_halving_and_strides_equal_the_oracle():
    """Beside a full head, in a padded batch, one shot and behind a past."""
    model, more = tiny("llama"), tokens(3, 40, seed=1)
    ids, mask = left_padded(400)
    patterns = {
        "c": ("sample", dict(alpha=0.5, window=0.05)),
        "h": ("hip", dict(sink=0, recent=32)),
        "s": ("strided", dict(stride=4, random=1)),
    }
    words = ["c", "full", "h", "s"], ["full"] * 2, ["full"] * 2

    def turns(m, cache):
        first = forward(m, ids, mask, **cache)
        second = forward(m, more, continue_with(ids, mask, 40), cache=first.past_key_values)
        return first.logits, second.logits

    (first, second), (want_first, want_second), stats = both(
        model, plan_of(model, lambda *at: words, **patterns), turns
    )
    close(first, want_first, mask)
    close(second, want_second)
    assert stats.pair_density < 0.9


def test_a_rows_blocks_do_not_depend_on_its_neighbours():
    """A short row beside one past 4,096 tokens keeps the short row's block size."""
    model = tiny("llama")
    ids, mask = left_padded(4200, pads=(0, 3800))
    with hfsparse.patch(model, mixed(model)):
        together = forward(model, ids, mask).logits[1, 3800:]
        alone = forward(model, ids[1:, 3800:]).logits[0]
    close(together, alone)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
@pytest.mark.parametrize("plan", ["streaming", "mixed", "straddled"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 31, 33, 64, 65, 129, 257])
def test_any_prompt_length_equals_the_oracle(family, plan, length):
    """Single tokens, prompts shorter than the sink, odd lengths, page and block borders."""
    model = tiny(family)
    ids = tokens(1, length)
    got, want, _ = both(
        model, PLANS[plan](model), lambda m, cache: generate(m, ids, new=8, **cache)
    )
    same_generation(got, want)


@cache
def stock_chunks() -> bool:
    """Whether this transformers, unpatched, answers alike with a prompt in chunks."""
    model = tiny("llama")
    ids, mask = left_padded(120)
    try:
        pieces = generate(model, ids, mask, prefill_chunk_size=17)
    except ValueError:  # 5.0: "Cannot use prefill chunking without a cache"
        return False
    return pieces.sequences.tolist() == generate(model, ids, mask).sequences.tolist()


@pytest.fixture
def chunks_work():
    if not stock_chunks():
        pytest.skip("transformers' own prefill in chunks is broken in this version")


def test_chunks_are_tested_where_transformers_can_do_them():
    if Version(transformers.__version__) >= Version("5.17"):
        assert stock_chunks()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["full", "streaming", "growing"])
@pytest.mark.parametrize("chunk", [7, 17, 64])
@pytest.mark.usefixtures("chunks_work")
def test_prefill_in_chunks_equals_one_shot(family, plan, chunk):
    """Streaming plans: heads read the same keys, however the prompt comes."""
    model = tiny(family)
    ids, mask = left_padded(120)
    with hfsparse.patch(model, PLANS[plan](model)):
        once = generate(model, ids, mask)
        pieces = generate(model, ids, mask, prefill_chunk_size=chunk)
    same_generation(pieces, once)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("chunks_work")
def test_prefill_in_chunks_equals_the_oracle_fed_the_same_chunks(family):
    """Heads that choose by content choose anew in each chunk, over all that came before."""
    model = tiny(family)
    ids, mask = left_padded(260)
    got, want, _ = both(
        model,
        mixed(model),
        lambda m, cache: generate(m, ids, mask, prefill_chunk_size=65, **cache),
    )
    same_generation(got, want)


@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("chunk", [9, 40])
@pytest.mark.usefixtures("chunks_work")
def test_prefill_in_chunks_knows_the_whole_prompts_length(chunk, pads):
    """`below` compares the whole prompt, also where the first chunks are shorter than it."""
    model = tiny("llama")
    ids, mask = left_padded(120, pads)
    plan = streaming(model, below=(100, 100, 110))
    with hfsparse.patch(model, plan):
        once = generate(model, ids, mask)
        pieces = generate(model, ids, mask, prefill_chunk_size=chunk)
    same_generation(pieces, once)


@pytest.mark.parametrize("plan", [full, streaming])
def test_full_heads_behind_a_past_follow_lists_where_a_fused_kernel_serves_them(plan):
    """For sdpa a later chunk would need masks, and one call for a few queries each."""
    seen = []

    def fused(q, k, v, lists, *args, **more):
        seen.append(q.shape[1])
        return reference.prefill(q, k, v, lists, *args, **more)

    def answer(model) -> torch.Tensor:
        cache = DynamicCache()
        with hfsparse.patch(model, plan(model)) as handle:
            forward(model, ids[:, :150], mask[:, :150], cache)
            seen.clear()
            scores = forward(model, ids[:, 150:], mask, cache).logits
            assert handle.stats().pair_density == pytest.approx(density)
        return scores

    model, (ids, mask) = tiny("llama"), left_padded(260)
    with hfsparse.patch(model, plan(model)) as handle:
        forward(model, ids, mask)
        density = handle.stats().pair_density
    want = answer(model)
    assert not seen
    lists_alone = lambda need: None if need.lists else "lists alone"  # noqa: E731
    row = kernels.Kernel("fused", fused, lists_alone, fused=True)
    prefill = kernels.PREFILL[1], row, kernels.PREFILL[3]
    with use_tables(kernels.TABLES._replace(prefill=prefill)):
        close(answer(model), want)
    assert sum(seen) == model.config.num_hidden_layers * model.config.num_attention_heads


@pytest.mark.usefixtures("chunks_work")
def test_a_step_after_taking_back_part_of_a_prompt_in_chunks_is_decode():
    model, ids = tiny("llama"), tokens(1, 260)
    with hfsparse.patch(model, mixed(model)):
        steps = []
        for more in ({}, {"prefill_chunk_size": 300}):
            cache = generate(model, ids, new=1, **more).past_key_values
            cache.crop(-20)
            steps.append(forward(model, ids[:, :1], cache=cache).logits)
    close(*steps)


def test_the_oracle_drops_what_the_plan_says():
    """The oracle itself: half the heads streaming means half the pairs, and other logits."""
    model, ids = tiny("llama"), tokens(1, 100)
    plan = streaming(model)
    with oracle(model, plan) as truth:
        sparse = forward(model, ids, cache=DynamicCache()).logits
    far(sparse, forward(model, ids).logits)
    kept = sum(min(p + 1, 5) + min(max(p - 4, 0), 2) for p in range(100))
    assert truth.pairs[0, 0] == kept
    assert truth.pairs[0, 2] == truth.causal[0, 2] == 100 * 101 // 2


@pytest.mark.parametrize("pattern", [VS, BLOCKS], ids=lambda pattern: pattern[0])
def test_the_plans_patterns_choose_by_content(pattern):
    """Other queries and keys, other pairs: forced blocks alone would test no choice."""
    kind, values = pattern
    grid = Grid(torch.tensor([LENGTH]), torch.tensor([LENGTH]), LENGTH, LENGTH, 32)
    torch.manual_seed(0)
    drawn = [torch.randn(2, 1, 1, LENGTH, 16) for _ in range(2)]
    one, other = (PATTERNS[kind](**values).lists(*qk, grid, 0.25).mask() for qk in drawn)
    assert (one != other).float().mean() > 0.02
