"""A few new tokens behind a past: selectors choose pages, a kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfsparse import kernels
from hfsparse.lists import PAGE, Band, PageLists
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.layer import Layer
from hfsparse.runtime.cache.ring import Ring, ring_positions
from hfsparse.runtime.rows import Lengths, group_rows, put_rows, q_heads_of, take_rows

STEP = (
    16  # behind a past or a prompt in chunks, at most so many new tokens are decode, more prefill
)


def is_step(layer: Layer, Q: int, seen: int) -> bool:
    """Whether Q new tokens, the last of `seen`, are decode: few, and behind the prompt."""
    return Q <= STEP and seen > max(Q, layer.expected)


class Step:
    """A call of a few new tokens, the same for every layer: what lies where.

    What differs from step to step is read from its tensors, what chooses between kernels from the
    host: a recorded step only needs the tensors to be filled anew.
    """

    def __init__(self, past, rows, length: Tensor, query_pos: Tensor, longest: int | None = None):
        self.past, self.rows = past, rows  # tokens in each row before and after, on the host
        self.length = length  # [B] as rows
        self.query_pos = query_pos  # [B, Q] position of each new token, -1 where a row has none
        self.longest = longest  # keys to look at; None: all that there is room for
        self.chosen: list[PageLists] = []  # the last choice, for layers that read it too
        self._rings: dict[tuple[int, int], Tensor] = {}
        self._starts: dict[Band, Tensor] = {}
        self._elsewhere: dict[torch.device, Step] = {}

    @classmethod
    def single(cls, past, rows, length: Tensor) -> Step:
        """One new token a row, which is recorded: `length` [B] may be filled anew."""
        return cls(past, rows, length, length[:, None] - 1)

    def on(self, device: torch.device) -> Step:
        """The same on another device, copied there once."""
        if device == self.length.device:
            return self
        if device not in self._elsewhere:
            there = self.length.to(device), self.query_pos.to(device)
            self._elsewhere[device] = Step(self.past, self.rows, *there, self.longest)
            self._elsewhere[device].chosen = self.chosen
        return self._elsewhere[device]

    def ring(self, sink: int, size: int) -> Tensor:
        """[B, sink + size] position held by each slot of such a ring, -1 for none."""
        if (sink, size) not in self._rings:
            low = torch.full_like(self.length, sink)
            self._rings[sink, size] = ring_positions(self.length, low, sink, size)
        return self._rings[sink, size]

    def start(self, band: Band) -> Tensor:
        """[B, Q] first key of the band's recent window, of each new token."""
        if band not in self._starts:
            self._starts[band] = band.start(self.query_pos)
        return self._starts[band]


def _step(lengths: Lengths, whole: bool) -> Step:
    past, rows = lengths.past, lengths.rows
    first, length = (torch.tensor(t, device="cpu") for t in (past, rows))
    query_pos = first[:, None] + torch.arange(lengths.columns, device="cpu")
    query_pos = torch.where(query_pos < length[:, None], query_pos, -1)
    return Step(past, rows, length, query_pos, None if whole else lengths.longest)


def _decode(plan, layer, q, k, v, step, logits) -> Tensor:
    """A few new tokens behind a past: selectors choose the pages. Returns `[B, Hq, Q, Dv]`."""
    new = [n - p for p, n in zip(step.past, step.rows, strict=True)]
    ratio = q.shape[1] // k.shape[1]
    layer.append(k, v, step.past, new, step.query_pos)
    lists = _listed(plan, layer, q, ratio, step, logits.scale)
    if (kernel := _decoder(q, *layer.tensors(), logits.of(), True)).name == "Triton":
        listed = [part for part in lists if part is not None]
        pages = PageLists.cat(listed) if listed else None
        more = {"length": step.length, **logits.of()}
        return kernel.run(q, layer.places(), step.query_pos, pages, **more)
    out = None
    for store, pages in zip(layer.stores, lists, strict=True):
        heads = q_heads_of(store.group.heads, ratio)
        own = plan.at(heads, q.device)
        for short, _, some in group_rows([n < store.below for n in step.rows], q.device):
            what = store, short, some, q[:, own], step, logits.of(own)
            part = _read_ring(*what) if isinstance(store, Ring) else _read_full(*what, pages)
            if some is None and len(heads) == q.shape[1]:
                return part
            out = q.new_empty(*q.shape[:3], v.shape[3]) if out is None else out
            put_rows(out, some, own, part)
    return out


def chooses(store: Full | Ring, rows: Sequence[int]) -> bool:
    """Whether a decode step reads chosen pages of the store: some row is long enough."""
    return store.group.chosen and any(n >= store.below for n in rows)


def _listed(plan, layer, q, ratio, step, scale) -> list[PageLists | None]:
    """Each store's pages that a step reads; None: all. Rows under `below` have empty lists."""
    lists: list[PageLists | None] = [None] * len(layer.stores)
    own = []
    for i, store in enumerate(layer.stores):
        group = store.group
        if not chooses(store, step.rows):
            continue
        if group.reuses:
            lists[i] = step.chosen[0].of(group.reuses, q.device, plan.at)
            continue
        selector, read = group.selector, None
        if selector.budget.counted:
            read = plan.counts.read_by(group.heads, q.device)
        heads = plan.at(q_heads_of(group.heads, ratio), q.device)
        more = heads, store.below, store.choice, read
        index = store.indexed(step.longest)
        lists[i] = kernels.choose_pages(selector, q, index, step.length, scale, *more)
        own.append(lists[i])
    if own:
        step.chosen[:] = own if plan.shared else []  # all here have read the last one
    return lists


def _decoder(q, k, v, logits, lists=False) -> kernels.Kernel:
    sinks = logits.get("s_aux")
    need = kernels.Need.of(q, k, v, sinks, lists=lists, logits=len(logits) > 1, block=PAGE)
    return kernels.pick(kernels.DECODE, need)


def _read_ring(store, short, rows, q, step, logits) -> Tensor:
    """Attention over sink and window; short rows: over all that the ring holds."""
    held = step.ring(store.band.sink, store.size)
    whole = q, store.k, store.v, step.query_pos, held, step.length
    q, k, v, query_pos, held, length = take_rows(rows, *whole)
    if not short:
        (start,) = take_rows(rows, step.start(store.band))
        logits = {**logits, "start": start, "sink": store.band.sink}
    return _decoder(q, k, v, logits).run(q, k, v, query_pos, held, length=length, **logits)


def _read_full(store, short, rows, q, step, logits, pages) -> Tensor:
    """Attention over all keys, or over the pages that were chosen."""
    k, v = store.view(step.longest)
    q, k, v, query_pos, length = take_rows(rows, q, k, v, step.query_pos, step.length)
    if short or pages is None:
        return _decoder(q, k, v, logits).run(q, k, v, query_pos, None, length=length, **logits)
    chosen = PageLists(*take_rows(rows, pages.pages, pages.count))
    kernel = _decoder(q, k, v, logits, lists=True)
    return kernel.run(q, k, v, query_pos, None, chosen, length=length, **logits)
