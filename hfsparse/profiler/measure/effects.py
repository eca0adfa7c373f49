"""What each candidate would keep and lose in one layer of one prompt.

`effect` is what the margin of the prompt's key tokens loses, to first order: the change that a
candidate makes to the attention's output, times the gradient there. (A relative error of the output
can't distinguish a head that carries an answer from one that carries nothing.) `harm` is the same
at the rows that predict the key tokens alone, each row's change counted as a loss: what one row
wins does not make up for what another loses, and prompts agree better on it. `error` is the length
of the change after the output projection, relative to the layer's whole output, at those rows.
`recall` is the share of the exact attention's mass that is kept; what a sink logit takes always is.
A ring's effect is summed over all rows. Patterns and pages are measured on sampled rows: those that
predict the key tokens and, for patterns, others over the depth, which represent all the rest.
An eviction is measured at those that predict the key tokens, as if the prompt had ended before
them (`evicted`). So are fewer bits, as if steps had read these rows (`packed`): of a ring what they
add to the effect, of a full cache also how much of the attention stays where it was, as `recall`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfsparse import kernels
from hfsparse.errors import UsageError
from hfsparse.lists import PAGE, Grid, default_block
from hfsparse.lists.packed import Bits
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan.files import DataFile
from hfsparse.plan.kept import Full
from hfsparse.precision import without_autocast
from hfsparse.profiler.measure.capture import Seen
from hfsparse.profiler.measure.evicted import keys_held
from hfsparse.profiler.measure.exact import attention, sample_rows
from hfsparse.profiler.measure.packed import ReadBack
from hfsparse.selectors import Selector, segment_of, tokens_built

AT_ONCE = 1 << 18  # heads x tokens that are measured at a time


@dataclass(frozen=True)
class Candidates:
    """What a method lets the allocation choose from, by name."""

    patterns: dict[str, Any]  # prefill, one q head at a time
    rings: dict[str, Any]  # streaming patterns for a whole kv head: prefill, cache and decode
    selectors: dict[str, Any]  # decode of a kv head whose cache is full
    data: dict[str, DataFile] = field(default_factory=dict, repr=False)  # what selectors read
    evictions: dict[str, Any] = field(default_factory=dict, repr=False)  # cache of a kv head
    packed: dict[str, Full] = field(default_factory=dict, repr=False)  # full ones, in fewer bits


def measure_layer(seen: Seen, candidates: Candidates) -> dict[str, np.ndarray]:
    """Arrays `[candidates, heads]` by name.

    `pattern_*` per q head: effect, harm, error, recall, pairs and blocks (densities); `ring_*` the
    same per kv head; `page_*`, `evict_*` and `bits_*` per kv head: effect, harm, error, recall.
    """
    seen = replace(seen, proj=_replace_projection(seen) if seen.proj is None else seen.proj)
    L, parts = seen.k.shape[2], list(_split_heads(seen))
    grid = Grid.causal(1, L, default_block(L, seen.k.device), seen.k.device)
    output = sum(
        torch.einsum("hrd,hdo->ro", _exact(part, seen.keys)[2], part.proj.float()) for part in parts
    )
    output = output.norm(dim=-1).clamp(min=1e-9)  # [keys]
    found = [_measure_heads(part, candidates, grid, output) for part in parts]
    return {name: np.concatenate([each[name] for each in found], 1) for name in found[0]}


def _split_heads(seen: Seen) -> Iterator[Seen]:
    """A few kv heads and their q heads at a time: at most AT_ONCE rows of q, or one kv head."""
    Hkv, L, group = *seen.k.shape[1:3], seen.q.shape[1] // seen.k.shape[1]
    step = max(1, AT_ONCE // (group * L))
    for first in range(0, Hkv, step):
        kv, q = slice(first, first + step), slice(first * group, (first + step) * group)
        sinks = seen.logits.s_aux
        logits = seen.logits if sinks is None else seen.logits._replace(s_aux=sinks[q])
        by_kv = {name: getattr(seen, name)[:, kv] for name in ("k", "v")}
        more = {"logits": logits, "proj": seen.proj[q], "first": seen.first + first}
        by_q = {name: getattr(seen, name)[:, q] for name in ("q", "out", "grad")}
        yield replace(seen, **by_kv, **by_q, **more)


def _exact(seen: Seen, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention [Hq, R, L], values [Hq, L, Dv] and the output [Hq, R, Dv], in float32."""
    heads, group = seen.q.shape[1], seen.q.shape[1] // seen.k.shape[1]
    mass = torch.stack([attention(seen, rows, head) for head in range(heads)])
    values = seen.v[0].float().repeat_interleave(group, 0)
    return mass, values, mass @ values


