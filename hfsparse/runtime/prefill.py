"""Prompts and chunks: each head's queries go to a pattern and a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfsparse.kernels import Need, able, means, pick
from hfsparse.kernels.merge import join
from hfsparse.lists import BlockLists, Grid
from hfsparse.lists.packed import Past
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.ring import Ring
from hfsparse.runtime.cache.store import TOGETHER, Store
from hfsparse.runtime.extend import Extension
from hfsparse.runtime.layer_call import LayerCall
from hfsparse.runtime.layout import Layout, RowGroup, lay_out, lay_out_chunks
from hfsparse.runtime.plain import PlainPrompt
from hfsparse.runtime.routes import Cases, Listed, Route, Routes, heads_of
from hfsparse.runtime.rows import new_output


def prefill(layer_call: LayerCall, later: int = 0) -> Tensor:
    """A prompt, or a chunk behind a past: patterns choose the blocks. Returns `[B, Hq, Q, Dv]`.

    later: without a layer of the cache, tokens of the prompt that are still to come.
    """
    layer_plan, layer, lengths = layer_call.layer_plan, layer_call.layer, layer_call.lengths
    k, v = layer_call.k, layer_call.v
    later = later if layer is None else max(layer.expected - layer.seen, 0)
    limits = layer_plan.below.prefill, layer_plan.below.cache
    what = limits, layer_plan.skip, layer_plan.window, k.device
    chunked = layer_plan.chunked and lengths.longest > layer_plan.window
    layout = layer_call.call.once(lay_out_chunks if chunked else lay_out, lengths, later, *what)
    reads = layer_plan.producer is not None
    if layer_call.given.behind:
        return read_again(layer_call, layout) if reads else read_chunk(layer_call, layout)
    if lengths.behind:  # by the last queries of a prompt alone
        k, v = k[:, :, : lengths.longest], v[:, :, : lengths.longest]
    out = read(layer_call, layout, layer_plan.cases, k, v)
    if layer is None or reads:
        return out
    if layer_plan.may_wait and layer.put_off(*layer_call.kept, lengths):
        _note_plain(layer_call, layout)
        return out
    for store in layer.stores:
        kept = layer_call.kept
        if len(layer.stores) > 1:
            at = layer_plan.at(store.group.heads, k.device)
            kept = (t[:, at] for t in kept)
        _keep(layer_call, store, *kept)
    return out


def _note_plain(layer_call: LayerCall, layout: Layout) -> None:
    """Have other layers of the call read the prompt as this one has, where that was plain."""
    call, q, k, v = layer_call.call, layer_call.q, layer_call.k, layer_call.v
    layer_plan, group = layer_call.layer_plan, layout.groups[0]
    case, special = (group.short, group.kept), layer_call.logits.special
    if call.plain is not None or special or layer_call.lengths.padded or call.drafts:
        return
    watched = layer_plan.mode.observe is not None
    if case in layer_plan.plain_heads and group.whole and group.skip is None and not watched:
        kernel = pick(call.tables.prefill, need_of(q, k, v, None, group.grid, False))
        what = layer_call.lengths, group.grid, group.work, kernel
        call.plain = PlainPrompt(case, q, k, v, *what)


def need_of(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, grid: Grid, skips: bool) -> Need:
    """What a kernel is asked for that reads queries over the keys of a grid."""
    asked = {"block": grid.block, "tokens": grid.Sk, "skip": skips}
    return Need.of(q, k, v, sinks, **asked, plain=not (grid.padded or grid.past))


def _keep(layer_call: LayerCall, store: Full | Ring, k: Tensor, v: Tensor) -> None:
    """Store a prompt's or a chunk's keys and values, those of the store's heads."""
    eviction, lengths = store.group.eviction, layer_call.lengths
    if eviction is None:
        store.append(k, v, lengths)
        store.settle(lengths.rows)
    else:
        q, at = layer_call.newest_queries(store.group.heads, eviction.watched)
        store.take(k, v, lengths, q, **layer_call.logits.of(at))


