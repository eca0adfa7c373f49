"""Pages of keys and values in 8 or 4 bits a number, or in fp8: how they are packed, and read again.

Between its smallest and its largest a number takes one of 256 or 16 steps. Of keys that is told by
page and channel, since some channels are far larger than others; of values by token (KIVI, arXiv
2402.02750). Both ends are kept, in the model's type, and come back as they were. In fp8 (e4m3,
arXiv 2209.05433) its largest number, 448, stands for the end that is farther from zero.

A row's newest page is packed once it is full. Until then it lies as it came, and for a while
longer: the newest two pages do, page n where n is even in the first half.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hfsparse.lists.grid import PAGE

Bits = Literal[16, 8, 4, "fp8"]  # of a number in the cache; 16: it has the model's own type
BITS: tuple[Bits, ...] = get_args(Bits)
LARGEST = 448.0  # number of fp8
NEWEST = 2 * PAGE  # tokens that are held as they came
TINY = torch.finfo(torch.float32).tiny  # a step at least: of ends that are one no number differs


def width_of(bits: Bits) -> int:
    """Bits that a number takes."""
    return 8 if bits == "fp8" else bits


def said(bits: Bits) -> str:
    """In words."""
    return bits if bits == "fp8" else f"{bits} bits"


def pack(t: Tensor, low: Tensor, high: Tensor, bits: Bits) -> Tensor:
    """t `[..., D]` between low and high, which broadcast: uint8 `[..., D * width / 8]`.

    Of 4 bits byte c has channel c in its low half, and channel c + D / 2 in its high half.
    """
    start, step = _steps(low, high, bits)
    code = (t.float() - start) / step.clamp(min=TINY)
    if bits == "fp8":
        return code.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    code = code.round().clamp(0, (1 << bits) - 1).to(torch.uint8)
    if bits == 4:
        first, second = code.chunk(2, -1)
        code = second << 4 | first
    return code


def unpack(code: Tensor, low: Tensor, high: Tensor, bits: Bits) -> Tensor:
    """What `pack` packed, `[..., D]` in the type of low."""
    if bits == "fp8":
        code = code.view(torch.float8_e4m3fn).float()
    elif bits == 4:
        code = torch.cat([code & 15, code >> 4], -1)
    start, step = _steps(low, high, bits)
    return (start + code * step).to(low.dtype)


def _steps(low: Tensor, high: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """What stands for the code 0, and for 1 more than that."""
    low, high = low.float(), high.float()
    if bits == "fp8":
        return torch.zeros_like(low), torch.maximum(-low, high) * steps(bits)
    return low, (high - low) * steps(bits)


def steps(bits: Bits) -> float:
    """A code's worth, of what the ends span: a factor, since devices multiply alike."""
    return 1 / LARGEST if bits == "fp8" else 1 / ((1 << bits) - 1)


class Packed(NamedTuple):
    """What a store holds of some kv heads: P pages, packed, and the newest two as they came.

    A row of n tokens has its page n // PAGE, which is not full, among the newest alone, and reads
    all others packed.
    """

    bits: Bits
    k: Tensor  # [B, H, P, PAGE, D * width / 8] uint8
    v: Tensor  # the same of Dv
    low: Tensor  # [B, H, P, D] smallest and largest key of each page, by channel
    high: Tensor
    least: Tensor  # [B, H, P, PAGE] smallest and largest channel of each value
    most: Tensor
    newest_k: Tensor  # [B, H, NEWEST, D], where position p lies at p % NEWEST
    newest_v: Tensor

    @property
    def slots(self) -> int:
        """Tokens that its pages have room for."""
        return self.k.shape[2] * PAGE

    @property
    def pages(self) -> tuple[Tensor, ...]:
        """What it has of each page: all but the newest as they came."""
        return self[1:-2]

    def first(self, tokens: int | None) -> Packed:
        """The pages of the first so many tokens; None: all."""
        return self.some(slice(None if tokens is None else -(-tokens // PAGE)))

    def some(self, pages: slice) -> Packed:
        """Those pages, and the newest two as they came."""
        return self._make([self.bits, *(t[:, :, pages] for t in self.pages), *self[-2:]])

    def of(self, rows: Tensor | None) -> Packed:
        """Of those rows; None: of all."""
        return self if rows is None else self._make([self.bits, *(t[rows] for t in self[1:])])

    def read(self, length: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values `[B, H, N, D]` of rows of `length` [B].

        at `[B or 1, N]`: the position that each slot holds, -1: none.
        """
        k = unpack(self.k, self.low[:, :, :, None], self.high[:, :, :, None], self.bits)
        v = unpack(self.v, self.least[..., None], self.most[..., None], self.bits)
        new = (at // PAGE == (length // PAGE)[:, None])[:, None, :, None]
        lies = (at % NEWEST)[:, None, :, None]

        def whole(packed: Tensor, newest: Tensor) -> Tensor:
            B, H, _, D = newest.shape
            newest = newest.gather(2, lies.expand(B, H, -1, D))
            return torch.where(new, newest, packed.flatten(2, 3))

        return whole(k, self.newest_k), whole(v, self.newest_v)

    def choose(
        self, head: int, at: Tensor, length: Tensor, lies: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, 1, n, D]` of one head at positions `at` [B, n] of rows of `length`.

        Positions of pages that there is room for; of a store that keeps every key. lies: the page
        where each lies; None: that of its number.
        """
        row, page, slot = torch.arange(len(at), device=at.device)[:, None], at // PAGE, at % PAGE
        new = (page == (length // PAGE)[:, None])[..., None]
        page = page if lies is None else lies
        k, v = self.k[row, head, page, slot], self.v[row, head, page, slot]
        k = unpack(k, self.low[row, head, page], self.high[row, head, page], self.bits)
        ends = (t[row, head, page, slot, None] for t in (self.least, self.most))
        v, lies = unpack(v, *ends, self.bits), at % NEWEST
        k = torch.where(new, self.newest_k[row, head, lies], k)
        v = torch.where(new, self.newest_v[row, head, lies], v)
        return k[:, None], v[:, None]
