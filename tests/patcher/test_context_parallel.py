"""Ranks that share a prompt's tokens answer as one process does, under plans of whole rows."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import hfsparse
from hfsparse.runtime.parts import share_as_star
from tests.patcher.context_work import (
    BITS,
    CASES,
    FEW,
    NEW,
    STAR,
    STARS,
    UNIT,
    Ranks,
    answer_alone,
    answer_in_beams,
    ask_four,
    ask_one,
    ask_two,
)
from tests.patcher.families import STREAM, fresh, heads, streaming
from tests.patcher.ranks import run

ONE_SENTENCE = {
    "no group": "context_parallel is a str: give a process group of torch.distributed",
    "way": "way is 'ring': give exact or star",
    "question": "question is 0: give tokens, 1 or more",
    "anchor": "anchor is -1: give tokens, 0 or more, or None",
    "anchor of another type": "anchor is '1': give tokens, 0 or more, or None",
    "anchor of exact": "way is exact, which has no anchor: leave it out",
    "two plans": "ranks follow different plans (sha256:",
    "two ways": "star, anchor a part, question 128 on rank 1): give every rank the same one",
    "exact": "exact=True can't be followed where ranks share a prompt's tokens",
    "fuse": "fuse=True can't be followed where ranks share a prompt's tokens",
    "evicting": "each chunk evicts keys that the next ones would read",
    "means": "steps of the plan read what they leave out by its means",
    "hosted": "the plan keeps keys in host memory",
    "rope": "rope dynamic may depend on a call's length",
    "short": "a prompt of 100 tokens is too short for its ranks to share: they take 4 parts of 64",
    "padded": "its rows are padded",
    "chunks": "prefill_chunk_size: ranks that share a prompt read it in one call",
    "drafts": "generate without an assistant and without prompt lookup",
    "other prompts": "ranks were given different prompts",
    "no cache": "it keeps no cache",
    "hidden states": "it asks for hidden states",
    "crop": "tokens can't be taken back from a cache whose parts lie on several ranks",
    "keys": "this cache can't be read or rebuilt as transformers' own",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def two(made):
    return run(2, ask_two, made)


@pytest.fixture(scope="module")
def four(made, two):  # behind two, whose caches these refuse
    return run(4, ask_four, made)


@pytest.fixture(scope="module")
def one(made):
    return run(1, ask_one, made)


def same(got, want, loose: bool = False) -> None:
    """Tokens, and logits to rounding; loose: to that of 8 bits."""
    assert got[0].tolist() == want[0].tolist()
    for own, other in zip(got[1:3], want[1:3], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-2 if loose else 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_answer_as_one_process(two, case):
    *want, alone = answer_alone(case, 2)
    for rank in two:
        same(rank[case], want, loose=case == BITS)
    gathered = two[0][case][4]
    assert gathered == two[1][case][4]
    assert gathered.pair_density == pytest.approx(alone.pair_density)
    assert gathered.block_density == pytest.approx(alone.block_density)
    assert alone.decode_share <= gathered.decode_share  # rings count on each rank


@pytest.mark.parametrize("case", FEW)
def test_four_ranks_answer_as_one_process(four, case):
    *want, _ = answer_alone(case, 4)
    for rank in four:
        same(rank[case], want)


def test_beams_reorder_the_parts_of_every_rank(two):
    model = fresh("llama")
    with hfsparse.patch(model, streaming(model)):
        want = answer_in_beams(model)
    for rank in two:
        assert rank["beams"].tolist() == want.tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_part_of_the_keys_and_says_so(two, four, ranks):
    for at, rank in enumerate({2: two, 4: four}[ranks]):
        *_, own, gathered, told = rank["full"]
        assert own.cache_share == pytest.approx(1 / ranks, abs=0.1)  # parts are whole pages
        assert own.decode_share == pytest.approx(1 / ranks, abs=0.1)
        assert gathered.decode_share == pytest.approx(1)
        assert f"{own}".startswith(f"rank {at} of {ranks}, its own tokens (exact): pair density 1")
        assert f"context parallel: rank {at} of {ranks}, its own tokens (exact)" in told
        assert "as a CUDA graph: no (context parallel: " in told


def allowed(q_heads: int, ranks: int, anchor: int | None) -> Tensor:
    """bool `[q heads, S, S]`: what Star Attention's queries read, where they lie; all are full."""
    end, length = STAR.length, STAR.length + NEW - 1
    parts = share_as_star(end, UNIT, Ranks(ranks, STAR.question, anchor))
    at = torch.arange(length)
    may = at[:, None] >= at
    for rank, ((start, stop),) in enumerate(parts.kept):
        anchors = parts.read[rank][0][1] if len(parts.read[rank]) > 1 else 0
        may[start:stop] &= (at < anchors) | (at >= start)
    return may.expand(q_heads, -1, -1).clone()


