"""Nothing depends on global state, on CUDA: each part of the library under each world."""

from __future__ import annotations

import pytest
import torch

import hfsparse
from tests import worlds
from tests.gpu.common import DEVICE
from tests.patcher import families

OFF = {"model": 1e-3}  # float32 in a kernel of another kind: with gradients Triton serves nothing


@pytest.fixture(scope="module")
def plain():
    return worlds.asked(DEVICE)


@pytest.mark.parametrize("name", worlds.SLICES)
@pytest.mark.parametrize("world", worlds.WORLDS)
def test_a_world_changes_nothing(world, name, plain):
    off = worlds.WORLDS[world][1]
    if name in worlds.CHOICES:
        off = min(off, worlds.SUMS)
    elif "gradients" in world:
        off = OFF.get(name, off)
    worlds.compare(worlds.run(world, name, DEVICE), plain(name), off)


def test_the_cpu_by_default_changes_nothing(plain):
    prepare, work = worlds.SLICES["model"]
    made = prepare(DEVICE)
    with torch.no_grad(), torch.device("cpu"):
        worlds.compare(work(made), plain("model"), worlds.EXACT)


@torch.inference_mode()
def test_a_stream_does_not_read_what_another_has_yet_to_compute():
    """The first stream is kept waiting in the middle of its forward."""
    model, ids, mask, _ = worlds.prepare_model(DEVICE)
    streams, waits = [torch.cuda.Stream(), torch.cuda.Stream()], []

    def wait(module, args):
        if waits:
            waits.clear()
            torch.cuda._sleep(int(1e9))

    model.model.layers[1].input_layernorm.register_forward_pre_hook(wait)
    with hfsparse.patch(model, families.mixed(model)):
        want = model(ids, attention_mask=mask).logits
        unused = [torch.full((1 << 22,), 1 << 30, device=DEVICE) for _ in range(8)]
        del unused  # what is read before it is written leads far astray
        more = torch.cat([ids, ids.flip(1)], 1), torch.cat([mask, mask.new_ones(ids.shape)], 1)
        torch.cuda.synchronize()
        waits.append(True)
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(model(more[0], attention_mask=more[1]).logits)
        torch.cuda.synchronize()
        truth = model(more[0], attention_mask=more[1]).logits
        assert all(torch.equal(logits, truth) for logits in found)
        assert torch.equal(model(ids, attention_mask=mask).logits, want)


def test_a_prompt_in_inference_mode_is_counted_on_outside_it():
    model, ids, mask, _ = worlds.prepare_model(DEVICE)
    with hfsparse.patch(model, families.mixed(model)) as handle:
        with torch.inference_mode():
            model(ids, attention_mask=mask)
        want = handle.stats().pair_density
        model.generate(ids, attention_mask=mask, max_new_tokens=2, eos_token_id=None)
        assert handle.stats().pair_density == pytest.approx(want)
