"""Ranks that share a model's heads give what one process gives, under plans of whole heads."""

from __future__ import annotations

import pytest
import torch

import hfsparse
from tests.patcher.families import tokens
from tests.patcher.ranks import run
from tests.patcher.runs import generate
from tests.patcher.shared_work import (
    CASES,
    KV_HEADS,
    LENGTH,
    MODELS,
    answer,
    ask_ahead,
    ask_all,
    ask_each_head,
    load,
    saved_models,
    uneven,
)

folder = saved_models
WORKS = ("pairs", "blocks", "reads", "cache")  # by head


@pytest.fixture(scope="module")
def whole(folder):
    return {name: answer(name, load(folder / name)) for name in MODELS}


@pytest.fixture(scope="module")
def two(folder):
    return run(2, ask_all, folder)


def same(got, want) -> None:
    assert got[0].tolist() == want[0].tolist()
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "plan", "way"), CASES)
def test_two_ranks_answer_as_one_process(whole, two, model, plan, way):
    for rank in two:
        same(rank[model][plan, way], whole[model][plan, way])


def test_a_plan_is_of_the_whole_model(two, folder):
    assert {rank["plan"] for rank in two} == {uneven(load(folder / "llama")).hash()}


def test_as_many_ranks_as_kv_heads(whole, folder):
    for rank in run(KV_HEADS, ask_each_head, folder):
        same(rank, whole["llama"]["tables", "padded"])


def test_a_step_runs_ahead_on_all_ranks_or_on_none(folder):
    model = load(folder / "llama")
    with hfsparse.patch(model, uneven(model)):
        alone = generate(model, tokens(1, LENGTH), new=20)
    for sequences, logits, taken, back, told in run(2, ask_ahead, folder):
        same((sequences, logits), (alone.sequences, torch.stack(alone.logits, 1)))
        assert (taken, back, told) == (17, 0, "yes"), "all but the first one, the refused one"


@pytest.mark.parametrize("model", MODELS)
def test_stats_are_of_a_rank_s_heads_or_gathered(whole, two, model):
    alone, _, _ = whole[model]["uneven"]
    for at, rank in enumerate(two):
        own, gathered, told = rank[model]["uneven"]
        assert gathered == alone
        if model == "olmo2":  # every rank has all heads
            assert own == alone
            assert "tensor parallel" not in told
            continue
        for layer, part in zip(alone.layers, own.layers, strict=True):
            for work in WORKS:
                done, mine = getattr(layer, work).done, getattr(part, work).done
                half = len(done) // 2
                assert [*mine] == [*done[at * half : (at + 1) * half]], work
        assert str(own).startswith(f"rank {at} of 2, its own heads: pair density")
        assert f"rank {at} of 2, its own heads" in told


def test_what_ranks_can_not_follow_is_refused_on_all_in_one_sentence(two):
    said = two[0]["refused"]
    assert said == two[1]["refused"]
    assert said["two plans"].startswith("PatchError: ranks follow different plans (sha256:")
    assert said["two plans"].endswith(" on rank 1): give every rank the same one")
    assert said["no plan on one"].startswith("PatchError: rank 1 can't follow the plan: ")
    assert said["no plan"].startswith("PlanError: nowhere.yaml: can't read it")
    assert "1 kv heads, which 2 ranks can't share" in said["one kv head"]
    assert "is tensor parallel, and a plan is measured" in said["profile"]


def test_a_model_whose_weights_fsdp_gathers_answers_as_it_does_alone(whole, two):
    for rank in two:
        same(rank["fsdp"], whole["llama"]["uneven", "padded"])
