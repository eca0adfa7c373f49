"""The attention and mask functions that a patched model calls.

`attention` is registered with transformers' AttentionInterface; `attend` does its work. It shifts
left-padded rows to column 0, appends the new keys to the cache layer, and sends each head's queries
to a pattern and a kernel (a prompt or a chunk) or to a selector and a kernel (a few new tokens).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import masking_utils

from hfsparse import kernels
from hfsparse.cache import Full, Group, Layer, Ring, autocast, ring_positions, take_layer
from hfsparse.call import Call, running
from hfsparse.lists import (
    FAR,
    FULL,
    PAGE,
    Band,
    BlockLists,
    Grid,
    HeadIndex,
    PageLists,
    default_block,
)
from hfsparse.plan import Below
from hfsparse.precision import casts
from hfsparse.stats import Work

NAME = "hfsparse"
STEP = (
    16  # behind a past or a prompt in chunks, at most so many new tokens are decode, more prefill
)


class PatchError(ValueError):
    """A model that can't be patched, or is used in a way its patch can't follow."""


class Counts:
    """What one layer computed for prompts since the last reset, and what dense attention would."""

    def __init__(self, q_heads: int):
        self.q_heads = q_heads
        self.read: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.reset()

    def reset(self) -> None:
        # Prompts, by q head: pairs and blocks; of heads that follow lists the device knows them.
        self.dense: dict[tuple[int, ...], list[int]] = {}  # what dense attention would compute
        self.whole: dict[tuple[int, ...], list[int]] = {}  # heads that were computed densely
        self.kept = _zeros(2, self.q_heads, dtype=torch.float64)
        self.cut = _zeros(self.q_heads)  # query blocks, by a max_share
        # Prompts under a skip threshold, by q head: tiles skipped, tiles looked at.
        self.skipped = _zeros(self.q_heads, 2)
        for read in self.read.values():
            read.zero_()  # recorded steps go on adding to it

    def add_whole(self, heads: Iterable[int], work: tuple[int, int]) -> None:
        """Heads that were computed densely: pairs and blocks of that."""
        _add(self.whole, heads, work)
        _add(self.dense, heads, work)

    def add_lists(
        self, heads: list[int], at: slice | Tensor, lists: BlockLists, work: tuple[int, int]
    ) -> None:
        """Heads that followed lists, an index of them, and the work of dense attention."""
        _add(self.dense, heads, work)
        device = lists.full_count.device
        self.kept = _moved(self.kept, device)
        self.kept[:, at] += torch.stack([kernels.pairs(lists).sum(0), lists.blocks().sum(0)])
        if lists.cut is not None:
            self.cut = _moved(self.cut, device)
            self.cut[at] += lists.cut.sum(0)

    def add_skipped(self, at: slice | Tensor, tiles: Tensor) -> None:
        """tiles [heads, 2]: skipped, and looked at."""
        self.skipped = _moved(self.skipped, tiles.device)
        self.skipped[at] += tiles

    def read_by(self, heads: tuple[int, ...], device: torch.device) -> Tensor:
        """[heads] keys that decode steps of kv heads read, where only the device knows."""
        if (heads, device) not in self.read:
            self.read[heads, device] = _zeros(len(heads), device=device)
        return self.read[heads, device]

    def keys_read(self, heads: tuple[int, ...]) -> list[int]:
        found = [read.cpu() for (own, _), read in self.read.items() if own == heads]
        return sum(found, _zeros(len(heads))).tolist()

    def work(self) -> tuple[Work, Work]:
        """Pairs and blocks of prompts, by q head."""
        kept, dense = self.kept.cpu().numpy().copy(), np.zeros((2, self.q_heads))
        for table, found in ((kept, self.whole), (dense, self.dense)):
            for heads, work in found.items():
                table[:, heads] += np.array(work)[:, None]
        pairs, blocks = (Work(*each) for each in zip(kept.tolist(), dense.tolist(), strict=True))
        return pairs, blocks


def _zeros(*shape: int, dtype=torch.int64, device: torch.device | str = "cpu") -> Tensor:
    """What is counted in, in any mode."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


