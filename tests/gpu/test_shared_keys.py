"""Layers that read another layer's keys, in steps that are replayed and in prompts of kernels."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache

import hfsparse
from tests.gpu.common import DEVICE
from tests.gpu.test_graphs import inputs, said
from tests.patcher.families import full, mixed, straddled, streaming, tokens
from tests.patcher.runs import CACHE, continue_with, forward
from tests.support.models import exists, fresh


@pytest.fixture(params=["gemma4_shared", "gemma3n"])
def model(request):
    if not exists(request.param):
        pytest.skip("not in this version")
    return fresh(request.param).to(DEVICE)


@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)])
@pytest.mark.parametrize("plan", [full, streaming, mixed, straddled])
def test_a_replay_is_the_eager_step_bit_for_bit(plan, pads):
    """Gemma 3n's forward copies numbers from the host: its steps are no graphs unless fused."""
    if not exists("gemma4_shared"):
        pytest.skip("not in this version")
    model, (ids, mask) = fresh("gemma4_shared").to(DEVICE), inputs(250, pads)
    want = said(model, plan, ids, mask, replay=False, new=30)
    got = said(model, plan, ids, mask, new=30)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("keep", [0, 1])
def test_prompts_and_chunks_give_what_they_give_on_the_cpu(model, keep, monkeypatch):
    """The last queries alone go through readers, where `keep` says so."""
    monkeypatch.setattr("hfsparse.runtime.layout.default_block", lambda tokens, device: 128)
    plan, found = mixed(model), []
    for place in (DEVICE, "cpu"):
        ids, mask = (t.to(place) for t in inputs(300, (0, 7)))
        model.to(place)
        with hfsparse.patch(model, plan):
            out = forward(model, ids, mask, logits_to_keep=keep)
            found.append([out.logits[:, -1].cpu()])
            more = tokens(2, 70).to(place)
            whole, cache = continue_with(ids, mask, 70), out.past_key_values
            out = forward(model, more, whole, cache=cache, logits_to_keep=keep)
            found[-1].append(out.logits[:, -1].cpu())
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_fused_steps_say_nearly_the_same(model):
    ids, mask = inputs(250)
    want = said(model, mixed, ids, mask, replay=False, new=20)
    got = said(model, mixed, ids, mask, fuse=True, new=20)
    assert got[0] == want[0]
    assert (got[1] - want[1]).abs().max() < 1e-3


@torch.no_grad()
def test_readers_may_lie_on_another_device():
    if not exists("gemma4_shared"):
        pytest.skip("not in this version")
    model, found = fresh("gemma4_shared").to(DEVICE), []
    parts = tokens(1, 300).to(DEVICE).split([250, 49, 1], 1)

    def move(module, args, kwargs):
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), (args, kwargs))

    with hfsparse.patch(model, mixed(model)):
        for apart in (False, True):
            if apart:
                for module in (*model.model.layers[3:], model.model.norm):
                    module.cpu().register_forward_pre_hook(move, with_kwargs=True)
            cache = {CACHE: DynamicCache(config=model.config)}
            found.append([model.model(part, **cache).last_hidden_state.cpu() for part in parts])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
