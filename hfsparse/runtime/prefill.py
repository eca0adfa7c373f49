"""Prompts and chunks: each head's queries go to a pattern and a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from hfsparse.kernels import Need, pick
from hfsparse.kernels.rows import group_rows, put_rows, take_rows
from hfsparse.lists import BlockLists, Grid, default_block
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.ring import Ring
from hfsparse.runtime.layer_call import LayerCall
from hfsparse.runtime.routes import Cases, Listed, Route, Routes
from hfsparse.runtime.rows import new_output


def prefill(layer_call: LayerCall) -> Tensor:
    """A prompt, or a chunk behind a past: patterns choose the blocks. Returns `[B, Hq, Q, Dv]`."""
    layer_plan, layer, lengths = layer_call.layer_plan, layer_call.layer, layer_call.lengths
    k, v = layer_call.k, layer_call.v
    later = 0 if layer is None else max(layer.expected - layer.seen, 0)
    limits = layer_plan.below.prefill, layer_plan.below.cache
    what = limits, layer_plan.skip, layer_plan.window, k.device
    layout = layer_call.call.once(lay_out, lengths, later, *what)
    reads = layer_plan.producer is not None
    if layer_call.given.behind:
        return read_again(layer_call, layout) if reads else read_chunk(layer_call, layout)
    if lengths.behind:  # by the last queries of a prompt alone
        k, v = k[:, :, : lengths.longest], v[:, :, : lengths.longest]
    out = read(layer_call, layout, layer_plan.cases, k, v)
    for store in () if layer is None or reads else layer.stores:
        at = layer_plan.at(store.group.heads, k.device)
        store.append(*(t[:, at] for t in layer_call.kept), lengths)
    return out


def read_chunk(layer_call: LayerCall, layout: Layout) -> Tensor:
    """A chunk behind a past, store by store; `[B, Hq, Q, Dv]`.

    Rings are read before it is stored, since they drop what it passes, full stores behind that. So
    when a kernel fails, every store has the chunk, or none has it; when a store finds no memory to
    grow, those before it have it.
    """
    layer, layer_plan, lengths = layer_call.layer, layer_call.layer_plan, layer_call.lengths
    k, v = layer_call.kept
    heads = [layer_plan.at(store.group.heads, k.device) for store in layer.stores]
    chunks = [(k[:, at], v[:, at], lengths) for at in heads]
    stores = [*zip(layer.stores, layer_plan.store_cases, chunks, strict=True)]
    out = None
    for store, cases, chunk in stores:
        if isinstance(store, Ring):
            k, v, lies = store.with_chunk(*chunk, layout.grid)
            if layer_plan.last_reader is not None:
                gathered = layer_call.call.gathered.setdefault(layer_plan.index, [])
                gathered.append((k, v, lies))
            out = read(layer_call, layout, cases, *layer_call.expand(k, v), lies, out)
    for store, _, chunk in stores:
        store.append(*chunk)
    for store, cases, _ in stores:
        if not isinstance(store, Ring):
            held = layer_call.expand(*store.view(lengths.longest))
            out = read(layer_call, layout, cases, *held, None, out)
    return out


def read_again(layer_call: LayerCall, layout: Layout) -> Tensor:
    """A chunk behind a past, by a layer that reads another's keys; `[B, Hq, Q, Dv]`.

    That one's stores have the chunk: what its rings dropped, the call has kept.
    """
    layer, layer_plan, call = layer_call.layer, layer_call.layer_plan, layer_call.call
    producer, out = layer_plan.producer, None
    rings = iter(call.gathered.get(producer.index, ()))
    for store, cases in zip(layer.stores, layer_plan.store_cases, strict=True):
        if isinstance(store, Ring):
            k, v, at = next(rings)
            at = replace(layout.grid, Sk=at.Sk, key_first=at.key_first, key_live=at.key_live)
        else:
            k, v, at = *store.view(layer_call.lengths.longest), None
        out = read(layer_call, layout, cases, k, v, at, out)
    if producer.last_reader == layer_plan.index:
        call.gathered.pop(producer.index, None)
    return out


def read(
    layer_call: LayerCall,
    layout: Layout,
    cases: Cases,
    k: Tensor,
    v: Tensor,
    ring: Grid | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`out` `[B, Hq, Q, Dv]` with the attention of some q heads over k and v.

    ring: where a ring's keys lie, of all rows; None: they lie as the layout says.
    """
    q, device = layer_call.q, layer_call.q.device
    for group in layout.groups:
        routes, rows = cases[group.short, group.kept], group.rows
        if rows is None and len(routes.heads) == q.shape[1]:
            return Part(layer_call, group, q, k, v, ring or group.grid).attend_routes(routes)
        at = layer_call.layer_plan.at(routes.heads, device)
        grid = group.grid if ring is None else _take(ring, rows, group.block)
        part = Part(layer_call, group, *take_rows(rows, q[:, at], k, v), grid)
        out = new_output(q, layer_call.v) if out is None else out
        put_rows(out, rows, at, part.attend_routes(routes))
    return out


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows of a call whose prompts are alike: what a row reads depends on its own length only."""

    short: bool  # under below.prefill
    kept: bool  # under below.cache
    block: int
    rows: Tensor | None  # None: all
    grid: Grid
    skip: float | None
    work: tuple[int, int]  # pairs and blocks of dense attention


@dataclass(frozen=True, eq=False)
class Layout:
    """A call that reads prompts, the same for every layer of one window."""

    grid: Grid
    groups: list[RowGroup]


def lay_out(
    lengths: Lengths,
    later: int,
    limits: tuple[int, int],
    skip: float | None,
    window: int | None,
    device: torch.device,
) -> Layout:
    """later: tokens of each prompt that are still to come; limits: below.prefill and below.cache;
    skip, window: the plan's and the layer's own."""
    whole = [n + later for n in lengths.rows]
    window = window if window is not None and lengths.longest > window else None
    grid = _grid(lengths, default_block(max(whole), device), window, device)
    kinds = [(n < limits[0], n < limits[1], default_block(n, device)) for n in whole]
    tokens, groups = [*zip(lengths.past, lengths.new, strict=True)], []
    for (short, kept, block), rows, at in group_rows(kinds, device):
        own = _take(grid, at, block)
        some = tokens if at is None else [tokens[b] for b in rows]
        work = dense_work(tuple(some), block, window)
        groups.append(RowGroup(short, kept, block, at, own, None if short else skip, work))
    return Layout(grid, groups)


def _grid(lengths: Lengths, block: int, window: int | None, device: torch.device) -> Grid:
    """Queries over all tokens of their rows; where nothing is behind, over themselves."""
    q_len, k_len = (_on_device(t, device) for t in (lengths.new, lengths.rows))
    keys = lengths.longest if lengths.behind else lengths.columns
    known = {"padded": lengths.padded, "past": lengths.behind}
    return Grid(q_len, k_len, lengths.columns, keys, block, window, **known)


def _on_device(rows: list[int], device: torch.device) -> Tensor:
    """Rows' lengths `[B]` on a device; the host waits for no copy."""
    if len(set(rows)) == 1:
        return torch.full((len(rows),), rows[0], device=device)
    lengths = torch.tensor(rows, device="cpu")
    lengths = lengths.pin_memory() if device.type == "cuda" else lengths
    return lengths.to(device, non_blocking=True)