def streamed(may: Tensor, model, layer: int, ranks: int) -> Tensor:
    """What is left of that where every second kv head is a ring, counted in what a rank reads."""
    Hq, Hkv = heads(model)
    parts = share_as_star(STAR.length, UNIT, Ranks(ranks, STAR.question, None))
    sink, recent = STREAM[1]["sink"], STREAM[1]["recent"]
    at = torch.arange(may.shape[-1])
    near = (at < sink) | (at[:, None] - at < recent)
    for reads in parts.read[1:]:  # where a part begins, the window goes on in the anchor
        (_, end), (start, stop) = reads
        place = torch.where(at < end, at, at - start + end)
        inside = (at < end) | ((at >= start) & (at < stop))
        near[start:stop] = ((place < sink) | (place[start:stop, None] - place < recent)) & inside
    rings = [(h * Hkv // Hq + layer) % 2 == 0 for h in range(Hq)]
    may[rings] &= near
    return may


@torch.no_grad()
def star_of_one_process(ids: Tensor, ranks: int, case: str) -> Tensor:
    """Logits `[1, NEW, V]` of the stock model behind boolean masks."""
    plan, anchor = STARS[case]
    model = fresh("llama")
    model.set_attn_implementation("eager")
    whole = allowed(heads(model)[0], ranks, anchor)

    def masked(module, args, kwargs):
        may = whole.clone()
        if plan is streaming:
            may = streamed(may, model, module.layer_idx, ranks)
        mask = torch.where(may, 0.0, -torch.inf)[None]
        return args, {**kwargs, "attention_mask": mask}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)
    return model(ids[:, :-1]).logits[:, STAR.length - 1 :]


@pytest.mark.parametrize(
    ("case", "ranks"),
    [*((case, 2) for case in STARS), *product(("full", "rings"), (1, 4))],
)
def test_star_is_its_definition(one, two, four, ranks, case):
    for rank in {1: one, 2: two, 4: four}[ranks]:
        ids, logits = rank["star"][case]
        want = star_of_one_process(ids, ranks, case)
        assert ids[0, STAR.length :].tolist() == want.argmax(-1)[0].tolist()
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", ["full", "rings"])
def test_a_star_of_one_part_reads_what_one_process_reads(one, case):
    model, (plan, _) = fresh("llama"), STARS[case]
    with hfsparse.patch(model, plan(model)):
        want = model(one[0]["star"][case][0][:, :-1]).logits[:, STAR.length - 1 :]
    torch.testing.assert_close(one[0]["star"][case][1], want, rtol=1e-4, atol=2e-5)


def test_star_is_not_exact(two):
    (_, without), (_, behind) = (two[0]["star"][case] for case in ("no anchor", "full"))
    assert (without[0, 0] - behind[0, 0]).abs().max() > 0.01


@pytest.mark.parametrize("what", ONE_SENTENCE)
def test_what_ranks_can_not_share_is_refused_on_all_in_one_sentence(two, what):
    for rank in two:
        assert ONE_SENTENCE[what] in rank["refused"][what]


def test_a_cache_goes_on_from_a_folder_on_the_rank_that_saved_it(two, four):
    for rank in two:
        got, want = rank["saved"]
        assert torch.equal(got, want)
    for at, rank in enumerate(four):
        said = rank["refused"]["two ranks"]
        assert "saved with heads rank 0 of 2, its own tokens (exact)" in said
        assert f"and here it is rank {at} of 4" in said
