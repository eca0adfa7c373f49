"""Attention where ranks share a prompt's tokens: each keeps the keys of its own (context parallel).

A prompt's queries read keys that other ranks send, as chunks behind a past do, or in the way `star`
only those of their own rank. Behind a prompt every rank has the same queries: each attends to the
keys that it holds, and the parts are merged by their LSE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hfsparse.kernels import Need, pick
from hfsparse.kernels.rows import q_heads_of
from hfsparse.lists import FULL, PAGE, Band, PageLists
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.ring import Ring
from hfsparse.runtime.decode import STEP, Step, make_step, select_pages
from hfsparse.runtime.layer_call import LayerCall
from hfsparse.runtime.layer_plan import LayerPlan
from hfsparse.runtime.layout import lay_out, lay_out_runs
from hfsparse.runtime.parts import Parts, Runs
from hfsparse.runtime.prefill import read
from hfsparse.runtime.rows import new_output
from hfsparse.runtime.wire import Wanted, exchange, merge


def attend(layer_call: LayerCall) -> Tensor:
    """This rank's tokens of a prompt, or all ranks' new ones behind it; `[B, Hq, Q, Dv]`."""
    return _read_new(layer_call) if layer_call.lengths.behind else _read_prompt(layer_call)


def _read_prompt(layer_call: LayerCall) -> Tensor:
    layer_plan, layer, batch = layer_call.layer_plan, layer_call.layer, len(layer_call.q)
    context, parts, device = layer_plan.context, layer_call.call.parts, layer_call.q.device
    own = sum(end - start for start, end in parts.kept[context.rank])
    kept = [t[:, :, t.shape[2] - own :] for t in layer_call.kept]
    layer.hold(parts.tokens, own, context.newest)
    whole, part, gathered = layer.whole(), layer.part(), kept
    if wanted := _wanted(layer_call, parts, whole):
        more = parts.kept, wanted, parts.tokens, layer_plan.at
        gathered = exchange(context.group, kept, *more)
    limits = layer_plan.below.prefill, layer_plan.below.cache
    how = limits, layer_plan.skip, layer_plan.window, device
    if parts.alone:
        keys, layout = layer_call.kept, layer_call.call.once(lay_out, layer_call.lengths, 0, *how)
    else:
        mine = parts.read[context.rank], parts.tokens, batch
        keys, layout = gathered, layer_call.call.once(lay_out_runs, *mine, *how)
    out = read(layer_call, layout, layer_plan.cases, *keys)
    for store in layer.stores:
        at = layer_plan.at(store.group.heads, device)
        given, rows = (gathered, whole) if store.drops else (kept, part)
        store.append(*(t[:, at] for t in given), rows)
        store.settle(rows.rows)
    return out


def _wanted(layer_call: LayerCall, parts: Parts, whole: Lengths) -> Wanted:
    """Which keys of which kv heads each rank reads, or keeps in a ring: alike heads together."""
    layer_plan, layer = layer_call.layer_plan, layer_call.layer
    rings: dict[int, Ring] = {}
    for store in layer.stores:
        if store.drops:
            store.room(whole.past, whole.rows)  # which says how many slots it has
            rings |= dict.fromkeys(store.group.heads, store)
    bands = {head: frozenset() for head in range(layer_plan.kv_heads)}
    if not parts.alone:
        bands = _bands(layer_plan, parts.tokens)
    alike: dict[tuple, list[int]] = {}
    for head, read_in in bands.items():
        alike.setdefault((read_in, rings.get(head)), []).append(head)
    found = []
    for (read_in, ring), heads in alike.items():
        by_rank = [_joined(_reach(runs, read_in, ring, parts.tokens)) for runs in parts.read]
        if any(by_rank):
            found.append((tuple(heads), by_rank))
    return found


def _bands(layer_plan: LayerPlan, tokens: int) -> dict[int, frozenset[Band]]:
    """By kv head: the bands in which its q heads read a prompt of so many tokens. Heads that choose
    by content may read any key."""
    below, window = layer_plan.below, layer_plan.window
    widest = FULL if window is None else Band(0, window)
    routes = layer_plan.cases[tokens < below.prefill, tokens < below.cache].every.routes
    ratio, found = layer_plan.counts.q_heads // layer_plan.kv_heads, {}
    for route in routes:
        band = widest if route.band in (None, FULL) else route.band
        for head in route.heads:
            found.setdefault(head // ratio, set()).add(band)
    return {head: frozenset(found[head]) for head in sorted(found)}


def _reach(
    runs: Runs, bands: frozenset[Band], ring: Ring | None, tokens: int
) -> Iterator[tuple[int, int]]:
    """Positions that runs of queries read in some bands, and those that a ring keeps."""
    for start, end in runs:
        for band in bands:
            yield 0, min(band.sink, end)
            yield max(band.start(start), 0), end
    if ring is not None:
        yield 0, min(ring.sink, tokens)
        yield max(tokens - ring.size - PAGE, 0), tokens  # packed ones keep whole pages


def _joined(runs: Iterator[tuple[int, int]]) -> Runs:
    """The same positions, each once, ascending."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(run for run in runs if run[0] < run[1]):
        if found and start <= found[-1][1]:
            start, end = found[-1][0], max(found.pop()[1], end)
        found.append((start, end))
    return tuple(found)


