"""On a GPU, through its kernels, the patched model gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

import hfsparse
from hfsparse.attention import NAME, attend
from tests.patcher.families import (
    FAMILIES,
    fresh,
    full,
    growing,
    left_padded,
    mixed,
    straddled,
    streaming,
    tokens,
)
from tests.patcher.runs import forward, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CLOSE = 1e-4  # float32 sums in another order


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", [full, streaming, growing, mixed, straddled])
@pytest.mark.parametrize("chunk", [None, 300])
def test_cuda_gives_the_cpus_answer(family, plan, chunk, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr("hfsparse.attention.default_block", lambda tokens, device: 128)
    model, (ids, mask) = fresh(family), left_padded(990)
    more = {} if chunk is None else {"prefill_chunk_size": chunk}
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        with hfsparse.patch(model, plan(model)) as handle:
            scores = forward(model, ids.to(device), mask.to(device)).logits.cpu()
            said = generate(model, ids.to(device), mask.to(device), **more)
            results.append((scores, said.sequences.tolist(), handle.stats()))
    (want, tokens, stats), (got, same_tokens, same_stats) = results
    assert (got - want)[mask.bool()].abs().max() < CLOSE
    assert same_tokens == tokens
    assert same_stats.pair_density == pytest.approx(stats.pair_density, abs=0.01)
    assert same_stats.kv_bytes == stats.kv_bytes


def test_patterned_heads_run_in_triton_and_never_wait_for_the_gpu():
    """A prompt: no host synchronisation while attention runs (transformers' masks have one)."""
    model = fresh("llama").cuda()
    ids = tokens(1, 990).cuda()
    seen = []

    def strict(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen.append(args[1].shape)
            return attend(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with torch.no_grad(), hfsparse.patch(model, mixed(model)) as handle:
        assert "patterned heads, prompt: Triton" in handle.explain()
        want = model(ids).logits  # compiled, too
        AttentionInterface.register(NAME, strict)
        try:
            got = model(ids).logits
        finally:
            AttentionInterface.register(NAME, attend)
    assert torch.equal(got, want)
    assert len(seen) == 3
