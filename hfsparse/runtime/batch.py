"""A call of transformers' continuous batching: requests, side by side in one row of tokens.

Prompts, and chunks of them behind a past, are read one after another as `prefill` reads a row by
itself; requests that have one new token are steps, which are read together. All keys lie in a pool
(`cache/paged.py`): transformers says where, and has stored them or has us do it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hfsparse.kernels import Need, pick
from hfsparse.lists import PAGE
from hfsparse.lists.lengths import Lengths, on_device
from hfsparse.runtime.cache.paged import PagedLayer, Rows
from hfsparse.runtime.call import Call
from hfsparse.runtime.decode import Step, read_stored
from hfsparse.runtime.layer_call import LayerCall
from hfsparse.runtime.layer_plan import LayerPlan, Logits
from hfsparse.runtime.prefill import prefill
from hfsparse.runtime.rows import new_output


@dataclass(frozen=True)
class Request:
    """A request of a call: tokens before it, tokens in it, and those of its whole prompt."""

    past: int
    new: int
    prompt: int

    @property
    def tokens(self) -> int:
        return self.past + self.new

    @property
    def steps(self) -> bool:
        """Whether it brings one token behind its prompt."""
        return self.new == 1 and self.past >= self.prompt


@dataclass(frozen=True, eq=False)
class Pool:
    """transformers' paged cache under a plan.

    Token t of a block lies in `block * stride + t` of every layer's keys; a block has `size`
    tokens, which are whole pages. asked: the requests of the call that is prepared; blocks_of: the
    blocks that a request holds.
    """

    layers: dict[int, PagedLayer]
    plans: dict[int, LayerPlan]  # with groups as steps read them
    size: int
    stride: int
    trash: int  # a place that nobody reads
    writes: bool  # whether new tokens of any call are ours to store, or of steps by block tables
    asked: Callable[[], list[Request]]
    blocks_of: Callable[[str], list[int]]

    def rows(self, pages: Tensor) -> Rows:
        """Rows whose pages these are in the pool `[B, P]`."""
        wide, each = self.stride // PAGE, self.size // PAGE
        return Rows(pages, pages // wide * each + pages % wide)


class Batch:
    """The requests of one call, and where their tokens lie."""

    def __init__(self, pool: Pool, given: dict[str, Any]):
        self.pool, self.step = pool, None
        self.prompts: list[tuple[int, int, Request]] = []  # with its row, and its first column
        self.columns: Tensor | slice | None = None  # of steps
        self.stores: Tensor | None = None  # where new tokens are to be stored
        self.requests, tables = pool.asked(), given.get("block_table")
        self.tokens = sum(request.new for request in self.requests)  # the others fill up a shape
        if tables is None:
            self._find_rows(given["read_index"][0], given["write_index"][0])
        else:
            self._find_steps(tables[0], given["cu_seq_lens_k"])

    def _find_rows(self, reads: Tensor, writes: Tensor) -> None:
        """Prompts, chunks and steps. reads: where each page of each request begins; of prompts
        alone, which read nothing before them, none, and `writes` has the places of all tokens."""
        device, requests, step = writes.device, self.requests, 1 if len(reads) else PAGE
        held = [-(-r.tokens // PAGE) if len(reads) else r.new for r in requests]
        firsts = [0, *accumulate(held)]
        page = torch.arange(-(-max(held) // step), device=device) * step
        first, end = (on_device(t, device)[:, None] for t in (firsts[:-1], firsts[1:]))
        places = reads if len(reads) else writes
        pages = places[torch.minimum(first + page, end - 1)] // PAGE
        self.rows = self.pool.rows(pages)
        self.stores = writes if self.pool.writes else None
        column, stepping, columns = 0, [], []
        for row, request in enumerate(requests):
            if request.steps:
                stepping.append(row)
                columns.append(column)
            else:
                self.prompts.append((row, column, request))
            column += request.new
        if stepping:
            at, self.columns = (on_device(t, device) for t in (stepping, columns))
            self.stepping = self.pool.rows(pages[at])
            rows = [requests[row].tokens for row in stepping]
            self.length = on_device(rows, device)
            self.lengths = _lengths(rows)

    def _find_steps(self, tables: Tensor, sums: Tensor | dict[str, Tensor]) -> None:
        """Steps alone, by tables `[B, blocks]` of their blocks, as CUDA graphs replay them. Rows
        that fill up the shape have no token, and pages that are nobody's."""
        sums = next(iter(sums.values())) if isinstance(sums, dict) else sums
        self.length = sums.diff().long()
        each = torch.arange(self.pool.size // PAGE, device=tables.device)
        pages = tables.long().clamp(min=0)[..., None] * len(each) + each
        pages = pages.flatten(1).masked_fill(self.length[:, None] == 0, self.pool.trash // PAGE)
        self.stepping, self.columns = self.pool.rows(pages), slice(None)
        last = (self.length - 1).clamp(min=0)[:, None]
        self.stores = (pages.gather(1, last // PAGE) * PAGE + last % PAGE)[:, 0]
        rows = [request.tokens for request in self.requests]
        self.lengths = _lengths(rows + [0] * (len(pages) - len(rows)))

    def steps(self, whole: bool) -> Step:
        """Of the requests that step; whole: their kernel reads lengths on the device alone."""
        if self.step is None:
            lengths = self.lengths
            if whole:  # a graph serves rows of any length that there is room for
                lengths = _lengths([self.stepping.tokens] * len(self.length))
            longest = None if whole else lengths.longest
            self.step = Step(lengths, self.length, self.length[:, None] - 1, longest)
        return self.step


def _lengths(rows: list[int]) -> Lengths:
    """Of rows with one new token."""
    return Lengths([max(n - 1, 0) for n in rows], [1] * len(rows), 1)


def attend_batch(
    call: Call, layer_plan: LayerPlan, q: Tensor, k: Tensor, v: Tensor, logits: Logits
) -> Tensor:
    """Attention of a call's tokens: q `[1, Hq, T, D]`, k, v `[1, Hkv, T, D]` → `[1, Hq, T, Dv]`."""
    batch: Batch = call.batch
    layer, out = batch.pool.layers[layer_plan.index], new_output(q, v)
    if batch.stores is not None:
        layer.write(k, v, batch.stores)
    if batch.tokens < q.shape[2]:
        out.zero_()
    if batch.prompts:
        layer.take(batch.rows)
    for row, column, request in batch.prompts:
        own = slice(column, column + request.new)
        keys = k[:, :, own], v[:, :, own]
        if request.past:
            keys = layer.read(row, request.tokens)
        keys, values = keys
        for store in layer.stores:
            store.summarise(keys, values, row)
        alone = LayerCall(call, layer_plan, None, None, q[:, :, own], keys, values, logits)
        out[:, :, own] = prefill(alone, max(request.prompt - request.tokens, 0))
    if batch.columns is not None:
        at = batch.columns
        read = _step(call, batch.pool.plans[layer_plan.index], layer, q[0, :, at], logits)
        out[0, :, at] = read
    return out


def _step(
    call: Call, layer_plan: LayerPlan, layer: PagedLayer, q: Tensor, logits: Logits
) -> Tensor:
    """Attention of requests that step, q `[Hq, R, D]` → `[Hq, R, Dv]`."""
    batch: Batch = call.batch
    places = layer.take(batch.stepping)
    for store in layer.stores:
        store.follow(batch.length)
    q = q.transpose(0, 1)[:, :, None].contiguous()
    asked = {"lists": True, "block": PAGE, "pooled": True}
    need = Need.of(q, places.k, places.v, logits.s_aux, **asked)
    step = batch.steps(pick(call.tables.decode, need).device_lengths)
    out = read_stored(call.tables, layer_plan, layer, places, q, step, logits)
    return out[:, :, 0].transpose(0, 1)