def _moved(t: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return t.to(device)


def _add(table: dict, heads: Iterable[int], work: tuple[int, int]) -> None:
    held = table.setdefault(tuple(heads), [0, 0])
    held[0], held[1] = held[0] + work[0], held[1] + work[1]


@dataclass
class LayerPlan:
    """What the attention function needs of a plan, for one layer; set on the attention module."""

    owner: str
    index: int
    kv_heads: int
    prefill: tuple[Any, ...]  # a q head's pattern, None: full
    groups: tuple[Group, ...]  # kv heads by how their cache is kept and read
    rings: frozenset[int]  # kv heads whose cache the plan makes a ring
    below: Below
    skip: float | None  # prompts: how far below the running maximum a tile is left out
    window: int | None  # the model's own sliding window
    counts: Counts
    leads: bool  # the first layer: counts the decode steps of all
    steps: Counter[tuple[int, int]]  # how often a row came to n tokens with m new ones
    # The profiler's eye: sees q, k, v; may answer a function that sees the output, and that may
    # answer another output
    observe: Any = None
    fusing: bool = False  # the model is being compiled: one operator stands for attention
    source: LayerPlan | None = None  # the layer whose choice of pages some heads read
    shared: bool = False  # whether others read what this one chooses
    at: HeadIndex = field(default_factory=HeadIndex)  # one for all layers of a patch

    def new_cache(self, reserve: int = 0, expected: int = 0) -> Layer:
        below = self.below.cache if self.window is None else 0
        more = reserve, expected, self.window, self.below.decode, self.index, self.at
        return Layer(self.owner, self.groups, below, *more)

    def reads(self) -> Work:
        """Keys that decode steps read, by kv head; nan where only a run tells them, and none was.

        Dense attention reads all, or those in the model's window.
        """
        keys = [0] * self.kv_heads
        if not self.steps:
            return Work(keys, keys)
        length, new, times = (
            np.array(x) for x in zip(*((*at, t) for at, t in self.steps.items()), strict=True)
        )
        total = np.minimum(length, self.window or FAR)
        for group in self.groups:
            limit = self.below.decode if group.band == FULL else self.below.cache
            if group.reuses:
                chosen = self.source.reads().done
                for head in group.heads:
                    keys[head] = chosen[head]
                continue
            if group.selector is not None and group.selector.counted:
                whole = (np.where(length < limit, length, 0) * times).sum()
                for head, read in zip(group.heads, self.counts.keys_read(group.heads), strict=True):
                    keys[head] = int(whole + read) or nan
                continue
            if group.selector is not None:
                read = group.selector.reads(length, new)
            elif group.band == FULL:
                read = length
            else:
                read = np.minimum(length, group.band.sink + group.band.span(length - 1))
            if group.band == FULL or self.window is None:
                read = np.where(length < limit, length, read)
            for head in group.heads:
                keys[head] = int((np.minimum(read, total) * times).sum())
        return Work(keys, [int((total * times).sum())] * self.kv_heads)


@dataclass(frozen=True)
class Logits:
    """How a model turns q · k into logits."""

    scale: float
    softcap: float | None
    s_aux: Tensor | None  # [Hq] sink logits

    def of(self, at: slice | Tensor = slice(None)) -> dict[str, Any]:
        """Keyword arguments for a kernel that serves these q heads."""
        if not self.special:
            return {"scale": self.scale}
        sinks = self.s_aux if self.s_aux is None else self.s_aux[at]
        return {"scale": self.scale, "softcap": self.softcap, "s_aux": sinks}

    @property
    def special(self) -> bool:
        return self.softcap is not None or self.s_aux is not None


def mask_start(
    *args,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    mask_function=None,
    **kwargs,
) -> Tensor | None:
    """Registered mask function: each row's first real column `[B]`, or None; no L x L mask."""
    bidirectional = mask_function is getattr(masking_utils, "bidirectional_mask_function", NAME)
    if bidirectional or not (allow_is_causal_skip or _neighbours_causal(mask_function, **kwargs)):
        raise PatchError(
            "this call asks for more than causal attention (packed sequences, prefix or image "
            "blocks, bidirectional). hfsparse follows causal and sliding-window attention only: "
            "pass one sequence a row with an attention_mask, or run it on the unpatched model "
            "(handle.undo())."
        )
    if attention_mask is None or attention_mask.ndim == 1:
        return attention_mask
    if attention_mask.ndim != 2:
        raise PatchError(_wrong_mask(attention_mask))
    found = row_starts(attention_mask)
    if found is None:
        return None
    starts = torch.tensor(found, device=attention_mask.device)
    if (call := running()) is not None:
        call.starts[starts] = found
    return starts


def row_starts(mask: Tensor | None) -> list[int] | None:
    """The first real column of each row of a mask `[B, columns]`; None: all 0. Asks the device."""
    if mask is None:
        return None
    real, width = (mask != 0).byte(), mask.shape[1]
    count, first = torch.stack([real.sum(1), real.argmax(1)]).tolist()  # one wait
    starts = [f if n else width for f, n in zip(first, count, strict=True)]
    if any(f + n != width for f, n in zip(starts, count, strict=True)):
        raise PatchError(_not_left(real.tolist()))
    return starts if any(starts) else None


def _not_left(mask: list[list[int]]) -> str:
    """What is wrong with a mask `[B][columns]`, by its first row masked behind a real column."""
    firsts = [(*real, 1).index(1) for real in mask]
    row = next(row for row, first in enumerate(firsts) if 0 in mask[row][first:])
    column = mask[row].index(0, firsts[row])
    if 1 in mask[row][column:]:
        return (
            f"attention_mask has holes (row {row}, from column {column} on): columns behind the "
            "row's first token, such as padding between two turns. hfsparse supports padding in "
            "front of a row only: start again from the whole conversation, padded there, give one "
            "row at a time, or run this on the unpatched model (handle.undo())."
        )
    return (
        f"attention_mask has right padding (row {row}, from column {column} on). hfsparse supports "
        "left padding only: set tokenizer.padding_side = 'left', or run this on the unpatched "
        "model (handle.undo())."
    )


def _neighbours_causal(mask_function, batch_size: int = 1, cache_position=None, **kwargs) -> bool:
    """Whether each token sees the one before it, and not the next: packs and blocks differ there.

    transformers 4.57 composes a mask for packed sequences also where nothing is packed.
    """
    if cache_position is None:  # from 5.17 on only what differs is composed
        return False
    at, row = cache_position, torch.arange(batch_size, device=cache_position.device)[:, None]
    seen = mask_function(row, 0, at[1:], at[:-1]), mask_function(row, 0, at[:-1], at[1:])
    return bool(seen[0].all() and not seen[1].any())


def attention(module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, None]:
    """What is registered: `attend`, or one opaque operator where a step is compiled to be fused."""
    plan = getattr(module, "_hfsparse", None)
    if torch.compiler.is_dynamo_compiling() and plan is not None and plan.fusing:
        more = (kwargs.get(name) for name in ("scaling", "softcap", "s_aux"))
        return torch.ops.hfsparse.step(query, key, value, plan.index, *more), None
    return attend(module, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable  # a graph break a layer; traced, its Python takes longer than it saves
def attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of query `[B, Hq, Q, D]` over the cache and key, value `[B, Hkv, Q, D]`.

    Returns `[B, Q, Hq, Dv]`.
    """
    if casts(kind := query.device.type):  # nothing inside may change its type
        more = scaling, dropout, sliding_window, softcap, s_aux
        cast = autocast(query, key, value)
        with torch.autocast(kind, enabled=False):
            return attend(module, *cast, attention_mask, *more, **kwargs)
    plan: LayerPlan | None = getattr(module, "_hfsparse", None)
    if plan is None:
        raise PatchError(
            f"this model's attention was set to {NAME} without a plan: choose another, as in "
            "set_attn_implementation('sdpa'), and call hfsparse.patch(model, plan)"
        )
    (B, _, Q, D), dtype = query.shape, query.dtype
    _refuse(plan, query, key, attention_mask, dropout, sliding_window, kwargs)
    call = running()
    if call is None or call.owner != plan.owner:
        call = Call()  # the layer runs by itself, as where gradients recompute it
    if call.recorded is not None:
        return _recorded_step(query, key, value, plan.index, scaling, softcap, s_aux), None
    layer = take_layer(call)
    if layer is not None:  # perhaps it was filled under autocast, or before
        k, v = layer.tensors()
        query, key, value = query.to(k.dtype), key.to(k.dtype), value.to(v.dtype)
    logits = Logits(D**-0.5 if scaling is None else scaling, softcap, s_aux)
    watch = plan.observe and plan.observe(module, query, key, value, logits)
    starts = None if attention_mask is None else call.starts_of(attention_mask)
    if layer is None:
        past, new = [0] * B, [Q - s for s in starts or [0] * B]
    else:
        past, new = layer.advance(starts, Q)
    padded = min(new) < Q
    if padded:
        pads = torch.tensor([Q - n for n in new], device=query.device)
        query, key, value = (_shift(t, pads) for t in (query, key, value))
    if layer is not None and is_step(layer, Q, layer.seen):
        need = kernels.Need.of(query, key, value, s_aux, lists=True, block=PAGE)
        whole = kernels.pick(kernels.DECODE, need).name == "Triton"  # it skips what is empty
        step = call.once(_step, tuple(past), tuple(layer.rows), Q, whole).on(query.device)
        if plan.leads:
            plan.steps.update(zip(layer.rows, new, strict=True))
        with _on(query):
            out = _decode(plan, layer, query, key, value, step, logits)
    else:
        with _on(query):
            out = _prefill(call, plan, layer, query, key, value, past, new, logits)
    if watch:
        changed = watch(out)
        out = out if changed is None else changed
    if padded:
        out = _shift(out, -pads)
    if layer is not None:
        layer.stored = layer.seen
    return out.transpose(1, 2).contiguous().to(dtype), None


def _recorded_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: int,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """As `attend`, for the step that this thread records; it changes nothing on the host."""
    step, layers, cut = running().recorded
    if cut is not None:
        cut(index)
    plan, layer = layers[index]
    logits = Logits(query.shape[3] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    step = step.on(query.device)
    with _on(query):
        out = _decode(plan, layer, query, key, value, step, logits)
    return out.transpose(1, 2).contiguous()


torch.library.custom_op(
    "hfsparse::step",
    _recorded_step,
    mutates_args=(),  # that compilers know of: the cache is none of theirs
    schema="(Tensor query, Tensor key, Tensor value, int index, float? scaling, float? softcap, "
    "Tensor? s_aux) -> Tensor",
)


@torch.library.register_fake("hfsparse::step")
def _(query, key, value, index, scaling, softcap, s_aux):
    B, H, Q, _ = query.shape
    return query.new_empty(B, Q, H, value.shape[3])


def _on(t: Tensor) -> AbstractContextManager:
    """Its device as the current one: Triton launches there (a model may lie on several)."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def is_step(layer: Layer, Q: int, seen: int) -> bool:
    """Whether Q new tokens, the last of `seen`, are decode: few, and behind the prompt."""
    return Q <= STEP and seen > max(Q, layer.expected)


def _refuse(plan, query, key, mask, dropout, window, more) -> None:
    if mask is not None and mask.ndim != 1:
        raise PatchError(_wrong_mask(mask))
    heads = plan.counts.q_heads, plan.kv_heads
    if (query.shape[1], key.shape[1]) != heads:
        raise PatchError(
            f"layer {plan.index} has {query.shape[1]} q and {key.shape[1]} kv heads, its config "
            f"says {heads[0]} and {heads[1]}: hfsparse can't follow this model (is it tensor "
            "parallel?)"
        )
    if more.get("cu_seq_lens_q") is not None:
        raise PatchError(
            "this call packs several sequences in a row (cu_seq_lens_q): pass one sequence a row "
            "with an attention_mask, or run it on the unpatched model (handle.undo())"
        )
    if dropout:
        raise PatchError(
            f"attention dropout is {dropout}: hfsparse has none, call model.eval() first"
        )
    if window != plan.window:
        raise PatchError(
            f"layer {plan.index} was called with a sliding window of {window}, its config says "
            f"{plan.window}: please report this model to hfsparse"
        )
    if key.shape[2] != query.shape[2]:
        raise PatchError(
            f"layer {plan.index} got more keys than queries: this cache does not belong to hfsparse"
        )


def _wrong_mask(mask) -> str:
    return (
        f"got an attention mask of shape {list(mask.shape)}: hfsparse follows [batch, columns] "
        "masks with left padding only. Pass such a mask, or run this on the unpatched model "
        "(handle.undo())."
    )


def _shift(t: Tensor, by: Tensor) -> Tensor:
    """t `[B, H, S, D]` with row b moved `by[b]` places towards the front, zeros behind."""
    at = torch.arange(t.shape[2], device=t.device) + by[:, None]
    real = (at >= 0) & (at < t.shape[2])
    at = at.clamp(0, t.shape[2] - 1)[:, None, :, None]
    moved = t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3]))
    return moved.masked_fill(~real[:, None, :, None], 0)


