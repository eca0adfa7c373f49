"""A few new tokens behind a past: selectors choose pages, a kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfsparse.kernels import Need, Tables, means, pick
from hfsparse.kernels.merge import join
from hfsparse.kernels.positions import NewTokens
from hfsparse.kernels.rows import q_heads_of
from hfsparse.lists import FULL, PAGE, Band, PageLists
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import Places
from hfsparse.runtime.cache.evicting import Evicting
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.cache.paged import PagedLayer
from hfsparse.runtime.cache.ring import Ring
from hfsparse.runtime.layer_plan import LayerPlan, Logits

# Behind a past or a prompt in chunks, at most so many new tokens are decode, more prefill.
STEP = 16


def is_step(layer: CacheLayer, Q: int, seen: int) -> bool:
    """Whether Q new tokens, the last of `seen`, are decode: few, and behind the prompt."""
    return Q <= STEP and seen > max(Q, layer.expected)


class Step(NewTokens):
    """A call of a few new tokens, the same for every layer: what lies where.

    What differs from step to step is read from its tensors, what chooses between kernels from the
    host: a recorded step only needs the tensors to be filled anew.
    """

    def __init__(self, *where, **more):
        super().__init__(*where, **more)
        self.chosen: list[PageLists] = []  # the last choice, for layers that read it too
        self._elsewhere: dict[torch.device, Step] = {}

    @classmethod
    def recorded(cls, lengths: Lengths, length: Tensor) -> Step:
        """As many new tokens in each row, which is recorded: `length` [B] may be filled anew."""
        new = torch.arange(-lengths.columns, 0, device=length.device)
        return cls(lengths, length, length[:, None] + new)

    def without(self, ended: Tensor) -> Step:
        """The same where rows that have ended, bool [B], are empty, but on the host."""
        length = self.length.masked_fill(ended, 0)
        query_pos = self.query_pos.masked_fill(ended[:, None], -1)
        return Step(self.lengths, length, query_pos, self.longest)

    def around(self, band: Band, heads: int, tokens: int) -> PageLists:
        """As `PageLists.around`, the same for all layers."""
        return self.once(_around, band, heads, tokens)

    def on(self, device: torch.device) -> Step:
        """The same on another device, copied there once."""
        if device == self.length.device:
            return self
        if device not in self._elsewhere:
            there = self.length.to(device), self.query_pos.to(device)
            self._elsewhere[device] = Step(self.lengths, *there, self.longest)
            self._elsewhere[device].chosen = self.chosen
        return self._elsewhere[device]


def _around(step: Step, band: Band, heads: int, tokens: int) -> PageLists:
    return PageLists.around(band, step.length, heads, tokens)


def make_step(lengths: Lengths, whole: bool, ended: Tensor | None = None) -> Step:
    """The step of a call; whole: its kernel skips what is empty by itself. ended: as
    `CacheLayer.ended`."""
    first, length = (torch.tensor(t, device="cpu") for t in (lengths.past, lengths.rows))
    query_pos = first[:, None] + torch.arange(lengths.columns, device="cpu")
    query_pos = torch.where(query_pos < length[:, None], query_pos, -1)
    step = Step(lengths, length, query_pos, None if whole else lengths.longest)
    return step if ended is None else step.on(ended.device).without(ended)


def decode(
    tables: Tables,
    layer_plan: LayerPlan,
    layer: CacheLayer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Step,
    logits: Logits,
) -> Tensor:
    """A few new tokens behind a past: they are stored, selectors choose pages, a kernel reads them.

    Where another layer's keys are read, that one has stored them.
    Returns `[B, Hq, Q, Dv]`.
    """
    places = layer.room(step.lengths.past, step.lengths.rows)
    if layer_plan.producer is None:
        need = Need.of(k, places.k, places.v, v, packed=places.packed)
        pick(tables.append, need).run(k, v, places, step)
    return read_stored(tables, layer_plan, layer, places, q, step, logits)


def read_stored(
    tables: Tables,
    layer_plan: LayerPlan,
    layer: CacheLayer | PagedLayer,
    places: Places,
    q: Tensor,
    step: Step,
    logits: Logits,
) -> Tensor:
    """A few new tokens that are stored: selectors choose pages, a kernel reads them."""
    ratio, extension = q.shape[1] // layer_plan.kv_heads, layer_plan.extends(step.lengths.longest)
    lists = select_pages(tables, layer_plan, layer, q, ratio, step, logits.scale)
    if places.hosted:
        _fetch(tables, layer_plan, places, lists, step)
    listed = any(part is not None for part in lists)
    asked = {"lists": listed, "logits": logits.special, "bands": places.rings}
    corrected = [
        (store, part)
        for store, group, part in zip(layer.stores, layer_plan.groups, lists, strict=True)
        if part is not None and group.means
    ]
    asked["lse"] = bool(corrected) or extension is not None
    asked |= {"latents": layer.rank > 0, "packed": places.packed, "hosted": places.hosted}
    asked["pooled"] = places.pool is not None
    need = Need.of(q, places.k, places.v, logits.s_aux, block=PAGE, **asked)
    run = pick(tables.decode, need).run
    if extension is not None:

        def read(q: Tensor, low: int, high: int, lse: Tensor) -> Tensor:
            given = {**logits.part(low).of(), "span": (low, high), "lse": lse}
            return run(q, places, step, lists, **given)

        out = extension.attend(q, step.query_pos, step.lengths.longest, read)
    elif corrected:
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        out = run(q, places, step, lists, **logits.of(), lse=lse)
        out = _with_means(layer_plan, corrected, q, out, lse, step, logits)
    else:
        out = run(q, places, step, lists, **logits.of())
    for store in layer.stores:
        if store.group.eviction is not None:
            _count_kept(layer_plan, store, step)
            if layer_plan.producer is None and store.group.eviction.adds_up:
                at = layer_plan.at(q_heads_of(store.group.heads, ratio), q.device)
                store.observe(q[:, at], step.lengths, **logits.of(at))
    return out


def _fetch(
    tables: Tables, layer_plan: LayerPlan, places: Places, lists: list[PageLists | None], step: Step
) -> None:
    """Have the GPU hold what is read of pages in host memory; the lists say where it lies."""
    for i, part in enumerate(places.parts):
        if part.hot is None:
            continue
        need = Need.of(part.k, part.k, part.v, slots=part.hot.owner.shape[2])
        read = layer_plan.counts.fetched_by(part.heads, part.k.device)
        lists[i] = pick(tables.fetch, need).run(part.hot, lists[i], step.length, read)


def _with_means(
    layer_plan: LayerPlan,
    corrected: list[tuple[Full, PageLists]],
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    step: Step,
    logits: Logits,
) -> Tensor:
    """`out` `[B, Hq, Q, Dv]`, of weights `lse`, and what heads of some stores leave out."""
    more = {"scale": logits.scale, "softcap": logits.softcap}
    for store, lists in corrected:
        heads = q_heads_of(store.group.heads, q.shape[1] // layer_plan.kv_heads)
        at = layer_plan.at(heads, q.device)
        given = store.indexed(step.longest), lists, step.query_pos, step.length >= store.below
        out = join(out, lse, at, *means.decode(q[:, at], *given, **more))
    return out


def _count_kept(layer_plan: LayerPlan, store: Evicting, step: Step) -> None:
    """Note how many keys a step read: with what an eviction left, lengths don't tell."""
    read = layer_plan.counts.read_by(store.group.heads, step.length.device)
    read += (step.length - store.gone).clamp(min=0).sum()


