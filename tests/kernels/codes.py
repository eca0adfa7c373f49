"""Random matrices of codes, as torchao's tensors hold them."""

from __future__ import annotations

import torch

from hfsparse.kernels.codes import Quantised


def matrix(kind: str, N: int, K: int, group: int) -> Quantised:
    """One of int8, whose groups have zeros, fp8, or int4 in tiles."""
    made = torch.Generator().manual_seed(N)
    if kind == "int4":
        words = torch.randint(-(2**31), 2**31, (N, K // 8), generator=made).int()
        scale = torch.randn(K // group, N, 2, generator=made).bfloat16()
        return Quantised(words, scale)
    scale = torch.rand(N, K // group, generator=made) + 0.1
    if kind == "fp8":
        codes = torch.randn(N, K, generator=made).to(torch.float8_e4m3fn)
        return Quantised(codes, scale)
    codes, zero = (
        torch.randint(-128, 128, (N, n), generator=made, dtype=torch.int8) for n in (K, K // group)
    )
    return Quantised(codes, scale, zero if group < K else None)
