"""Random matrices of codes, as torchao's tensors hold them."""

from __future__ import annotations

import torch

from hfsparse.kernels.codes import Quantised


def matrix(kind: str, N: int, K: int, group: int) -> Quantised:
    """One of int8, fp8, int4, or "int4 in tiles", whose last rows may be spare."""
    made = torch.Generator().manual_seed(N)

    def random(*shape):
        return torch.rand(shape, generator=made) + 0.1

    def codes(*shape, low=-128, high=128, dtype=torch.int8):
        return torch.randint(low, high, shape, generator=made, dtype=dtype)

    if kind == "int8":
        zero = codes(N, K // group) if group < K else None
        return Quantised(N, codes(N, K), random(N, K // group), zero)
    if kind == "fp8":
        return Quantised(N, (random(N, K) - 0.5).to(torch.float8_e4m3fn), random(N, K // group))
    scale, zero = ((random(K // group, -(-N // 8) * 8) - 0.6 * i).half().t() for i in range(2))
    words = dict(low=-(1 << 31), high=1 << 31, dtype=torch.int32)
    if kind == "int4":
        return Quantised(N, codes(N, K // 8, **words), scale[:N], zero[:N])
    return Quantised(N, codes(-(-N // 8), K // 128, 32, 4, **words), scale, zero, tiled=True)
