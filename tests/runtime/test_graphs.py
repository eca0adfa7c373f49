"""Recorded and replayed decode steps give what eager steps give; tests/gpu has real graphs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from hfsparse.runtime.graphs.obstacles import NoWait
from hfsparse.runtime.graphs.weights import Weights
from tests import frozen, latents
from tests.kernels.interpreter import process
from tests.patcher.families import hosted, packing
from tests.support import models


@pytest.fixture(scope="module")
def interpreted():
    """A process in which Triton is interpreted, as a device of two processors: two shares of the
    keys of one row, merged, and one of several rows."""
    with process(triton__decode__UNITS=2, triton__fetch__COPIES=2) as there:
        yield lambda *args, run=frozen.compare, **more: there(run, *args, **more)


def same(eager: dict, replayed: dict) -> None:
    assert replayed["tokens"] == eager["tokens"]
    assert torch.equal(replayed["logits"], eager["logits"])
    assert replayed["kv_bytes"] == eager["kv_bytes"]
    torch.testing.assert_close(replayed["shares"], eager["shares"], equal_nan=True)


@pytest.mark.parametrize(
    ("family", "plan", "pads"),
    [
        ("mistral-window", "full", (0,)),
        ("qwen3", "growing", (0,)),
        ("llama", "mixed", (150, 0)),
        ("gemma3", "mixed", (0,)),
        ("qwen2", "choosing", (150, 0)),
        ("gemma4_shared", "mixed", (150, 0)),
        ("llama4", "mixed", (150, 0)),
        ("llama", "snapkv", (150, 0)),
        ("llama", "hosted", (150, 0)),
    ],
)
def test_replayed_steps_are_eager_steps_bit_for_bit(interpreted, family, plan, pads):
    if not models.exists(family):
        pytest.skip("not in this version")
    eager, replayed = interpreted(family, plan, length=200, pads=pads, new=6)
    assert "no CUDA graphs on cpu" in eager["graphs"]
    assert (replayed["graphs"], replayed["recorded"]) == ("yes", 1)
    wanted = {*frozen.LAUNCHES} if plan in ("mixed", "choosing") else {*frozen.LAUNCHES[:2]}
    wanted = {*frozen.LAUNCHES[::2], *frozen.FETCHES} if plan == "hosted" else wanted
    assert eager["launched"] == replayed["launched"] == wanted, "nothing falls back to PyTorch"
    same(eager, replayed)


@pytest.mark.skipif(not latents.exists("deepseek_v3"), reason="it caches expanded keys")
@pytest.mark.parametrize(
    ("plan", "length", "pads", "fuse"),
    [("mixed", 200, (0,), False), ("streaming", 60, (9, 0), True)],
)
def test_replayed_steps_over_latents_are_eager_steps_bit_for_bit(
    interpreted, plan, length, pads, fuse
):
    more = dict(length=length, pads=pads, new=5, fuse=fuse)
    eager, replayed = interpreted("deepseek_v3", plan, **more)
    said = "yes (not fused, its cache holds latents)" if fuse else "yes"
    assert (replayed["graphs"], replayed["recorded"]) == (said, 1)
    wanted = {*frozen.LAUNCHES} if plan == "mixed" else {*frozen.LAUNCHES[:2]}
    assert eager["launched"] == replayed["launched"] == wanted, "nothing falls back to PyTorch"
    same(eager, replayed)


@pytest.mark.parametrize(
    ("family", "plan", "pads"),
    [("qwen3", packing, (0, 2)), ("mistral", partial(hosted, bits=4), (1,))],
    ids=["device", "host"],
)
def test_replayed_steps_over_packed_keys_are_eager_steps_bit_for_bit(
    interpreted, family, plan, pads
):
    """One row ends a page in the second step, another in one that is replayed."""
    eager, replayed = interpreted(family, plan, length=126, pads=pads, new=5)
    assert (replayed["graphs"], replayed["recorded"]) == ("yes", 1)
    wanted = {*frozen.LAUNCHES, "triton.decode_store.decode"}
    wanted = wanted if plan is packing else {*frozen.LAUNCHES[::2], *frozen.FETCHES[1:]}
    assert eager["launched"] == replayed["launched"] == wanted
    same(eager, replayed)


def test_thresholds_are_passed_by_one_row_before_the_other(interpreted):
    """Once a row has 70 tokens selectors choose, recorded anew; under 74 rings drop nothing."""
    more = dict(below=(0, 70, 74), length=65, pads=(0, 3), new=12)
    eager, replayed = interpreted("llama", "mixed", **more)
    assert (replayed["graphs"], replayed["recorded"]) == ("yes", 2)
    same(eager, replayed)


def test_rows_that_have_ended_are_empty_in_replays(interpreted):
    """One has ended before a step is recorded, one after."""
    more = dict(length=66, pads=(0, 9, 0), new=6, run=frozen.ended)
    want, got, ends, recorded, empty = interpreted("llama", "mixed", **more)
    for row, alone in zip(got, want, strict=True):
        end = next((i + 1 for i, token in enumerate(alone) if token in ends), len(alone))
        assert row == alone[:end] + [0] * (len(alone) - end)
    assert recorded == 1
    assert empty > 3, "of one row in each replay, of another in some"


def test_steps_that_verify_drafts_are_replayed_for_each_number_of_tokens(interpreted):
    """What is rejected is taken back between two replays."""
    more = dict(length=70, new=12, prompt_lookup_num_tokens=3, eos_token_id=3)
    eager, replayed = interpreted("mistral-window", "full", **more)
    assert 4 in replayed["lengths"]
    same(eager, replayed)


def test_drafts_of_exact_mode_are_replayed(interpreted):
    eager, replayed = interpreted("llama", "streaming", length=70, new=9, exact=True)
    assert 1 in replayed["lengths"]  # tests/gpu replays what verifies, too
    assert replayed["drafts"] == eager["drafts"]
    same(eager, replayed)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (dict(output_hidden_states=True), "output_hidden_states is asked for"),
        (dict(new=3), "the first steps of a cache"),
        (dict(below=(0, 23, 0), new=4, plan="mixed"), "the first steps of a cache"),
        (dict(plan="evicting", new=6), "each step ranks the keys that are kept"),
    ],
)
def test_what_is_not_replayed_says_why(interpreted, more, why):
    eager, replayed = interpreted("llama", **{"plan": "full", "length": 20, **more})
    same(eager, replayed)
    assert why in replayed["graphs"]
    assert replayed["recorded"] == 0


@pytest.mark.parametrize(
    ("family", "plan", "length", "wrong"),
    [("gemma3", "mixed", 100, ""), ("llama", "full", 20, "waits")],
    ids=["in parts", "whole"],
)
def test_a_fused_step_gives_the_same(interpreted, family, plan, length, wrong):
    more = dict(length=length, pads=(0, 7), fuse=True, wrong=wrong)
    eager, fused = interpreted(family, plan, **more)
    assert (fused["graphs"], fused["recorded"]) == ("yes, fused", 1)
    assert fused["tokens"] == eager["tokens"]
    torch.testing.assert_close(fused["logits"], eager["logits"])
    torch.testing.assert_close(fused["shares"], eager["shares"], equal_nan=True)


@pytest.mark.parametrize("wrong", ["page", "bit"])
def test_a_replay_that_differs_from_the_eager_step_is_the_last_and_answers_nothing(
    interpreted, wrong
):
    """One page of one head's in one layer, or one bit of one number."""
    eager, replayed = interpreted("llama", "streaming", length=200, new=7, wrong=wrong)
    assert "gives something else than eagerly" in replayed["graphs"]
    assert replayed["recorded"] == 1
    same(eager, replayed)


