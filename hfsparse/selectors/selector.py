"""What a selector is, and the kinds that plans may name.

    @register("quest")
    @dataclass(frozen=True)
    class Quest:
        share: float = 0.06                                       # its parameters in plans

        @cached_property
        def budget(self) -> Budget: ...                           # how many pages are read
        def bind(self, layer, heads, data) -> Selector: ...       # for some heads of one layer
        def summarise(self, keys, real) -> dict[str, Tensor]: ... # what is kept of pages: the index
        def pages(self, q, index, length, scale) -> PageLists: ...

A full store of the cache keeps the index: it makes, grows, crops, reorders and counts it, and has
`summarise` follow each prompt and step. A page is PAGE tokens of a row, as row-relative positions:
page p holds the tokens from p * PAGE on. An index may be better of many pages together than of
each by itself: see `Segmented`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from hfsparse.lists import PAGE, PageLists
from hfsparse.registry import Registry
from hfsparse.selectors.budget import Budget

SELECTORS = Registry("pages")

register = SELECTORS.register


class Selector(Protocol):
    """What caches, kernels and the profiler ask of a selector.

    It is a frozen dataclass: its fields are its parameters in plans, numbers, words or true and
    false, each with a default. A field that `bind` fills is none: `field(default=None,
    compare=False, repr=False)`. Numbers out of range are refused by `__post_init__` (`require`).
    """

    kind: str  # set by `register`

    @property
    def budget(self) -> Budget:
        """How much a step reads, of what size, and how often it chooses, in numbers of the host."""
        ...

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> Selector:
        """The selector of these kv heads of a layer: all else is asked of what this returns.

        data: the plan's table that the parameter `data` names (`Calibrated`), on the CPU; None
        without such a parameter. A selector that needs nothing of these returns itself. Raises
        ValueError for a table that does not fit. Before it is bound, one that needs a table
        raises ValueError in `summarise` and `pages`: it must not choose by anything else.
        """
        ...

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        """The index of pages of keys `[B, H, n, PAGE, D]`: by name, tensors `[B, H, n, ...]`.

        real: bool, broadcasts over `keys`; where it is False a slot holds no token, and anything,
        NaN included. H are the heads that it is bound to. What is said of a page depends on its
        own real keys alone. It is pure, and serves prompts, steps, the profiler and, of no rows (B
        is 0) or on torch's meta device, whoever asks for shapes and bytes. A step may be recorded
        as a CUDA graph: the host must not wait, and tables lie on the device already
        (`DeviceTensor`).

        The names `low` and `high`, both and no others, mean each page's smallest and largest key
        by channel `[B, H, n, D]`, or those of its equal parts `[B, H, n, parts, D]`, in the keys'
        dtype: kernels write these themselves. Other names are free, and so are other shapes, such
        as values by token `[B, H, n, PAGE, ...]`; `mean_key` and `mean_value` are the store's own
        (`Budget.means`).
        """
        ...

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        """Units that are read by new queries q `[B, Hq, Q, D]`: the last Q tokens of their rows.

        index: of the P pages that there is room for, `[B, H, P, ...]`; Hq is a multiple of H, the
        heads of a group lie side by side. length [B] int64: tokens of each row, new ones included;
        0: an empty row, whose list is empty. Lists are int64, ascending, no unit twice, of
        `budget.unit` tokens each, with `budget.width(P, Q)` places; those not counted name any
        unit of the P pages.

        One that ranks units by votes may also have `scores(q, index, length, scale)`, what each
        unit is worth in nats, `[B, Hq, Q, U]`: where its `pages` are `budget.choose` of these, and
        no kernel is its own, kernels choose by them all the same.

        What must hold:
        - The row's first page and those of the new queries are read (`Budget.best` sees to it).
        - What is chosen for a row depends on nothing else: not on the room that there is (a CUDA
          graph passes all of it, a step on the CPU no more than the longest row needs), nor on
          other rows. Beyond a row's last page the index may hold anything, NaN included.
        - Equal scores go to the lower unit.
        - The host never waits for the device: no `.item()`, no `if` on a tensor's value.
        - The numbers are worked out as exactly whatever rounds the model's products
          (`precision.exact`); autocast is off.
        """
        ...


class Segmented(Selector, Protocol):
    """A selector whose index is made of many pages together, where they are there.

    Segment s of a row holds the tokens from s * segment on. A call finds the index of the first
    `tokens_built(segment, past)` of its `past` tokens as `build` makes it, segment by segment, and
    that of later pages as `summarise` does: it depends on a row's keys and its length before the
    call alone, not on how they came.
    """

    segment: int  # tokens: 64, 128, ... At PAGE `build` is never called

    def build(self, keys: Tensor) -> dict[str, Tensor]:
        """The index of n pages of keys `[B, H, n, PAGE, D]`, all of tokens, from a segment's first
        on: of whole segments, the last one perhaps shorter.

        In names, shapes and types as `summarise`, and as pure. It runs between steps, and is no
        part of a CUDA graph; the host must not wait.
        """
        ...


def segment_of(selector: Selector | None) -> int:
    """Tokens of whose pages the index is made together; PAGE: each page's by itself."""
    return getattr(selector, "segment", PAGE)


def part_of(segment: int) -> int:
    """After so many more tokens the index of a segment that is not whole yet is made anew."""
    return max(segment // 8, PAGE)


def tokens_built(segment: int, past: int) -> int:
    """Of a row of `past` tokens, how many have an index that was made segment by segment."""
    part = part_of(segment)
    return past // part * part if segment > PAGE else 0


class Calibrated(Selector, Protocol):
    """A selector that reads a table made offline, by the profiler or by hand."""

    data: str  # a parameter: the name of its table under the plan's `data`

    def calibrate(self, seen: Any) -> dict[str, Tensor]:
        """What one layer of one calibration prompt tells, by name, each `[H, ...]`: by kv head.

        seen: a `profiler.measure.capture.Seen`: q `[1, Hq, L, D]`, k and v `[1, H, L, D]`, post-
        RoPE. The table that `bind` gets holds the mean over prompts, `[layers, H, ...]`, in
        float32: `Plan.check` refuses any other shape.
        """
        ...
