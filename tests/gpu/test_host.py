"""Keys in pinned memory of the host, read by kernels of the GPU: what is fetched, and what is said.

A step over them that is recorded as a CUDA graph can't have waited for the host.
"""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

import hfsparse
from hfsparse.kernels import fetch as reference
from hfsparse.lists import PageLists
from hfsparse.lists.hot import Hot
from hfsparse.lists.packed import Packed
from hfsparse.models.names import text_decoder
from tests.gpu.common import BF16, DEVICE, HALF, near
from tests.kernels.triton.test_fetch import hot_of, packed_of, some_lists
from tests.patcher.families import fresh, hosted, left_padded
from tests.patcher.runs import forward, generate
from tests.patcher.test_hosted import on_device, talk

pytestmark = pytest.mark.usefixtures("whole_float32")
CLOSE = 1e-4  # float32 sums in another order


def moved(hot: Hot) -> Hot:
    """With all but the host's keys on the GPU, and those pinned; bounds are a selector's index."""
    here = ("k", "v", "table", "owner", "stamp", "clock")
    here = {name: getattr(hot, name).to(DEVICE) for name in here}
    pinned = {name: getattr(hot, name).pin_memory() for name in ("host_k", "host_v")}
    if hot.pages is not None:
        packed, pages = ([t.to(DEVICE) for t in each[1:]] for each in (hot.packed, hot.pages))
        here |= {"k": packed[0], "v": packed[1]}
        pages[:2] = pinned.values()
        pages[4:6] = (t.pin_memory() for t in hot.pages.pages[4:])
        here |= {
            "packed": Packed(hot.packed.bits, *packed),
            "pages": Packed(hot.pages.bits, *pages),
        }
    return hot._replace(**here, **pinned)


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize(
    ("unit", "below", "slots", "width", "bits"),
    [
        (64, 0, 9, 9, 16),
        (16, 200, 60, 50, 16),
        (8, 0, 4096, 4000, 16),
        (1, 0, 150, 40, 16),
        (64, 0, 9, 9, 8),
        (64, 0, 9, 9, 4),
    ],
)
def test_the_kernel_fetches_out_of_pinned_memory_what_pytorch_does(
    unit, below, slots, width, bits, dtype
):
    from hfsparse.kernels.triton.fetch import fetch

    B, H, pages = 3, 4, 600 if slots > 1000 else 40
    if bits == 16:
        made = hot_of(B, H, pages, slots, unit, below, (128, 96), dtype)
    else:
        made = packed_of(B, H, pages, slots, bits, (128, 96), dtype)
    found, wanted = (moved(copy.deepcopy(made)) for _ in "fw")
    drawn = torch.Generator().manual_seed(1)
    reads = [torch.zeros(H, 2, dtype=torch.int64, device=DEVICE) for _ in "fw"]
    for step in range(6):
        length = torch.tensor([pages * 64 - 7 + step, 130 + step, 0])
        lists = some_lists(drawn, B, H, length, width, unit)
        count = lists.count.masked_fill((length < below)[:, None], 0)
        lists, length = PageLists(lists.pages.to(DEVICE), count.to(DEVICE), unit), length.to(DEVICE)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = fetch(found, lists, length, reads[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        truth = reference.fetch(wanted, lists, length, reads[1])
        assert torch.equal(ours.lies, truth.lies)
        for a, b in zip(found.tensors(), wanted.tensors(), strict=True):
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    assert torch.equal(*reads)
    assert 0 < reads[0][0, 0] < reads[0][0, 1]


@pytest.mark.parametrize(
    ("family", "below", "quest"),
    [
        ("llama", 0, dict(beside="full")),
        ("qwen2", 420, dict(unit=16, bound=16, beside="full")),
        ("qwen3", 0, dict(refresh=3)),
        ("mistral", 0, dict(unit=8, top_p=0.7)),
        ("mistral", 0, dict(beside="mean")),
        ("llama", 0, dict(bits=4, beside="full")),
        ("qwen2", 420, dict(bits=8, bound=16, beside="full")),
        ("mistral", 0, dict(bits="fp8")),
    ],
    ids=["gqa2", "gqa3-below", "gqa1", "gqa4", "gqa4-means", "int4", "int8-below", "fp8"],
)
def test_a_talk_is_that_of_a_cache_on_the_gpu(family, below, quest):
    """Left padding, a chunk, steps of several tokens, crops; both read the same units."""
    model, back = fresh(family).to(DEVICE), -130 if "beside" in quest else -30
    plan, outs = hosted(model, below, **quest), []
    for each in (on_device(plan), plan):
        with hfsparse.patch(model, each) as handle:
            outs.append(talk(model, {}, back))
            told, stats = handle.explain(), handle.stats()
    assert max(float((a - b).abs().max()) for a, b in zip(*outs, strict=True)) < CLOSE
    assert "pages there: fetched by Triton\n" in told
    assert "layers with keys in host memory, new tokens: Triton, store by store" in told
    assert " in host memory by Triton, store by store" in told
    assert 0.3 < stats.hit_rate < 1


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("pads", "kept"), [((0,), dict(unit=16)), ((0, 7, 13), dict(bits=4))])
def test_a_replay_is_the_eager_step_bit_for_bit(pads, kept, fuse):
    model = fresh("llama").to(DEVICE)
    (ids, mask), found = (t.to(DEVICE) for t in left_padded(700, pads)), []
    for replay in (False, True):
        with hfsparse.patch(model, hosted(model, **kept), fuse=fuse and replay) as handle:
            graphs = text_decoder(model)._hfsparse.graphs
            if not replay:
                graphs.never = "this test wants it eager"
            out = generate(model, ids, mask, new=150)  # more than the hot set holds at first
            if replay:
                assert graphs.why is None, graphs.why
            found.append((out.sequences.tolist(), torch.stack(out.logits, 1)))
            assert 0.3 < handle.stats().hit_rate < 1
    assert found[0][0] == found[1][0]
    if fuse:  # what is rounded to bits may be rounded the other way
        assert near(found[1][1], found[0][1], HALF if "bits" in kept else None)
    else:
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("bits", [16, 4])
def test_a_copy_a_crop_and_beams_go_on_from_pinned_memory(bits, tmp_path):
    model, ids = fresh("llama").to(DEVICE), left_padded(500, (0,))[0].to(DEVICE)
    plan, outs = hosted(model, beside="full", bits=bits), []
    for each in (on_device(plan), plan):
        with hfsparse.patch(model, each) as handle:
            cache = forward(model, ids).past_key_values
            kept, found = copy.deepcopy(cache), []
            for own in (cache, kept):
                found += [forward(model, ids[:, i : i + 1], cache=own).logits for i in range(80)]
                own.crop(-200)
                found += [forward(model, ids[:, i : i + 1], cache=own).logits for i in range(90)]
            assert torch.equal(torch.stack(found[:170]), torch.stack(found[170:]))
            outs.append([*found, *generate(model, ids, num_beams=3, new=30).logits])
            handle.save(kept, tmp_path / "saved")
            loaded = handle.load(tmp_path / "saved")
            for i in range(70):
                ours, truth = (forward(model, ids[:, i : i + 1], cache=x) for x in (loaded, kept))
                assert torch.equal(ours.logits, truth.logits)
            store = loaded.layers[0].stores[0]
            shutil.rmtree(tmp_path / "saved")
    assert all(t.is_pinned() for t in (*store.outside(), *kept.layers[0].stores[0].outside()))
    assert max(float((a - b).abs().max()) for a, b in zip(*outs, strict=True)) < CLOSE


def test_the_gpu_holds_what_stats_say():
    model, ids = fresh("llama").to(DEVICE, BF16), left_padded(20_000, (0,))[0].to(DEVICE)
    with hfsparse.patch(model, hosted(model, hot=0.12)) as handle:
        generate(model, ids[:, :2000], new=2)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = forward(model, ids).past_key_values
        held, stats = torch.cuda.memory_allocated() - before, handle.stats()
        assert sum(layer.host_bytes() for layer in cache.layers) == stats.host_bytes
    assert 0.12 < stats.layers[0].cache.shares[0] < 0.2
    assert stats.kv_bytes <= held < stats.kv_bytes_dense / 3