def read_chunk(layer_call: LayerCall, layout: Layout) -> Tensor:
    """A chunk behind a past, store by store; `[B, Hq, Q, Dv]`.

    Stores that drop or pack keys are read before it is stored, full stores behind that. Packed
    pages are read where they lie by kernels that can, where heads follow lists; else a few heads
    are unpacked at a time, which readers of the layer's keys find so. When a kernel fails, every
    store has the chunk, or none has it; when a store finds no memory to grow, those before it have
    it.
    """
    layer, layer_plan, lengths = layer_call.layer, layer_call.layer_plan, layer_call.lengths
    k, v = layer_call.kept
    heads = [layer_plan.at(store.group.heads, k.device) for store in layer.stores]
    chunks = [(k[:, at], v[:, at], lengths) for at in heads]
    stores = [*zip(layer.stores, layer_plan.store_cases, chunks, strict=True)]
    out = None
    for store, cases, chunk in stores:
        tiled = _reads_pages(layer_call, layout, store, cases)
        for some, part in store.parts(lengths, tiled) if store.joins else ():
            own, new = heads_of(cases, some), [t[:, some] for t in chunk[:2]]
            if tiled:
                k, v, past = part.with_pages(*new, lengths)
                out = read(layer_call, layout, own, k, v, None, out, past)
                del k, v, past
                continue
            k, v, lies = part.with_chunk(*new, lengths, layout.grid)
            if layer_plan.last_reader is not None:
                gathered = layer_call.call.gathered.setdefault(layer_plan.index, [])
                gathered.append((k, v, lies))
            out = read(layer_call, layout, own, *layer_call.expand(k, v), lies, out)
            del k, v  # before the next
    for store, _, chunk in stores:
        _keep(layer_call, store, *chunk[:2])
    for store, cases, _ in stores:
        if not store.joins:
            held = layer_call.expand(*store.view(lengths.longest))
            out = read(layer_call, layout, cases, *held, None, out)
    return out


def _reads_pages(layer_call: LayerCall, layout: Layout, store: Store, cases: Cases) -> bool:
    """Whether a kernel reads a store's packed pages where they lie, for all that heads ask for.

    Where every head reads every key, unpacking costs less than dequantising each tile for each
    block of queries (benchmarks/chunks.py).
    """
    if not store.tiled or layer_call.layer_plan.last_reader is not None:
        return False
    asking = [cases[group.short, group.kept] for group in layout.groups]
    if any(routes.every.means for routes in asking) or not any(r.listed for r in asking):
        return False
    q, (k, v), sinks = layer_call.q, layer_call.kept, layer_call.logits.s_aux
    asked = {"lists": True, "packed": True, "logits": layer_call.logits.special, "lse": True}
    return all(
        group.piece is None
        and able(
            layer_call.call.tables.prefill,
            need_of(q, k, v, sinks, group.grid, group.skip is not None)._replace(**asked),
        )
        for group in layout.groups
    )


def read_again(layer_call: LayerCall, layout: Layout) -> Tensor:
    """A chunk behind a past, by a layer that reads another's keys; `[B, Hq, Q, Dv]`.

    That one's stores have the chunk: what these were read with, the call has kept.
    """
    layer, layer_plan, call = layer_call.layer, layer_call.layer_plan, layer_call.call
    producer, out = layer_plan.producer, None
    joined = iter(call.gathered.get(producer.index, ()))
    for store, cases in zip(layer.stores, layer_plan.store_cases, strict=True):
        if not store.joins:
            held = store.view(layer_call.lengths.longest)
            out = read(layer_call, layout, cases, *held, None, out)
            continue
        for some, _ in store.parts(layer_call.lengths):
            k, v, at = next(joined)
            if at is not None:
                at = replace(layout.grid, Sk=at.Sk, key_first=at.key_first, key_live=at.key_live)
            out = read(layer_call, layout, heads_of(cases, some), k, v, at, out)
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
    past: Past | None = None,
) -> Tensor:
    """`out` `[B, Hq, Q, Dv]` with the attention of some q heads over k and v.

    ring: where keys lie, of all rows, in a store that drops some; None: as the layout says. past:
    packed pages, behind which k and v lie.
    """
    q, device = layer_call.q, layer_call.q.device
    for group in layout.groups:
        routes = cases[group.short, group.kept]
        if group.whole and len(routes.heads) == q.shape[1]:
            return Part(layer_call, group, q, k, v, ring or group.grid, past).attend_routes(routes)
        at = layer_call.layer_plan.at(routes.heads, device)
        pages = past and past.of(group.rows)
        part = Part(layer_call, group, *group.take(q[:, at], k, v), group.lies(ring), pages)
        out = new_output(q, layer_call.v) if out is None else out
        group.put(out, at, part.attend_routes(routes))
    return out


