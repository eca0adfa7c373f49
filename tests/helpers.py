"""What every numeric test shares: one comparison, one plain attention, one way to make batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hfsparse.lists import BlockLists, Grid

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
ROWS = ("equal", "left_padded", "empty_row")


def close(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """‖a − b‖ / ‖b‖ within the tolerance of `dtype` (a's own)."""
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    a, b, dtype = a.double(), b.double(), dtype or a.dtype
    error = (a - b).norm() / b.norm().clamp(min=1e-30)
    if not error <= TOLERANCE[dtype]:  # NaN fails too
        print(f"relative error {error:.2e} > {TOLERANCE[dtype]:.0e}")
        return False
    return True


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Float32 attention of q `[B, H, Q, D]` over the keys that mask `[B, H, Q, S]` keeps, else 0.

    k, v `[B, Hkv, S, D]` where no pair is kept may hold anything, NaN included.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, 1) for t in (k, v))
    read = mask.any(2)[..., None]
    k, v = k.masked_fill(~read, 0), v.masked_fill(~read, 0)
    logits = q.float() @ k.transpose(2, 3) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if s_aux is not None:  # one more logit, of a key without a value
        bare = s_aux.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat([logits, bare], 3), 3)[..., :-1] @ v
    return torch.softmax(logits, 3).nan_to_num(0) @ v


