"""On a GPU, through its kernels, the patched model gives what it gives on the CPU."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import hfsparse
from hfsparse import bench, kernels
from hfsparse.runtime.attend import attend
from hfsparse.runtime.call import use_tables
from hfsparse.runtime.layer_plan import observed
from hfsparse.runtime.masks import NAME
from tests.gpu.common import BF16, DEVICE
from tests.patcher.families import (
    FAMILIES,
    SCALED,
    fresh,
    full,
    growing,
    left_padded,
    mixed,
    rotated,
    straddled,
    streaming,
    tokens,
)
from tests.patcher.runs import forward, generate

pytestmark = pytest.mark.usefixtures("whole_float32")
CLOSE = 1e-4  # float32 sums in another order


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", [full, streaming, growing, mixed, straddled])
@pytest.mark.parametrize("chunk", [None, 300])
def test_cuda_gives_the_cpus_answer(family, plan, chunk, monkeypatch, tmp_path):
    monkeypatch.setattr("hfsparse.runtime.layout.default_block", lambda tokens, device: 128)
    model, (ids, mask) = fresh(family), left_padded(990)
    more = {} if chunk is None else {"prefill_chunk_size": chunk}
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        with hfsparse.patch(model, plan(model)) as handle:
            with watched(model) as layers:
                scores = forward(model, ids.to(device), mask.to(device)).logits.cpu()
            said = generate(model, ids.to(device), mask.to(device), **more)
            results.append((scores, said.sequences.tolist(), handle.stats(), layers))
    (want, tokens, stats, there), (got, same_tokens, same_stats, here) = results
    apart = (got - want)[mask.bool()].abs().max().item()
    assert apart < CLOSE, kept_for_later(tmp_path, apart, there, here)
    assert same_tokens == tokens
    assert same_stats.pair_density == pytest.approx(stats.pair_density, abs=0.01)
    assert same_stats.kv_bytes == stats.kv_bytes


@contextmanager
def watched(model):
    """A list that calls of a patched model fill: what each layer's attention gets and gives."""
    seen = []

    def observe(module, q, k, v, logits):
        held = {name: t.clone() for name, t in zip("qkv", (q, k, v), strict=True)}
        seen.append(held)
        return lambda out: held.update(out=out.clone())

    with observed(model, observe):
        yield seen


def kept_for_later(folder: Path, apart: float, cpu: list[dict], gpu: list[dict]) -> str:
    """What a rare difference is looked for in: tensors in a file, a line of each to read."""
    file = Path(os.environ.get("OUT", folder)) / "layers.pt"
    gpu = [{name: t.cpu() for name, t in layer.items()} for layer in gpu]
    torch.save({"cpu": cpu, "gpu": gpu}, file)
    lines = [
        f"logits differ by {apart:.2e}; each layer's q, k, v and out are in {file}",
        f"cublas TF32 {torch.backends.cuda.matmul.allow_tf32}, cudnn TF32 "
        f"{torch.backends.cudnn.allow_tf32}, precision {torch.get_float32_matmul_precision()}, "
        f"NVIDIA_TF32_OVERRIDE {os.environ.get('NVIDIA_TF32_OVERRIDE')}",
        "layer  tensor  largest  apart  where  checksums of the CPU's and the GPU's bits",
    ]
    for i, (there, here) in enumerate(zip(cpu, gpu, strict=True)):
        for name in there:
            a, b = there[name], here[name]
            off = (a - b).abs()
            at = [int(n) for n in torch.unravel_index(off.argmax(), off.shape)]
            sums = " ".join(f"{t.contiguous().view(torch.int32).sum():x}" for t in (a, b))
            lines.append(f"{i}  {name}  {a.abs().max():.3e}  {off.max():.2e}  {at}  {sums}")
    return "\n".join(lines)


@pytest.mark.parametrize("rope", SCALED)
def test_steps_beyond_the_trained_length_are_those_of_the_stock_model(rope):
    """What a rope computes anew as a row grows is never frozen in a graph."""
    ids = tokens(1, 110).to(DEVICE)  # of 128
    want = generate(rotated(rope).to(DEVICE), ids, new=40)
    with hfsparse.patch(model := rotated(rope).to(DEVICE)):
        got = generate(model, ids, new=40)
    assert got.sequences.tolist() == want.sequences.tolist()
    assert (torch.stack(got.logits) - torch.stack(want.logits)).abs().max() < CLOSE


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


def test_triton_serves_all_six_tables():
    model = fresh("llama").cuda()
    with hfsparse.patch(model, mixed(model)) as handle:
        told = handle.explain().splitlines()
    assert {
        "full and ring heads, new tokens: Triton",
        "selected pages, new tokens: Triton",
        "vs (vertical_slash), prompt: blocks chosen by Triton",
        "blocks (block_topk), prompt: blocks chosen by Triton",
        "s (streaming), prompt: blocks chosen by PyTorch (not Triton: streaming is not fused)",
        "quest (quest), new tokens: pages chosen by Triton",
        "new tokens: stored by Triton",
        "kept pairs, prompt: counted by Triton",
    } <= {*told}


def test_long_prompts_run_in_flash_attn_4_as_they_do_in_triton():
    """bf16 prompts of more than 8,192 tokens: rings, columns and full heads."""
    need = kernels.Need(DEVICE, BF16, 64, 64, lists=True)
    first = kernels.PREFILL[0]
    assert first.name == "FA4"
    if reason := first.why_not(need):
        pytest.skip(reason)
    torch.manual_seed(0)
    heads = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_hidden_layers=2)
    sizes = dict(vocab_size=100, hidden_size=128, intermediate_size=128)
    config = LlamaConfig(**heads, **sizes, max_position_embeddings=1 << 14)
    model = LlamaForCausalLM(config).eval().to(DEVICE, BF16)
    ids, found = tokens(1, 9001).to(DEVICE), []
    for table in (kernels.PREFILL, kernels.PREFILL[1:]):
        tables, clock = use_tables(kernels.TABLES._replace(prefill=table)), bench.Clock(DEVICE)
        with torch.no_grad(), hfsparse.patch(model, streaming(model)), tables, clock:
            found.append((model(ids).logits[0, 100:], clock.kernels))
    (fast, fast_kernels), (plain, plain_kernels) = found
    assert fast_kernels == ["FA4"]
    assert set(plain_kernels) == {"torch sdpa", "Triton"}
    assert (fast - plain).norm() < 0.03 * plain.norm()  # two layers of bf16
