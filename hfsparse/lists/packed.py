"""Pages of keys and values in 8 or 4 bits a number, or in fp8: how they are packed, and read again.

Between its smallest and its largest a number takes one of 256 or 16 steps. Of keys that is told by
page and channel, since some channels are far larger than others; of values by token (KIVI, arXiv
2402.02750). Both ends are kept, in the model's type, and come back as they were. In fp8 (e4m3,
arXiv 2209.05433) its largest number, 448, stands for the end that is farther from zero.

Of keys in 4 bits two channels share a byte unevenly: that whose ends are farther apart has 5 bits,
the other 3. A head that retrieves tells keys apart by a few channels, which rope turns slowly and
which span much; of 4 bits each, nearly all noise of its logits is theirs.

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
WIDE, NARROW = 1 / 31, 1 / 7  # a code's worth, of 5 and 3 bits
UNPACKED = 1 << 22  # numbers of keys and values that are worked out in float32 at a time
TINY = torch.finfo(torch.float32).tiny  # a step at least: of ends that are one no number differs


def width_of(bits: Bits) -> int:
    """Bits that a number takes."""
    return 8 if bits == "fp8" else bits


def said(bits: Bits) -> str:
    """In words."""
    return bits if bits == "fp8" else f"{bits} bits"


def pack(t: Tensor, low: Tensor, high: Tensor, bits: Bits) -> Tensor:
    """t `[..., D]` between low and high, which broadcast: uint8 `[..., D * width / 8]`.

    Of 4 bits a byte has two channels (`of_bytes`), the first in its lower bits. Both have 4, but
    where ends go by channel that whose ends are farther apart has 5, and the other 3.
    """
    start, step = _steps(low, high, bits)
    code = (t.float() - start) / step.clamp(min=TINY)
    if bits == "fp8":
        return code.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    code = code.round().clamp(min=0)
    if bits == 8:
        return code.clamp(max=255).to(torch.uint8)
    last, lower = 15, 4
    if _by_channel(low):
        wide = _is_wide(low, high)
        last, lower = torch.where(wide, 31, 7), _lower_bits(wide)
    first, second = of_bytes(code.clamp(max=last).to(torch.uint8))
    return second << lower | first


def unpack(code: Tensor, low: Tensor, high: Tensor, bits: Bits) -> Tensor:
    """What `pack` packed, `[..., D]` in the type of low."""
    if bits == "fp8":
        code = code.view(torch.float8_e4m3fn).float()
    elif bits == 4:
        lower = _lower_bits(_is_wide(low, high)) if _by_channel(low) else 4
        code = _of_channels(code & (1 << lower) - 1, code >> lower)
    start, step = _steps(low, high, bits)
    return (start + code * step).to(low.dtype)


def _steps(low: Tensor, high: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """What stands for the code 0, and for 1 more than that."""
    low, high = low.float(), high.float()
    if bits == "fp8":
        return torch.zeros_like(low), torch.maximum(-low, high) * steps(bits)
    if bits == 4 and _by_channel(low):
        return low, (high - low) * torch.where(_is_wide(low, high), WIDE, NARROW)
    return low, (high - low) * steps(bits)


def steps(bits: Bits) -> float:
    """A code's worth, of what the ends span: a factor, since devices multiply alike."""
    return 1 / LARGEST if bits == "fp8" else 1 / ((1 << bits) - 1)


def _by_channel(low: Tensor) -> bool:
    """Whether ends are those of keys; a token's are the same for all of its channels."""
    return low.shape[-1] > 1


def _is_wide(low: Tensor, high: Tensor) -> Tensor:
    """By channel whether it has 5 bits: of two in a byte that whose ends are farther apart."""
    first, second = of_bytes(high.float() - low.float())
    return _of_channels(first > second, first <= second)


def _lower_bits(wide: Tensor) -> Tensor:
    """Bits that a byte's first channel has."""
    return torch.where(wide[..., : wide.shape[-1] // 2], 5, 3).to(torch.uint8)


def of_bytes(t: Tensor) -> tuple[Tensor, Tensor]:
    """The two channels of each byte: c, and of the second half the one a quarter further round.

    Whether rope turns channels c and c + D / 2 together, or c and c + 1, one of the two then turns
    faster than the other. Of keys the fast ones tell where a token is, the slow ones what it is.
    """
    first, second = t.chunk(2, -1)
    return first, second.roll(-_quarter(t.shape[-1]), -1)


def _of_channels(first: Tensor, second: Tensor) -> Tensor:
    """What `of_bytes` took apart."""
    return torch.cat([first, second.roll(_quarter(2 * second.shape[-1]), -1)], -1)


def _quarter(dim: int) -> int:
    """A quarter of the channels, or a little less, so that it is even."""
    return dim // 8 * 2


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


class Past(NamedTuple):
    """What a chunk finds packed: whole pages of each row, which are the first of its keys.

    What comes behind these, up to the chunk's last token, lies elsewhere, as it came.
    """

    packed: Packed
    tokens: Tensor  # [B] int64, that the whole pages of each row have

    def of(self, rows: Tensor | None) -> Past:
        """Of those rows; None: of all."""
        return self if rows is None else Past(self.packed.of(rows), self.tokens[rows])

    def keys(self, behind: Tensor, heads: slice | Tensor, tokens: int) -> Tensor:
        """All keys `[B, n, S, D]` of some heads, unpacked, of rows of at most so many tokens.

        behind `[B, n, T, D]`: theirs that lie behind the pages.
        """
        k, low, high = (t[:, heads] for t in (self.packed.k, self.packed.low, self.packed.high))
        (B, n, P), (T, D) = k.shape[:3], behind.shape[2:]
        made = behind.new_empty(B, n, P * PAGE + T, D)
        step = max(1, UNPACKED // (B * n * PAGE * D))
        for first in range(0, P, step):
            own = slice(first, min(first + step, P))
            ends = low[:, :, own, None], high[:, :, own, None]
            found = unpack(k[:, :, own], *ends, self.packed.bits).flatten(2, 3)
            made[:, :, own.start * PAGE : own.stop * PAGE] = found
        at = self.tokens[:, None] + torch.arange(T, device=behind.device)
        made.scatter_(2, at[:, None, :, None].expand_as(behind), behind)
        return made[:, :, :tokens]
