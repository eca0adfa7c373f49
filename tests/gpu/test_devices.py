"""A model that accelerate spreads over two GPUs says what it says on one; steps are one graph."""

from __future__ import annotations

import gc

import pytest
import torch
from accelerate import dispatch_model

import hfsparse
from hfsparse.errors import PatchError
from tests.gpu.test_graphs import graphs, inputs
from tests.patcher.families import choosing, fresh, full, mixed
from tests.patcher.runs import generate

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def spread(model):
    """The first half of the layers on one GPU, the rest on another."""
    layers = len(model.model.layers)
    places = {f"model.layers.{i}": int(i >= layers // 2) for i in range(layers)}
    places |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    return dispatch_model(model, places)


@pytest.mark.parametrize("pads", [(0,), (0, 7, 13, 60)])
@pytest.mark.parametrize("plan", [full, mixed, choosing])
def test_two_gpus_say_what_one_says(plan, pads):
    (ids, mask), found = inputs(250, pads), []
    for model in (fresh("llama").to("cuda:0"), spread(fresh("llama"))):
        for replay in (False, True):
            with hfsparse.patch(model, plan(model)):
                if not replay:
                    graphs(model).never = "this test wants it eager"
                out = generate(model, ids, mask, new=30)
                assert (graphs(model).why is None) == replay, graphs(model).why
            found.append((out.sequences.tolist(), torch.stack(out.logits, 1).cpu()))
    for tokens, logits in found[1:]:
        assert tokens == found[0][0]
        assert torch.equal(logits, found[0][1])


def test_two_devices_memory_comes_back():
    model, (ids, mask) = spread(fresh("llama")), inputs(120)
    held = []
    for _ in range(3):
        with hfsparse.patch(model, mixed(model)):
            generate(model, ids, mask, new=12)
        gc.collect()
        torch.cuda.empty_cache()
        held.append([torch.cuda.memory_allocated(i) for i in range(2)])
    assert held[2] == held[1]


def test_two_devices_keep_no_memory_reserved():
    model, (ids, mask), held = spread(fresh("llama")), inputs(120), []
    with hfsparse.patch(model, mixed(model)):
        for _ in range(30):
            generate(model, ids, mask, new=8)
            assert graphs(model).why is None
            held.append([torch.cuda.memory_reserved(i) for i in range(2)])
    for first, most in zip(held[0], map(max, zip(*held, strict=True)), strict=True):
        assert most <= first + (4 << 20)


def test_data_parallel_is_refused():
    model, (ids, _) = fresh("llama").to("cuda:0"), inputs(40, (0, 0))
    with (
        hfsparse.patch(model),
        pytest.raises(PatchError, match=r"DataParallel runs copies.*one process a GPU"),
    ):
        torch.nn.DataParallel(model)(ids)