def with_means(k: Tensor, v: Tensor, kept: Tensor, seen: Tensor, sizes: Sequence[int]):
    """A row's k, v `[H, S, D]` and kept `[H, Q, S]`, and behind these a key for each unit of so
    many tokens (0: none) of a head that a query sees whole and reads nothing of: its mean.

    seen [Q, S]: what a query may read at all. The fourth is what is added to logits `[H, 1, n]`.
    A row's last unit, if there are fewer tokens, is read by whom sees it whole.
    """
    H, _, S = kept.shape
    parts = [(k, v, kept, torch.zeros(H, 1, S, dtype=k.dtype))]
    for size in {*sizes} - {0}:
        mine = torch.tensor([size == own for own in sizes])[:, None, None]
        whole = _units(seen, 1, size).all(2) & ~_units(kept, 2, size).any(3) & mine
        means = (_units(t, 1, size).mean(2) for t in (k, v))
        parts.append((*means, whole, torch.full((H, 1, S // size), size, dtype=k.dtype).log()))
    return [
        torch.cat(each, dim)
        for each, dim in zip(zip(*parts, strict=True), (1, 1, 2, 2), strict=True)
    ]


def _units(t: Tensor, dim: int, size: int) -> Tensor:
    """The whole units of so many tokens along a dim."""
    n = t.shape[dim] // size
    return t.narrow(dim, 0, n * size).unflatten(dim, (n, size))


@dataclass(frozen=True)
class Batch:
    """Random prompts, or chunks behind a past, shifted to column 0; slots past a row's end: NaN."""

    q: Tensor  # [B, H, Sq, D]
    k: Tensor  # [B, Hkv, Sk, D]
    v: Tensor
    grid: Grid
    scale: float

    def row(self, b: int) -> Batch:
        """Row b by itself, without padding."""
        Q, S = int(self.grid.q_len[b]), int(self.grid.k_len[b])
        one = self.grid.q_len[b : b + 1], self.grid.k_len[b : b + 1]
        grid = Grid(*one, Q, S, self.grid.block, self.grid.window)
        q, k, v = self.q[b : b + 1, :, :Q], self.k[b : b + 1, :, :S], self.v[b : b + 1, :, :S]
        return Batch(q, k, v, grid, self.scale)


def lengths(length: int, past: int, rows: str) -> tuple[list[int], list[int]]:
    """New tokens and all tokens of each batch row, the longest having `length` new ones."""
    pads = {"equal": [0, 0], "left_padded": [0, 13, length - 1], "empty_row": [0, length]}[rows]
    new = [max(length - p, 0) for p in pads]
    if rows == "left_padded":
        new = [max(n, 1) for n in new]
    pasts = [max(past - 7 * b, 0) if n else 0 for b, n in enumerate(new)]
    return new, [p + n for p, n in zip(pasts, new, strict=True)]


def batch(
    length: int,
    *,
    past: int = 0,
    rows: str = "equal",
    group: int = 3,
    kv_heads: int = 2,
    block: int = 32,
    window: int | None = None,
    dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    poison: float = torch.nan,
    seed: int = 0,
) -> Batch:
    """Random q, k, v of a few rows, `group` q heads to a kv head; `poison` in every dead slot."""
    made = torch.Generator().manual_seed(seed)
    new, total = (torch.tensor(t) for t in lengths(length, past, rows))
    B, Sq, Sk = len(new), int(new.max()), int(total.max())
    shapes = (Sq, kv_heads * group, dim), (Sk, kv_heads, dim), (Sk, kv_heads, value_dim or dim)
    q, k, v = (  # heads lie inside tokens in memory, as models have them
        torch.randn(B, *shape, generator=made).to(dtype).transpose(1, 2) for shape in shapes
    )
    for tensor, held in ((q, new), (k, total), (v, total)):
        dead = torch.arange(tensor.shape[2]) >= held[:, None]
        tensor.masked_fill_(dead[:, None, :, None], poison)
    return Batch(q, k, v, Grid(new, total, Sq, Sk, block, window), dim**-0.5)


def causal(grid: Grid, heads: int) -> Tensor:
    """bool [B, heads, Sq, Sk]: dense causal attention, from the definition."""
    kept = torch.zeros(len(grid.q_len), heads, grid.Sq, grid.Sk, dtype=torch.bool)
    for b, (new, total) in enumerate(zip(grid.q_len.tolist(), grid.k_len.tolist(), strict=True)):
        for i in range(new):
            at = total - new + i
            first = 0 if grid.window is None else max(at - grid.window + 1, 0)
            kept[b, :, i, first : at + 1] = True
    return kept


def read_pairs(
    it: Batch, lists: BlockLists, kv_heads: Tensor, skip: float, tile: tuple[int, int]
) -> tuple[Tensor, int, int]:
    """Skip-softmax by its definition: the mask of what is read, tiles skipped, tiles looked at."""
    grid, block, (queries, keys) = lists.grid, lists.grid.block, tile
    kept, k = lists.mask(), it.k[:, kv_heads].float().nan_to_num(0)
    logits = (it.q.float().nan_to_num(0) @ k.mT * it.scale).masked_fill(~kept, -torch.inf)
    edge = (0, grid.nk * block - grid.Sk, 0, grid.nq * block - grid.Sq)
    logits = torch.nn.functional.pad(logits, edge, value=-torch.inf)
    lost = seen = 0
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in kept.shape[:2])).tolist():
        for first in range(0, grid.nq * block, queries):
            rows, i, top = slice(first, first + queries), first // block, torch.tensor(-torch.inf)
            for name in ("part", "full"):
                count = getattr(lists, f"{name}_count")[b, h, i]
                for j in getattr(lists, f"{name}_index")[b, h, i, :count].tolist():
                    for start in range(j * block, (j + 1) * block, keys):
                        part = logits[b, h, rows, start : start + keys]
                        high, seen = part.amax(1), seen + 1
                        if ((high >= top - skip) & (high > -torch.inf)).any():
                            top = torch.maximum(top, high)
                        else:
                            part.fill_(-torch.inf)  # in `logits`
                            lost += 1
    return (logits > -torch.inf)[:, :, : grid.Sq, : grid.Sk], lost, seen


@contextmanager
def poisoned() -> Iterator[None]:
    """Buffers that are made without numbers hold NaN, or a type's largest number."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def poison_of(dtype: torch.dtype, poison: float) -> float:
    """The nearest to `poison` that a type of number has: the largest in the place of NaN."""
    if dtype.is_floating_point:
        return poison if poison != poison else min(poison, torch.finfo(dtype).max)
    return int(min(poison, torch.iinfo(dtype).max)) if poison == poison else torch.iinfo(dtype).max