@dataclass(eq=False)
class Part:
    """Some rows and heads of a prompt, and the keys that they may read."""

    layer_call: LayerCall
    group: RowGroup
    q: Tensor  # [B, H, Q, D]
    k: Tensor
    v: Tensor
    grid: Grid
    past: Past | None = None  # packed pages, behind which k and v lie

    def attend_routes(self, routes: Routes) -> Tensor:
        """Each head by its route; `[B, H, Q, Dv]`."""
        grid, logits, at = self.grid, self.layer_call.logits, self.layer_call.layer_plan.at
        skips = self.group.skip is not None
        need = need_of(self.q, self.k, self.v, logits.s_aux, grid, skips)
        need = need._replace(packed=self.past is not None)
        # Behind a past sdpa builds masks, a few queries' at a time: lists of all blocks are faster.
        # Nor does it count the pairs that are read where keys were dropped.
        easy = grid.window is None and grid.key_first is None and not logits.special
        easy = easy and not (grid.past and self._fused(need)) and self._extension is None
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
        extension, need = self._extension, need._replace(lists=True, logits=logits.special)
        asked = bool(listed.means) or extension is not None
        kernel = pick(tables.prefill, need._replace(lse=asked))
        q, kv, more = self.q[:, at(listed.q, device)], at.tensor(listed.kv, device), {}
        if self.past is not None:
            more["past"] = self.past
        if self.group.skip is not None:
            tiles = torch.zeros(len(listed.q), 2, dtype=torch.int64, device=device)
            more |= {"skip": self.group.skip, "skipped": tiles}
        if extension is not None:

            def read(q: Tensor, low: int, high: int, lse: Tensor) -> Tensor:
                some, given = lists.within(low, high), {**logits.part(low).of(own), **more}
                return kernel.run(q, self.k, self.v, some, kv, **given, lse=lse)

            longest = self.layer_call.lengths.longest
            made = extension.attend(q, self.grid.query_pos(), longest, read)
        elif listed.means:
            lse = q.new_empty(q.shape[:3], dtype=torch.float32)
            made = kernel.run(q, self.k, self.v, lists, kv, **logits.of(own), **more, lse=lse)
            made = self._with_means(listed, made, lse, q, lists, kv)
        else:
            made = kernel.run(q, self.k, self.v, lists, kv, **logits.of(own), **more)
        if self.group.skip is not None:
            counts.add_skipped(own, tiles)
        return made

    @property
    def _extension(self) -> Extension | None:
        """How the call's rows are read, if they are too long for the model."""
        return self.layer_call.layer_plan.extends(self.layer_call.lengths.longest)

    def _with_means(
        self, listed: Listed, made: Tensor, lse: Tensor, q: Tensor, lists: BlockLists, kv: Tensor
    ) -> Tensor:
        """`made` `[B, H, Q, Dv]`, of `lse`, and what heads leave out by their lists."""
        logits, index = self.layer_call.logits, self.layer_call.layer_plan.at
        at = index(listed.means, q.device)
        given = q[:, at], self.k, self.v, lists.in_order(listed.means, index), kv[at]
        more = means.prefill(*given, scale=logits.scale, softcap=logits.softcap)
        return join(made, lse, at, *more)

    def _fused(self, need: Need) -> bool:
        """Whether a kernel reads lists at no more cost than whole rows."""
        return pick(self.layer_call.call.tables.prefill, need._replace(lists=True)).fused

    def _choose(self, route: Route, need: Need) -> BlockLists:
        """The blocks that a route's heads read."""
        grid, at, device = self.grid, self.layer_call.layer_plan.at, self.q.device
        if placed := getattr(type(route.pattern), "placed", None):
            return self.layer_call.call.once(placed, route.pattern, grid, len(route.q))
        if route.band is None:
            dropped = grid.key_first is not None
            need = need._replace(chooser=route.pattern, dropped=dropped)
            estimate = pick(self.layer_call.call.tables.estimate, need).run
            found, ratio, each = [], len(route.q) // len(route.kv), len(route.kv)
            if self.past is not None:  # a few heads' keys are unpacked at a time
                each = max(1, TOGETHER // (len(self.q) * grid.Sk * self.k.shape[3]))
            for first in range(0, len(route.kv), each):
                heads, kv = (
                    at(t[first * n : (first + each) * n], device)
                    for t, n in ((route.q, ratio), (route.kv, 1))
                )
                k = self.k[:, kv]
                k = k if self.past is None else self.past.keys(k, kv, grid.Sk)
                given = self.q[:, heads], k, grid, self.layer_call.logits.scale
                found.append(estimate(route.pattern, *given))
            return BlockLists.cat(found)
        if grid.key_first is None:  # the same in every layer
            return self.layer_call.call.once(BlockLists.of, grid, len(route.q), None, route.band)
        return BlockLists.of(grid, len(route.q), band=route.band)