def _read_new(layer_call: LayerCall) -> Tensor:
    """New tokens behind a prompt, on every rank the same, as steps of at most `STEP`."""
    layer_plan, layer, q = layer_call.layer_plan, layer_call.layer, layer_call.q
    context, lengths, (k, v) = layer_plan.context, layer_call.lengths, layer_call.kept
    out, lse = new_output(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)
    for first in range(0, lengths.columns, STEP):
        some = slice(first, min(first + STEP, lengths.columns))
        part = (t[:, :, some] for t in (q, k, v, out, lse))
        _step(layer_call, first, layer.own + first * context.newest, *part)
    layer.own += lengths.columns * context.newest
    shared = [head for store in layer.stores if not store.drops for head in store.group.heads]
    if shared:
        ratio = q.shape[1] // layer_plan.kv_heads
        at = layer_plan.at(q_heads_of(sorted(shared), ratio), q.device)
        out[:, at] = merge(context.group, out[:, at], lse[:, at])
    return out


def _step(
    layer_call: LayerCall,
    first: int,
    own: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Store a few new tokens, the call's from `first` on, and fill `out` and `lse` with their
    attention over the rank's `own` keys, and over whole rings."""
    layer_plan, layer, logits = layer_call.layer_plan, layer_call.layer, layer_call.logits
    tables, context, ratio = layer_call.call.tables, layer_plan.context, q.shape[1] // k.shape[1]
    asked = {"lists": True, "block": PAGE, "packed": layer.packed, "lse": True}
    fused = pick(tables.decode, Need.of(q, k, v, logits.s_aux, **asked)).device_lengths
    past = [n + first for n in layer_call.lengths.past]
    once = layer_call.call.once
    row = once(_make_step, tuple(past), q.shape[2], fused).on(q.device)
    mine = once(_make_step, (own,) * len(past), q.shape[2], fused, context.newest).on(q.device)
    if layer_plan.leads:
        told = zip(row.lengths.rows, row.lengths.new, mine.lengths.rows, strict=True)
        layer_plan.steps.update(told)
    at = layer_plan.at
    for store in layer.stores:
        step = row if store.drops else mine
        store.room(step.lengths.past, step.lengths.rows)
        if store.drops or context.newest:
            heads, places = at(store.group.heads, k.device), layer.places_of(store)
            need = Need.of(k, places.k, places.v, packed=places.packed)
            pick(tables.append, need).run(k[:, heads], v[:, heads], places, step)
    lists = select_pages(tables, layer_plan, layer, q, ratio, mine, logits.scale)
    for store, pages in zip(layer.stores, lists, strict=True):
        heads = at(q_heads_of(store.group.heads, ratio), q.device)
        _read_store(layer_call, store, pages, row if store.drops else mine, heads, q, out, lse)


def _read_store(
    layer_call: LayerCall,
    store: Full | Ring,
    pages: PageLists | None,
    step: Step,
    heads: slice | Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` and `lse` of the q heads of one store."""
    layer_plan, q = layer_call.layer_plan, q[:, heads]
    places, logits = layer_call.layer.places_of(store), layer_call.logits
    given = logits.of(heads)
    if not store.drops and not layer_plan.context.newest:
        given |= {"s_aux": None} if logits.special else {}  # sink logits count once
    asked = {"lists": pages is not None, "logits": logits.special, "bands": places.rings}
    asked |= {"block": PAGE, "lse": not store.drops, "packed": places.packed}
    need = Need.of(q, places.k, places.v, logits.s_aux, **asked)
    sums = None if store.drops else lse.new_empty(q.shape[:3])
    more = {} if sums is None else {"lse": sums}
    out[:, heads] = pick(layer_call.call.tables.decode, need).run(
        q, places, step, [pages], **given, **more
    )
    if sums is not None:
        lse[:, heads] = sums


def _make_step(past: Sequence[int], new: int, fused: bool, grows: bool = True) -> Step:
    """A step of new tokens behind so many; where rows don't grow by them, all read all keys."""
    if grows:
        return make_step(Lengths([*past], [new] * len(past), new), fused)
    lengths = Lengths([*past], [0] * len(past), new)
    length = torch.tensor(past, device="cpu")
    query_pos = (length[:, None] - 1).expand(-1, new).contiguous()
    return Step(lengths, length, query_pos, None if fused else lengths.longest)