def _take(grid: Grid, rows: Tensor | None, block: int) -> Grid:
    """The grid of some rows (None: all), in blocks of this size; a ring's are as they lie."""
    place = grid if rows is None else grid.take(rows)
    same = grid.key_first is not None or grid.block == block
    return place if same else replace(place, block=block)


@dataclass(eq=False)
class Part:
    """Some rows and heads of a prompt, and the keys that they may read."""

    layer_call: LayerCall
    group: RowGroup
    q: Tensor  # [B, H, Q, D]
    k: Tensor
    v: Tensor
    grid: Grid

    def attend_routes(self, routes: Routes) -> Tensor:
        """Each head by its route; `[B, H, Q, Dv]`."""
        grid, logits, at = self.grid, self.layer_call.logits, self.layer_call.layer_plan.at
        skips = self.group.skip is not None
        need = Need.of(
            *(self.q, self.k, self.v, logits.s_aux),
            block=grid.block,
            tokens=grid.Sk,
            plain=not (grid.padded or grid.past),
            skip=skips,
        )
        # Behind a past sdpa builds masks, a few queries' at a time: lists of all blocks are faster.
        easy = grid.window is None and not (logits.special or (grid.past and self._fused(need)))
        if routes.dense is None or skips or not easy:
            return self._attend_listed(routes.every, need)
        if routes.listed is None:
            return self._attend_dense(routes.dense, need)
        out = new_output(self.q, self.v)
        out[:, at(routes.dense.q, out.device)] = self._attend_dense(routes.dense, need)
        out[:, at(routes.listed.q, out.device)] = self._attend_listed(routes.listed, need)
        return out

    def _attend_dense(self, route: Route, need: Need) -> Tensor:
        q, k, v = self.q, self.k, self.v
        at, counts = self.layer_call.layer_plan.at, self.layer_call.layer_plan.counts
        if len(route.q) < q.shape[1]:
            kv = at(route.kv, q.device)
            q, k, v = q[:, at(route.q, q.device)], k[:, kv], v[:, kv]
        counts.add(counts.whole, route.heads, self.group.work)
        kernel = pick(self.layer_call.call.tables.prefill, need)
        return kernel.run(q, k, v, self.grid, scale=self.layer_call.logits.scale)

    def _attend_listed(self, listed: Listed, need: Need) -> Tensor:
        logits, counts = self.layer_call.logits, self.layer_call.layer_plan.counts
        at, device = self.layer_call.layer_plan.at, self.q.device
        tables = self.layer_call.call.tables
        lists = BlockLists.cat([self._choose(route, need) for route in listed.routes])
        lists, own = lists.in_order(listed.order, at), at(listed.heads, device)
        pairs = pick(tables.count, need).run(lists)
        counts.add_lists(listed.heads, own, lists, pairs, self.group.work)
        kernel = pick(tables.prefill, need._replace(lists=True, logits=logits.special))
        q = self.q[:, at(listed.q, device)]
        given = q, self.k, self.v, lists, at.tensor(listed.kv, device)
        if self.group.skip is None:
            return kernel.run(*given, **logits.of(own))
        tiles = torch.zeros(len(listed.q), 2, dtype=torch.int64, device=device)
        made = kernel.run(*given, **logits.of(own), skip=self.group.skip, skipped=tiles)
        counts.add_skipped(own, tiles)
        return made

    def _fused(self, need: Need) -> bool:
        """Whether a kernel reads lists at no more cost than whole rows."""
        return pick(self.layer_call.call.tables.prefill, need._replace(lists=True)).fused

    def _choose(self, route: Route, need: Need) -> BlockLists:
        """The blocks that a route's heads read."""
        grid, at, device = self.grid, self.layer_call.layer_plan.at, self.q.device
        if route.band is None:
            q, k = self.q[:, at(route.q, device)], self.k[:, at(route.kv, device)]
            dropped = grid.key_first is not None
            need = need._replace(chooser=type(route.pattern), dropped=dropped)
            estimate = pick(self.layer_call.call.tables.estimate, need).run
            return estimate(route.pattern, q, k, grid, self.layer_call.logits.scale)
        if grid.key_first is None:  # the same in every layer
            return self.layer_call.call.once(BlockLists.of, grid, len(route.q), None, route.band)
        return BlockLists.of(grid, len(route.q), band=route.band)


@lru_cache(64)
def dense_work(
    tokens: tuple[tuple[int, int], ...], block: int, window: int | None
) -> tuple[int, int]:
    """Pairs and blocks of dense attention, given each row's past and new tokens."""

    def seen(tokens: int) -> int:
        """Pairs of a row's first tokens."""
        near = tokens if window is None else min(tokens, window)
        return near * (near + 1) // 2 + (tokens - near) * near

    pairs = blocks = 0
    for past, new in tokens:
        pairs += seen(past + new) - seen(past)
        for first in range(past, past + new, block):
            last = min(first + block, past + new) - 1
            low = 0 if window is None else max(first - window + 1, 0)
            blocks += last // block - low // block + 1
    return pairs, blocks