def chooses(store: Full | Ring, rows: Sequence[int]) -> bool:
    """Whether a decode step reads chosen pages of the store: some row is long enough."""
    return store.group.chosen and any(n >= store.below for n in rows)


def select_pages(tables, layer_plan, layer, q, ratio, step, scale) -> list[PageLists | None]:
    """Each store's pages that a step reads; None: all. Rows under `below` have empty lists."""
    lists: list[PageLists | None] = [None] * len(layer.stores)
    own = []
    for i, (store, group) in enumerate(zip(layer.stores, layer_plan.groups, strict=True)):
        if not (group.chosen and chooses(store, step.lengths.rows)):
            continue
        if group.reads != FULL:
            tokens = step.longest or store.capacity
            lists[i] = step.around(group.reads, len(group.heads), tokens)
            continue
        if group.reuses:
            lists[i] = step.chosen[0].of(group.reuses, q.device, layer_plan.at)
            continue
        selector, read = group.selector, None
        if selector.budget.counted:
            read = layer_plan.counts.read_by(group.heads, q.device)
        heads = layer_plan.at(q_heads_of(group.heads, ratio), q.device)
        index = store.indexed(step.longest)
        held = next(iter(index.values()))  # [B, Hkv, pages, ...]
        asked = {"tokens": held.shape[2] * PAGE, "index_dtype": held.dtype}
        dim = q.shape[-1]
        need = Need(q.device, q.dtype, dim, dim, chooser=selector, **asked)
        more = heads, store.below, store.choice, read
        lists[i] = pick(tables.select, need).run(selector, q, index, step.length, scale, *more)
        own.append(lists[i])
    if own:
        step.chosen[:] = own if layer_plan.shared else []  # all here have read the last one
    return lists
