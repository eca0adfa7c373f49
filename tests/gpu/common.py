"""What the GPU tests share: batches on the device, one comparison, and memory full of NaN."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hfsparse.kernels import Need, fa4
from hfsparse.lists import Grid
from tests.helpers import Batch, batch

DEVICE = torch.device("cuda")
BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {SINGLE: 2e-5, HALF: 1e-3, BF16: 6e-3}  # sums in another order than on the CPU


def near(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> bool:
    """‖a − b‖ / ‖b‖ within the tolerance of `dtype` (the result's own); NaN is not."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    a, b = found.double(), expected.double()
    off, most = (a - b).norm() / b.norm().clamp(min=1e-30), TOLERANCE[dtype or found.dtype]
    if not off <= most:
        print(f"relative error {off:.2e}, at most {most:.0e} is rounding")
        return False
    return True


def on_gpu(length: int, **more) -> Batch:
    """`tests.helpers.batch` in blocks of 128, moved to the device."""
    it = batch(length, **{"block": 128, "dim": 128, "dtype": BF16, **more})
    q, k, v = (t.to(DEVICE) for t in (it.q, it.k, it.v))
    grid = it.grid
    grid = replace(grid, q_len=grid.q_len.to(DEVICE), k_len=grid.k_len.to(DEVICE))
    return replace(it, q=q, k=k, v=v, grid=grid)


def unwritten(shape: torch.Size, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next tensors of this size get."""
    made = [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    del made


@contextmanager
def rounding():
    """What a program may have set: TF32 products, autocast, deterministic algorithms alone."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cuda", BF16):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(before)


def need_fa4(q: Tensor, k: Tensor, v: Tensor, lists: bool = True) -> None:
    """Skip where flash-attn-4 can't serve, with its own reason."""
    if reason := fa4.why_not(Need.of(q, k, v, lists=lists)):
        pytest.skip(reason)


def causal(new: int, total: int, block: int = 128) -> Grid:
    """The grid of one row of `total` tokens, of which the last `new` are queries."""
    q_len, k_len = (torch.tensor([n], device=DEVICE) for n in (new, total))
    return Grid(q_len, k_len, new, total, block, padded=False, past=new < total)


def compiled(module) -> int:
    """How many forms of a module's Triton kernels were compiled so far, or read from disk."""
    from triton.runtime import JITFunction

    jitted = [f for f in vars(module).values() if isinstance(f, JITFunction)]
    return sum(len(caches[0]) for f in jitted for caches in f.device_caches.values())