def _q_heads(kv_heads: tuple[int, ...], ratio: int) -> list[int]:
    return [h * ratio + i for h in kv_heads for i in range(ratio)]


def _alike(keys: list, device: torch.device) -> Iterator[tuple[Any, Tensor | None]]:
    """Batch rows of equal key: (key, row indices), or (key, None) when all are."""
    for key in dict.fromkeys(keys):
        rows = [b for b, other in enumerate(keys) if other == key]
        yield key, None if len(rows) == len(keys) else torch.tensor(rows, device=device)


def _put(out: Tensor, rows: Tensor | None, at: slice | Tensor, part: Tensor) -> None:
    """Write a part's result into `[B, H, Q, D]` at some rows and heads."""
    if rows is None:
        out[:, at] = part
    else:
        out[rows if isinstance(at, slice) else rows[:, None], at] = part


def _some(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if rows is None else tuple(t[rows] for t in tensors)


def _prefill(call, plan, layer, q, k, v, past, new, logits) -> Tensor:
    """A prompt, or a chunk behind a past: patterns choose the blocks. Returns `[B, Hq, Q, Dv]`."""
    Q, ratio = q.shape[2], q.shape[1] // k.shape[1]
    total = [p + n for p, n in zip(past, new, strict=True)]
    whole = total  # tokens of each row's whole prompt, as far as it is known
    if layer is not None and layer.expected:
        whole = [max(t, layer.expected - layer.seen + t) for t in total]
    window = plan.window if plan.window is not None and max(total) > plan.window else None
    block = default_block(max(whole), q.device)
    grid = call.once(_grid, tuple(past), tuple(new), Q, block, window, q.device)
    # What a row reads depends on its own length only, never on its neighbours'.
    kinds = [
        (n < plan.below.prefill, n < plan.below.cache, default_block(n, q.device)) for n in whole
    ]
    short, kept, _ = kinds[0]
    full = not any(plan.prefill) or (short and (kept or not plan.rings))
    easy = grid.window is None and not (grid.past or grid.padded or logits.special)
    if full and easy and len(set(kinds)) == 1 and (short or plan.skip is None):
        return _whole(plan, layer, q, k, v, past, new, grid, logits.scale)
    out = None
    for kv_heads, keys, values, spot in _segments(plan, layer, k, v, past, new, grid):
        heads = _q_heads(kv_heads, ratio)
        own = plan.at(heads, q.device)
        for (short, kept, block), rows in _alike(kinds, q.device):
            patterns = [
                None if (kept if h // ratio in plan.rings else short) else plan.prefill[h]
                for h in heads
            ]
            at = range(len(new)) if rows is None else rows.tolist()
            work = _work(tuple((past[b], new[b]) for b in at), block, window)
            place = spot if rows is None else spot.take(rows)
            if place.key_first is None:
                place = place if place.block == block else replace(place, block=block)
            else:  # a window layer's ring: its slots are no place for patterns that rank them
                patterns = [p if hasattr(p, "band") else None for p in patterns]
            part = _some(rows, q[:, own], keys, values)
            skip = None if short else plan.skip
            made = _patterned(plan, *part, place, heads, patterns, logits, work, skip)
            if rows is None and len(heads) == q.shape[1]:
                out = made
                continue
            out = _empty(q, v) if out is None else out
            _put(out, rows, own, made)
    return out


def _whole(plan, layer, q, k, v, past, new, grid, scale) -> Tensor:
    """A prompt that no head drops anything of: the short way, since the host's time counts here."""
    for store in () if layer is None else layer.stores:
        at = plan.at(store.group.heads, k.device)
        store.append(k[:, at], v[:, at], past, new)
    work = _work(tuple(zip(past, new, strict=True)), grid.block, None)
    plan.counts.add_whole(range(q.shape[1]), work)
    need = kernels.Need.of(q, k, v, block=grid.block, tokens=grid.Sk)
    return kernels.pick(kernels.PREFILL, need).run(q, k, v, grid, scale=scale)


def _grid(past, new, Q, block, window, device) -> Grid:
    total = [p + n for p, n in zip(past, new, strict=True)]
    q_len, k_len = (_lengths(t, device) for t in (new, total))
    return Grid(q_len, k_len, Q, Q, block, window, padded=min(new) < Q, past=any(past))


def _lengths(rows: Sequence[int], device: torch.device) -> Tensor:
    """Rows' lengths `[B]` on a device; the host waits for no copy."""
    if len(set(rows)) == 1:
        return torch.full((len(rows),), rows[0], device=device)
    lengths = torch.tensor(rows, device="cpu")
    lengths = lengths.pin_memory() if device.type == "cuda" else lengths
    return lengths.to(device, non_blocking=True)


@lru_cache(64)
def _work(rows: tuple[tuple[int, int], ...], block: int, window: int | None) -> tuple[int, int]:
    """Pairs and blocks of dense attention, given each row's past and new tokens."""

    def seen(tokens: int) -> int:
        """Pairs of a row's first tokens."""
        near = tokens if window is None else min(tokens, window)
        return near * (near + 1) // 2 + (tokens - near) * near

    pairs = blocks = 0
    for past, new in rows:
        pairs += seen(past + new) - seen(past)
        for first in range(past, past + new, block):
            last = min(first + block, past + new) - 1
            low = 0 if window is None else max(first - window + 1, 0)
            blocks += last // block - low // block + 1
    return pairs, blocks


def _empty(q: Tensor, v: Tensor) -> Tensor:
    """Room for the output `[B, H, Q, Dv]`, token by token in memory, as models want it next."""
    B, H, Q, _ = q.shape
    if torch.is_grad_enabled():  # autograd refuses some writes into a view of a leaf
        return q.new_empty(B, H, Q, v.shape[3])
    return q.new_empty(B, Q, H, v.shape[3]).transpose(1, 2)


def _segments(plan, layer, k, v, past, new, grid) -> Iterator[tuple]:
    """Append a chunk to the cache; yield (kv heads, keys, values, grid) for it to attend to."""
    if layer is None or not any(past):
        yield tuple(range(k.shape[1])), k, v, grid
    for store in () if layer is None else layer.stores:
        heads = store.group.heads
        at = plan.at(heads, k.device)
        chunk = k[:, at], v[:, at]
        if isinstance(store, Ring):
            if any(past):
                yield heads, *store.with_chunk(*chunk, past, new, grid)
            store.append(*chunk, past, new)
        else:
            store.append(*chunk, past, new)
            if any(past):
                total = max(layer.rows)
                yield heads, *store.view(total), replace(grid, Sk=total)


def _patterned(plan, q, k, v, grid, heads, patterns, logits, work, skip) -> Tensor:
    """Attention of some q heads `[B, H, Q, D]`, each by its pattern (None: full)."""
    ratio, plain = q.shape[1] // k.shape[1], not (grid.padded or grid.past)
    need = kernels.Need.of(
        *(q, k, v, logits.s_aux),
        block=grid.block,
        tokens=grid.Sk,
        plain=plain,
        skip=skip is not None,
    )
    # Behind a past sdpa builds masks, a few queries' at a time: a list of every block is faster.
    easy = grid.window is None and not (logits.special or (grid.past and kernels.fused(need)))
    whole, parts, order = [], [], []

    def part(at: list[int]) -> tuple[Tensor, slice | Tensor]:
        """These heads of q, and the kv heads that they read."""
        return q[:, plan.at(at, q.device)], plan.at(_kv_of(tuple(at), ratio), q.device)

    for pattern in dict.fromkeys(patterns):
        at = [i for i, other in enumerate(patterns) if other == pattern]
        if pattern is None and easy and skip is None:
            whole = at
        elif pattern is None:
            parts.append(grid.banded(FULL, len(at)))
            order += at
        else:
            some, kv = part(at)
            parts.append(kernels.choose(pattern, some, k[:, kv], grid, logits.scale))
            order += at

    def dense(at: list[int]) -> Tensor:
        some, kv = part(at)
        plan.counts.add_whole([heads[i] for i in at], work)
        kernel = kernels.pick(kernels.PREFILL, need)
        return kernel.run(some, k[:, kv], v[:, kv], grid, scale=logits.scale)

    def listed(at: list[int]) -> Tensor:
        lists, q_heads = BlockLists.cat(parts).in_order(order, plan.at), [heads[i] for i in at]
        own = plan.at(q_heads, q.device)
        plan.counts.add_lists(q_heads, own, lists, work)
        kernel = kernels.pick(kernels.PREFILL, replace(need, lists=True, logits=logits.special))
        some, kv = q[:, plan.at(at, q.device)], plan.at.tensor([i // ratio for i in at], q.device)
        if skip is None:
            return kernel.run(some, k, v, lists, kv, **logits.of(own))
        tiles = torch.zeros(len(at), 2, dtype=torch.int64, device=q.device)
        skipping = {"skip": skip, "skipped": tiles}
        made = kernel.run(some, k, v, lists, kv, **logits.of(own), **skipping)
        plan.counts.add_skipped(own, tiles)
        return made

    if not order:
        return dense(whole)
    if not whole:
        return listed(sorted(order))
    out = _empty(q, v)
    for at, run in ((whole, dense), (sorted(order), listed)):
        out[:, plan.at(at, q.device)] = run(at)
    return out


@lru_cache(256)
def _kv_of(at: tuple[int, ...], ratio: int) -> tuple[int, ...]:
    """The kv heads of some q heads: each once where whole groups are meant, else one a q head."""
    kv = tuple(i // ratio for i in at)
    whole = all(kv.count(g) == ratio for g in kv)
    return tuple(sorted(set(kv))) if whole else kv


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


def _step(past, rows, Q, whole) -> Step:
    first, length = (torch.tensor(t, device="cpu") for t in (past, rows))
    query_pos = first[:, None] + torch.arange(Q, device="cpu")
    query_pos = torch.where(query_pos < length[:, None], query_pos, -1)
    return Step(past, rows, length, query_pos, None if whole else max(rows))


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
        heads = _q_heads(store.group.heads, ratio)
        own = plan.at(heads, q.device)
        for short, some in _alike([n < store.below for n in step.rows], q.device):
            what = store, short, some, q[:, own], step, logits.of(own)
            part = _read_ring(*what) if isinstance(store, Ring) else _read_full(*what, pages)
            if some is None and len(heads) == q.shape[1]:
                return part
            out = q.new_empty(*q.shape[:3], v.shape[3]) if out is None else out
            _put(out, some, own, part)
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
        if selector.counted:
            read = plan.counts.read_by(group.heads, q.device)
        heads = plan.at(_q_heads(group.heads, ratio), q.device)
        more = heads, store.below, store.choice, read
        sums = store.summaries(step.longest)
        lists[i] = kernels.choose_pages(selector, q, *sums, step.length, scale, *more)
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
    q, k, v, query_pos, held, length = _some(rows, *whole)
    if not short:
        (start,) = _some(rows, step.start(store.band))
        logits = {**logits, "start": start, "sink": store.band.sink}
    return _decoder(q, k, v, logits).run(q, k, v, query_pos, held, length=length, **logits)


def _read_full(store, short, rows, q, step, logits, pages) -> Tensor:
    """Attention over all keys, or over the pages that were chosen."""
    k, v = store.view(step.longest)
    q, k, v, query_pos, length = _some(rows, q, k, v, step.query_pos, step.length)
    if short or pages is None:
        return _decoder(q, k, v, logits).run(q, k, v, query_pos, None, length=length, **logits)
    chosen = PageLists(*_some(rows, pages.pages, pages.count))
    kernel = _decoder(q, k, v, logits, lists=True)
    return kernel.run(q, k, v, query_pos, None, chosen, length=length, **logits)
