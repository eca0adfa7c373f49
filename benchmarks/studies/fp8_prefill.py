"""Would prompts be read faster in fp8? Attention over kept blocks, its products in e4m3, on Hopper.

    python -m benchmarks.studies.fp8_prefill [--model MODEL] [--shape tiny] [--seconds 240]

As SageAttention (arXiv 2410.02367, 2411.10958): the mean key of the sequence is taken off, which
softmax doesn't notice; queries and keys are scaled block by block, values channel by channel, and
weights by 2^8. `qk` has the first product in fp8, `qk, pv` both; `qk, pv apart` adds the second up
in float32 tile by tile, since fp8 products of Hopper are summed with fewer bits than float32 has
(arXiv 2412.19437). Values lie transposed, which fp8 products ask for. `16 bits` is the same kernel
without any of it, `ours` the kernel of hfsparse. Arms take turns; what is rounded beforehand is
timed apart. Errors are relative to float32 over the same blocks, of random inputs, of random ones
with outliers in a few channels, and of one layer of MODEL that reads a prompt, over the blocks of
block_topk. `--shape tiny` tries it out on a CPU (TRITON_INTERPRET=1), without times; there `qk, pv`
is less exact than on a GPU, as Triton's interpreter loses a carry when it rounds weights to e4m3.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.common.clock import bench_ms
from hfsparse.kernels.triton import prefill as ours
from hfsparse.lists import BlockLists, Grid
from hfsparse.models.loading import load
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.profiler.prompts.calibration import make_prompts

BLOCK = 128
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SHAPES = {  # q heads, kv heads, head dim, (tokens, density) of each case, the model's tokens
    "8b": (32, 8, 128, ((16384, 1.0), (131072, 0.10), (131072, 0.05)), 16384),
    "tiny": (4, 2, 32, ((512, 1.0), (1024, 0.5)), 512),
}
ARMS = {  # products in fp8, whether the second is summed apart, stages
    "16 bits": (0, False, 2),
    "qk": (1, False, 2),
    "qk, 3 stages": (1, False, 3),
    "qk, pv": (2, False, 2),
    "qk, pv, 3 stages": (2, False, 3),
    "qk, pv, 4 stages": (2, False, 4),
    "qk, pv apart": (2, True, 3),
}
ROUNDS = 5
SHARE = 0.1  # of block_topk


@triton.jit
def _attention(
    Q, K, V, Q_SCALE, K_SCALE, V_SCALE, OUT, COUNT, INDEX, count_h, index_h, index_i,
    S, group, unit,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    blocks = S // BLOCK
    h, i = tl.program_id(0) // blocks, blocks - 1 - tl.program_id(0) % blocks
    kv, lane, d = h // group, tl.arange(0, BLOCK), tl.arange(0, D)
    first = h.to(tl.int64) * S + i * BLOCK
    q = tl.load(Q + (first + lane)[:, None] * D + d[None, :])
    if FP8 >= 1:
        unit *= tl.load(Q_SCALE + h * blocks + i)
    acc = tl.zeros([BLOCK, D], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    bits = 8.0 if FP8 == 2 else 0.0  # weights are at most 2^bits

    k, v = K + kv.to(tl.int64) * S * D, V + kv.to(tl.int64) * S * D
    s = tl.dot(q, tl.trans(tl.load(k + (i * BLOCK + lane)[:, None] * D + d[None, :])))
    s = tl.where(lane[:, None] >= lane[None, :], s, float("-inf"))
    acc, total, top = _fold(
        *(acc, total, top, s, v, K_SCALE, kv * blocks + i, i, S, unit, bits),
        *(D, BLOCK, FP8, APART),
    )
    index = INDEX + h.to(tl.int64) * index_h + i * index_i
    for j in range(0, tl.load(COUNT + h * count_h + i)):
        block = tl.load(index + j)
        s = tl.dot(q, tl.trans(tl.load(k + (block * BLOCK + lane)[:, None] * D + d[None, :])))
        acc, total, top = _fold(
            *(acc, total, top, s, v, K_SCALE, kv * blocks + block, block, S, unit, bits),
            *(D, BLOCK, FP8, APART),
        )
    acc = acc / total[:, None]
    if FP8 == 2:
        acc *= tl.load(V_SCALE + kv * D + d)[None, :]
    tl.store(OUT + (first + lane)[:, None] * D + d[None, :], acc.to(OUT.dtype.element_ty))


@triton.jit
def _fold(
    acc, total, top, s, V, K_SCALE, scale_at, block, S, unit, bits,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax."""
    lane, d = tl.arange(0, BLOCK), tl.arange(0, D)
    if FP8 >= 1:
        unit *= tl.load(K_SCALE + scale_at)
    new = tl.maximum(top, tl.max(s, 1) * unit)
    p = tl.exp2(s * unit - (new - bits)[:, None])
    fade = tl.exp2(top - new)
    total = total * fade + tl.sum(p, 1)
    if FP8 == 2:  # [D, S]
        v = tl.trans(tl.load(V + d[:, None] * S + (block * BLOCK + lane)[None, :]))
    else:
        v = tl.load(V + (block * BLOCK + lane)[:, None] * D + d[None, :])
    if APART:
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], max_num_imprecise_acc=BLOCK)
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
    return acc, total, new