def test_a_model_that_differs_from_itself_is_replayed_all_the_same(interpreted):
    eager, replayed = interpreted("llama", "streaming", length=20, new=7, wrong="noise")
    assert (replayed["graphs"], replayed["recorded"]) == ("yes", 1)
    torch.testing.assert_close(eager["logits"], replayed["logits"], rtol=0, atol=1e-3)


def test_every_graph_is_checked(interpreted):
    """Of a patch's second cache too."""
    (first, second), eager = interpreted(run=frozen.spoilt_later)
    assert first is None
    assert "gives something else than eagerly" in second
    assert eager


@pytest.mark.parametrize("what", ["scale", "adapter", "training", "config"])
def test_numbers_that_change_between_the_steps_of_a_cache_are_seen(interpreted, what):
    same_logits, recorded = interpreted(what, run=frozen.changed)
    assert same_logits
    assert recorded == 2


@pytest.mark.parametrize(
    ("what", "behind", "why"),
    [
        (("choosing", frozen.hole, 270), True, "has holes"),
        (("full", frozen.longer_row, 80), True, "by this attention_mask"),
        (("full", frozen.none, 80, (9,)), False, "by this attention_mask"),
    ],
)
def test_a_wrong_mask_is_refused_behind_a_replay_and_none_before(interpreted, what, behind, why):
    told, ran, same = interpreted(*what, run=frozen.refused)
    assert why in told
    assert ran == behind
    assert same, "the refused step left something behind"


@pytest.mark.parametrize(
    ("move", "recorded"),
    [
        (frozen.nothing, 1),
        (frozen.in_place, 1),
        (frozen.whole_model, 2),
        (frozen.new_parameter, 2),
    ],
)
def test_weights_that_lie_elsewhere_are_recorded_anew(interpreted, move, recorded):
    counts, same = interpreted(move, run=frozen.moved)
    assert (counts[3], counts[4], counts[-1]) == (1, 1, recorded)
    assert same


@pytest.mark.parametrize("change", ["data", "parameter", "gone", "buffer"])
def test_each_kind_of_weight_is_watched(change):
    inner = nn.Linear(3, 2)
    model = nn.Sequential(inner, nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    weights = Weights(model)
    assert not weights.moved()
    inner.weight.detach().zero_()
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    assert not weights.moved()
    if change == "data":
        inner.bias.data = inner.bias.data.clone()
    elif change == "parameter":
        inner.weight = nn.Parameter(inner.weight.detach().clone())
    elif change == "gone":
        inner.bias = None
    else:
        model[1].running_mean = model[1].running_mean.clone()
    assert weights.moved()


def test_weights_made_of_several_tensors_are_watched():
    made = TwoTensor(torch.zeros(2), torch.zeros(2))
    model = nn.Module()
    model.weight = nn.Parameter(made)
    weights = Weights(model)
    assert not weights.moved()
    model.weight.b = torch.zeros(2)
    assert weights.moved()


def test_a_mask_is_a_wait_unless_one_number_of_the_host_fills_it():
    t = torch.ones(4)
    mask = t > 0
    with NoWait():
        t[mask] = 2.0
        for wait in (lambda: t[mask], lambda: t.index_put_((mask,), torch.ones(4))):
            with pytest.raises(RuntimeError, match="the host waits for index"):
                wait()
    assert t.tolist() == [2.0] * 4


def test_a_copy_to_the_host_is_a_wait():
    with FakeTensorMode():
        there = torch.ones(2, device="cuda")
        with NoWait():
            assert (there.clone().float() + 1).to(torch.float16).is_cuda
            for copy in (there.cpu, lambda: torch.ones(2).copy_(there), there.tolist):
                with pytest.raises(RuntimeError, match="the host waits for"):
                    copy()