def _measure_heads(
    seen: Seen, candidates: Candidates, grid: Grid, output: Tensor
) -> dict[str, np.ndarray]:
    """Measure some heads; `output` [keys] is the length of the layer's whole output."""
    q, k, scale = seen.q, seen.k, seen.logits.scale
    L, Hkv, group = k.shape[2], k.shape[1], q.shape[1] // k.shape[1]
    rows, weight = sample_rows(L, seen.keys)
    mass, values, exact = _exact(seen, rows)
    bare = 0.0 if seen.logits.s_aux is None else 1 - mass.sum(-1)  # what sink logits take
    grad = seen.grad[0, :, rows].float()
    at_keys = torch.isin(rows, seen.keys)
    proj = seen.proj.float()  # [Hq, Dv, hidden]
    found: dict[str, list[Tensor]] = {}

    def note(kind: str, **values: Tensor) -> None:
        for name, value in values.items():
            found.setdefault(f"{kind}_{name}", []).append(value.float().cpu())

    def kept(mask: Tensor, weight: Tensor, heads: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Effect [Hq] of keeping the keys of a mask [Hq, R, L]; what else it does, by `heads`."""
        some = mass * mask
        share = some.sum(-1) + bare  # [Hq, R]
        change = some @ values / share.clamp(min=1e-9)[..., None] - exact
        return judge(change, share, weight, heads)

    def judge(
        change: Tensor, share: Tensor, weight: Tensor, heads: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of a change [Hq, R, Dv] that leaves a share [Hq, R] of the attention."""
        recall = (share * (weight > 0)).sum(1) / (weight > 0).sum()
        moved = torch.einsum("hrd,hdo->hro", change[:, at_keys], proj)
        moved = moved.unflatten(0, (heads, -1)).sum(1).norm(dim=-1) / output  # [heads, keys]
        effect = (grad * change).sum(-1)  # [Hq, R]
        harm = effect[:, at_keys].unflatten(0, (heads, -1)).sum(1).abs().sum(1)
        more = {"harm": harm, "error": moved.mean(1)}
        return (effect * weight).sum(1), more | {"recall": recall.view(heads, -1).mean(1)}

    @cache
    def read_back(bits: Bits) -> ReadBack:
        return ReadBack.of(seen, bits)

    def by_group(each: Tensor) -> Tensor:
        return each.view(Hkv, group).sum(1)

    def densities(lists: Any) -> dict[str, Tensor]:
        pairs = lists.pairs()[0].float() / grid.pairs()[0]
        return {"pairs": pairs, "blocks": lists.blocks()[0] / grid.blocks()[0]}

    for pattern in candidates.patterns.values():
        lists = pattern.lists(q, k, grid, scale)
        effect, more = kept(lists.mask(rows)[0], weight, q.shape[1])
        note("pattern", effect=effect.abs(), **more, **densities(lists))
    near = mass[:, at_keys]
    plain: dict[Streaming, tuple[Tensor, dict[str, Tensor]]] = {}  # rings of 16 bits, measured
    for ring in candidates.rings.values():
        if (whole := replace(ring, bits=16)) not in plain:
            lists = whole.lists(q, k, grid, scale)
            mask = lists.mask(rows)[0]
            _, more = kept(mask, weight, Hkv)
            costs = {name: by_group(each) / group for name, each in densities(lists).items()}
            effect = by_group(_whole_effect(seen, lists)).abs()
            plain[whole] = mask[:, at_keys], {"effect": effect, **more, **costs}
        held, told = plain[whole]
        if ring.bits != 16:
            some = near * held
            share = 1 - (near - some).sum(-1)
            change = some @ values / share.clamp(min=1e-9)[..., None]
            change = read_back(ring.bits).output(held) - change
            added = by_group((grad[:, at_keys] * change).sum((1, 2))).abs()
            told = told | {"effect": told["effect"] + added}
        note("ring", **told)
    for selector in candidates.selectors.values():
        mine = bind_selector(selector, seen.layer, seen.heads, candidates.data)
        read = pages_read(mine, q, k, seen.keys, scale)
        mask = read.new_ones(len(read), len(rows), L)
        mask[:, at_keys] = read
        effect, more = kept(mask, at_keys.float(), Hkv)
        note("page", effect=by_group(effect).abs(), **more)
    for held in keys_held(seen, candidates.evictions.values()):
        mask = held.new_ones(len(held), len(rows), L)
        mask[:, at_keys] = held
        effect, more = kept(mask, at_keys.float(), Hkv)
        note("evict", effect=by_group(effect).abs(), **more)
    for full in candidates.packed.values():
        back = read_back(full.bits)
        change, share = torch.zeros_like(exact), torch.zeros_like(mass[..., 0])
        change[:, at_keys] = back.output() - exact[:, at_keys]
        share[:, at_keys] = 1 - (near - torch.minimum(back.mass, near)).sum(-1)
        effect, more = judge(change, share, at_keys.float(), Hkv)
        note("bits", effect=by_group(effect).abs(), **more)
    return {name: torch.stack(values).numpy() for name, values in found.items()}


def _replace_projection(seen: Seen) -> Tensor:
    """Heads side by side, as [Hq, Dv, Hq * Dv], where no output projection was found."""
    heads, size = seen.out.shape[1], seen.out.shape[3]
    return torch.eye(heads * size, dtype=torch.float32, device=seen.out.device).view(
        heads, size, -1
    )


def _whole_effect(seen: Seen, lists: Any) -> Tensor:
    """Effect [Hq] of following the lists in every row."""
    heads = seen.q.shape[1]
    kv = torch.arange(heads, device=seen.q.device) // (heads // seen.k.shape[1])
    asked = {"lists": True, "logits": seen.logits.special, "block": lists.grid.block}
    kernel = kernels.pick(kernels.PREFILL, kernels.Need.of(seen.q, seen.k, seen.v, **asked))
    out = kernel.run(seen.q, seen.k, seen.v, lists, kv, **seen.logits.of())
    return (seen.grad * (out - seen.out)).float().sum((0, 2, 3))


def bind_selector(
    selector: Any, layer: int, heads: Sequence[int], data: Mapping[str, DataFile]
) -> Selector:
    """The selector of these kv heads of a layer, whose `pages_read` can be measured.

    UsageError for one that reads what others chose, or a table that is not among `data`.
    """
    if not hasattr(selector, "pages") or selector.budget.refresh or selector.budget.means:
        raise UsageError(
            f"{selector} can't be measured: it reads what another step or layer chose, or means "
            "of the rest. Measure a quest without refresh and means, and change the plan that "
            "comes out"
        )
    name = getattr(selector, "data", None)
    if name is not None and name not in data:
        raise UsageError(
            f"{selector} can't be measured without its data {name}: calibrate it first"
        )
    return selector.bind(layer, heads, None if name is None else data[name].tensors)


@without_autocast
def pages_read(selector: Selector, q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Keys [Hq, R, L] that decode steps at `rows` read, by a selector bound to these heads."""
    L, Hkv, group = k.shape[2], k.shape[1], q.shape[1] // k.shape[1]
    pages = torch.nn.functional.pad(k, (0, 0, 0, -L % PAGE), value=torch.nan)
    pages, P = pages.unflatten(2, (-1, PAGE)), -(-L // PAGE)  # [1, Hkv, P, PAGE, D]
    at = torch.arange(P * PAGE, device=rows.device).view(1, 1, P, PAGE, 1)
    steps = q[0, :, rows].transpose(0, 1)[:, :, None]  # each row a batch row with one new query
    each, last = torch.arange(len(rows), device=rows.device), rows // PAGE
    newest = pages[0, :, last].transpose(0, 1)[:, :, None]  # a step has not seen all of it
    seen = (at[0, 0, last] <= rows[:, None, None])[:, None, None]  # [R, 1, 1, PAGE, 1]
    whole, own = selector.summarise(pages, at < L), selector.summarise(newest, seen)
    index = {name: t.repeat(len(rows), *[1] * (t.ndim - 1)) for name, t in whole.items()}
    for name, t in index.items():  # [R, Hkv, P, ...]
        t[each, :, last] = own[name][:, :, 0]
    if segment_of(selector) > PAGE:
        _build_segments(selector, index, pages, rows.tolist())
    chosen = selector.pages(steps, index, rows + 1, scale)
    used = torch.arange(chosen.pages.shape[2], device=q.device) < chosen.count[..., None]
    units = P * PAGE // chosen.unit
    read = torch.zeros(len(rows), Hkv, units + 1, dtype=torch.bool, device=q.device)
    read.scatter_(2, torch.where(used, chosen.pages, units), True)
    read = read[..., :-1].repeat_interleave(chosen.unit, 2)[..., :L]
    read = read & (torch.arange(L, device=q.device) <= rows[:, None])[:, None]
    return read.transpose(0, 1).repeat_interleave(group, 0)


def _build_segments(selector: Any, index: dict[str, Tensor], pages: Tensor, rows: list[int]):
    """Renew what `index` `[R, Hkv, P, ...]` has of segments in front of each of `rows`."""
    made, each = {}, selector.segment // PAGE
    for i, row in enumerate(rows):
        total = tokens_built(selector.segment, row) // PAGE
        for first in range(0, total, each):
            part = slice(first, min(first + each, total))
            if (key := (part.start, part.stop)) not in made:
                made[key] = selector.build(pages[:, :, part])
            for name, t in made[key].items():
                index[name][i, :, part] = t[0]