def rounded(t: Tensor, dims) -> tuple[Tensor, Tensor]:
    """As e4m3, and the float32 scale that is common to `dims`, over which it is the largest."""
    scale = t.abs().amax(dims, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (t / scale).to(E4M3), scale.contiguous()


def prepared(q: Tensor, k: Tensor, v: Tensor, fp8: int) -> tuple[Tensor, ...]:
    """q, k, v as the kernel reads them, and their scales; stand-ins where it reads none."""
    if not fp8:
        return q, k, v, q, q, q
    k = k - k.mean(2, keepdim=True, dtype=torch.float32).to(k.dtype)
    (q8, q_scale), (k8, k_scale) = (rounded(t.unflatten(2, (-1, BLOCK)), (3, 4)) for t in (q, k))
    made = q8.flatten(2, 3), k8.flatten(2, 3)
    if fp8 == 1:
        return *made, v, q_scale, k_scale, q_scale
    v8, v_scale = rounded(v.mT.contiguous(), 3)
    return *made, v8, q_scale, k_scale, v_scale


def attention(given: tuple[Tensor, ...], lists: BlockLists, out: Tensor, fp8, apart, stages):
    """Fills out `[1, H, S, D]`; the compiled kernel."""
    _, H, S, D = out.shape
    count, index = lists.full_count[0], lists.full_index[0]
    return _attention[(H * (S // BLOCK),)](
        *(*given, out, count, index, count.stride(0), *index.stride()[:2]),
        *(S, H // given[1].shape[1], D**-0.5 * 1.4426950408889634),
        D=D,
        BLOCK=BLOCK,
        FP8=fp8,
        APART=apart,
        num_warps=8,
        num_stages=stages,
    )


def inputs(H: int, HKV: int, S: int, D: int, outliers: bool, device, dtype) -> tuple[Tensor, ...]:
    """Normal; with outliers keys have large means in a few channels, queries and values values."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, S, D, device=device) for n in (H, HKV, HKV))
    if outliers:
        few = max(1, D // 32)
        k[..., :few] += 10 * torch.randn(1, HKV, 1, few, device=device)
        q[..., few : 2 * few] *= 5
        v[..., :few] *= 10
    return tuple(t.to(dtype) for t in (q, k, v))


def lists_of(grid: Grid, heads: int, density: float) -> BlockLists:
    """The row's first block, the diagonal and others up to a density."""
    i, j = (torch.arange(n, device=grid.q_len.device) for n in (grid.nq, grid.nk))
    forced = (j == 0) | (j == i[:, None])
    causal = j <= i[:, None]
    free = (causal & ~forced).sum()
    share = (density * causal.sum() - (causal & forced).sum()) / free
    chance = torch.rand(1, heads, grid.nq, grid.nk, device=i.device)
    return BlockLists.of(grid, heads, (chance < share) | forced)


def caught(path: str, tokens: int, dtype) -> tuple[Tensor, ...]:
    """q, k, v `[1, heads, tokens, D]` of the middle layer of a model that reads a prompt."""
    kept = {}

    def catch(module, query, key, value, *args, **more):
        kept[module.layer_idx] = query, key, value
        return sdpa_attention_forward(module, query, key, value, *args, **more)

    AttentionInterface.register("caught", catch)
    model, tokenizer = load(path)
    model.set_attn_implementation("caught")
    ids = make_prompts(tokenizer, tokens, 1, 0)[0].ids.to(model.device)
    model(ids, use_cache=False, logits_to_keep=1)
    return tuple(t.to(dtype).contiguous() for t in kept[len(kept) // 2])


def wrong(q, k, v, out: Tensor, lists: BlockLists) -> float:
    """Relative error of a query against float32 over the same blocks, mean of 64 a head."""
    rows = torch.linspace(0, q.shape[2] - 1, 64, device=q.device).long()
    group, mask, found = q.shape[1] // k.shape[1], lists.mask(rows), []
    for kv in range(k.shape[1]):  # one after the other, to save memory
        heads = slice(kv * group, (kv + 1) * group)
        logits = q[:, heads, rows].float() @ k[:, kv : kv + 1].float().mT * q.shape[-1] ** -0.5
        kept = mask[:, heads] if mask.shape[1] > 1 else mask
        weights = logits.masked_fill(~kept, -torch.inf).softmax(3)
        found.append(weights @ v[:, kv : kv + 1].float())
    wanted = torch.cat(found, 1)
    return float(((out[:, :, rows] - wanted).norm(dim=3) / wanted.norm(dim=3)).mean())


def tell(kernel) -> str:
    """What the compiler made of it."""
    ptx = kernel.asm.get("ptx", "")
    products = [f"{ptx.count(name)} {name}" for name in ("wgmma.mma_async", "mma.sync")]
    return (
        f"{kernel.n_regs} registers, {kernel.n_spills} spilled, "
        f"{kernel.metadata.shared >> 10} KiB; {', '.join(products)}; {ptx.count('e4m3x2')} to e4m3"
    )


def case(name: str, q, k, v, lists: BlockLists, until: float) -> None:
    """One row an arm."""
    H, S, D = q.shape[1:]
    kv = torch.arange(H, device=q.device) // (H // k.shape[1])
    blocks = float(lists.blocks().sum() - lists.part_count.sum() / 2)
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(ours.prefill, q, k, v, lists, kv, scale=D**-0.5)
    }
    off, said, before = {"ours": wrong(q, k, v, calls["ours"](), lists)}, {}, {}
    out, ready = torch.empty_like(q), {fp8: prepared(q, k, v, fp8) for fp8 in range(3)}
    for arm, (fp8, apart, stages) in ARMS.items():
        call = partial(attention, ready[fp8], lists, out, fp8, apart, stages)
        try:
            made = call()
        except Exception as problem:  # one that doesn't fit leaves the others their turn
            said[arm] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:150]}"
            off[arm] = float("nan")
            continue
        calls[arm], off[arm] = call, wrong(q, k, v, out, lists)
        said[arm] = tell(made) if q.is_cuda else ""
    times = {arm: [] for arm in calls}
    if q.is_cuda:
        for _ in range(ROUNDS):
            for arm, call in calls.items():
                if time.perf_counter() < until:
                    times[arm].append(bench_ms(call, 10))
        for fp8 in (1, 2):
            before[fp8] = bench_ms(partial(prepared, q, k, v, fp8), 5)
    kept = float((lists.blocks() / lists.grid.blocks()[:, None]).mean())
    for arm in off:
        ms = statistics.median(times[arm]) if times.get(arm) else float("nan")
        base = statistics.median(times["ours"]) if times["ours"] else float("nan")
        rate = 4 * D * BLOCK**2 * blocks / ms / 1e9
        cells = name, f"{S:,}", f"{kept:.3f}", arm, f"{ms:.3f}", f"{base / ms:.2f}", f"{rate:.0f}"
        ready_ms = f"{before[ARMS[arm][0]]:.2f}" if arm != "ours" and ARMS[arm][0] in before else ""
        print(
            "| " + " | ".join([*cells, f"{off[arm]:.2e}", ready_ms, said.get(arm, "")]) + " |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="its queries, keys and values, too")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--seconds", type=float, default=240, help="time nothing later than this")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    until = time.perf_counter() + args.seconds
    H, HKV, D, cases, tokens = SHAPES[args.shape]
    device, dtype = ("cuda", torch.bfloat16) if args.shape == "8b" else ("cpu", torch.float16)
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, ", end="")
    print(f"Triton {triton.__version__}")
    head = "inputs tokens density arm ms x_ours TFLOP/s error before_ms note".split()
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for S, density in cases:
        grid = replace(Grid.causal(1, S, BLOCK, device), padded=False, past=False)
        for outliers in (False, True):
            q, k, v = inputs(H, HKV, S, D, outliers, device, dtype)
            lists = lists_of(grid, H, density) if density < 1 else BlockLists.of(grid, H)
            case("outliers" if outliers else "random", q, k, v, lists, until)
    if args.model:
        q, k, v = caught(args.model, tokens, dtype)
        grid = replace(Grid.causal(1, tokens, BLOCK, device), padded=False, past=False)
        lists = BlockTopK(share=SHARE).lists(q, k, grid, q.shape[-1] ** -0.5)
        case("model", q, k, v, lists, until)


if __name__ == "__main__":
    main()
