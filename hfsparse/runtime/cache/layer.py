"""The KV cache of a patched model: per-layer stores that keep whole rows, only sink + recent, or
what was attended to most.

`CacheLayer` is what transformers sees in `cache.layers`; `update` hands the new keys straight
through and the attention function appends and reads the stores. Rows are stored row-relative, so
left padding takes no room, and a row's history never depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hfsparse.errors import CacheError
from hfsparse.kernels import Need, pick
from hfsparse.kernels.positions import NewTokens
from hfsparse.lists import FAR, FULL, HeadIndex
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import Places, Table
from hfsparse.precision import without_autocast
from hfsparse.runtime.cache.buffers import autocast
from hfsparse.runtime.cache.evicting import Evicting
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.held import Held, Later
from hfsparse.runtime.cache.host import HostFull, HostPacked
from hfsparse.runtime.cache.packed import PackedFull, PackedRing
from hfsparse.runtime.cache.ring import Ring
from hfsparse.runtime.call import running, tables
from hfsparse.runtime.rows import device_guard

SHORT = 2048  # tokens of a prompt that waits, over all rows: others are the GPU's time
DEFAULT = (
    "use the default cache, and for less memory a plan whose cache words have bits: 8, 4 or fp8, "
    "or, where steps choose what they read, host: true"
)


class CacheLayer(CacheLayerMixin):
    """One decoder layer's cache: a store a group of kv heads, and how long each row is."""

    is_sliding = False  # also for rings: mask code takes a True as the model's own window
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        owner: str,
        groups: tuple[Group, ...],
        below: int = 0,
        reserve: int = 0,
        expected: int = 0,
        window: int | None = None,
        read_below: int = 0,  # rows of fewer tokens read every page
        index: int = 0,  # of the decoder layer that it serves; copies serve the same, in loops
        at: HeadIndex | None = None,
    ):
        self.owner, self.index = owner, index
        self.window = window  # the model's own sliding window
        self.expected = expected  # columns of the whole prompt, when it comes in chunks
        self.groups, self.sizes = groups, (below, reserve, read_below)
        # Stores are made when they are asked for, of such keys and values; a prompt may wait that
        # none of them has yet.
        self._stores: list[Full | Ring] | None = None
        self._like: tuple[Tensor, Tensor] | None = None
        self._prompt: tuple[Tensor, Tensor, Lengths] | None = None
        self._made_for: tuple | None = None  # the kind of keys and values that `prepare` was told
        self.rank = groups[0].rank  # of latents; 0: keys and values are as attention takes them
        self.table = Table(at)
        self.seen = 0  # columns, padding included
        self.stored = 0  # of these, how many came in calls that ran to their end
        self.rows: list[int] = []  # tokens in each row
        self.device: torch.device | None = None
        self.types: tuple[torch.dtype, ...] = ()  # of keys and values
        self.is_initialized = False
        # bool [B], on its device: rows whose steps read nothing, since nobody asks for what comes
        # of them; it may change between steps.
        self.ended: Tensor | None = None

    @property
    def stores(self) -> list[Full | Ring]:
        """Its stores, which have all that it was given: a prompt that waited is stored now."""
        return self._all_stored()

    def _all_stored(self, rows: Sequence[int] = ()) -> list[Full | Ring]:
        """As `stores`; a prompt that waited finds room for rows that have so many tokens next."""
        if self._stores is None:
            self._stores = [_store_of(group, *self.sizes) for group in self.groups]
        if self._like is not None:
            for store in self._stores:
                store.create(*self._like)
            self._like = None
        if self._prompt is not None:
            self._store(*self._prompt, rows)
            self._prompt = None
        return self._stores

    # -- what transformers calls ----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.rows, self.types = [0] * key_states.shape[0], (key_states.dtype, value_states.dtype)
        if self._made_for != _kind(key_states, value_states):
            self._like = key_states, value_states
        self.device, self.is_initialized = key_states.device, True

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Make its stores, with all the room that they reserve, for keys and values like these
        `[B, H, 0, D]`, before the first of them comes. If those are of another kind, stores are
        made again."""
        self.rows, self._like = [0] * len(k), (k, v)
        for store in self._all_stored():
            store.prepare()
        self._made_for = _kind(k, v)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Note the new columns and return them untouched; history stays in the stores."""
        call = running()
        if call is None or call.owner != self.owner:
            raise CacheError(
                "this cache was filled under an hfsparse patch that is no longer on the model "
                "(undone, replaced, or switched off by set_attn_implementation). It holds only "
                "what that plan kept: start again from the prompt with a new cache."
            )
        if call.layer is not None:
            raise CacheError(
                "hfsparse's cache is filled, but another attention function reads it: a forward "
                "was interrupted, or part of the model was switched back. Start again from the "
                "prompt with a new cache"
            )
        if self.is_initialized:
            self.check_rows(key_states.shape[0])
        else:
            given = autocast(key_states, value_states)
            self.lazy_initialization(*(join_latents(*given) if self.rank else given))
        self.seen += key_states.shape[-2]
        call.layer, call.given = self, (key_states, value_states)
        call.updated.append(self)
        return key_states, value_states

    def check_rows(self, rows: int) -> None:
        """CacheError unless it can take tokens of so many rows."""
        if self.is_initialized and rows != len(self.rows):
            raise CacheError(
                f"the cache holds {len(self.rows)} rows and the input has {rows}: "
                "pass a batch of the same size, or a new cache"
            )

    def get_seq_length(self, *args) -> int:
        """Tokens seen, dropped ones included."""
        return self.seen

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @property
    def keys(self) -> Tensor | None:
        """As in the stock cache, `[B, Hkv, S, D]`; CacheError unless every key is held."""
        return self._history(lambda k, v: v if self.rank else k)

    @property
    def values(self) -> Tensor | None:
        return self._history(lambda k, v: k[..., self.rank :] if self.rank else v)

    def _history(self, part: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
        if not self.is_initialized:
            return None
        if any(store.drops for store in self.stores) or {*self.rows} != {self.seen}:
            raise CacheError(
                "this cache can't be read or rebuilt as transformers' own: heads of this layer "
                "keep only some of their keys, rows are padded, or a forward is under way. Go on "
                "with it as it is (copy.deepcopy copies it), or read the prompt again after "
                "handle.undo()"
            )
        parts = [part(*store.read(self.rows))[:, :, : self.seen] for store in self.stores]
        if len(parts) == 1:
            return parts[0]
        heads = [head for store in self.stores for head in store.group.heads]
        return torch.cat(parts, 1)[:, sorted(range(len(heads)), key=heads.__getitem__)]

    def crop(self, length) -> None:
        """Take back the newest tokens, as many as transformers' own layer would."""
        if self.is_initialized:
            self.take_back(self.seen - _cropped(self.seen, int(length)))

    def take_back(self, drop: int) -> None:
        """Forget the newest `drop` tokens, and what was chosen and clustered with them."""
        rows = [max(n - drop, 0) for n in self.rows]
        lost = self.seen - self.stored  # columns of a forward that was interrupted
        now = [max(n - lost, 0) for n in self.rows]
        for store in self.stores:
            store.check_crop(now, rows)
        self.seen -= drop
        self.stored = min(self.stored, self.seen)  # fewer after a forward that was interrupted
        self.expected = min(self.expected, self.seen)  # what follows is no part of that prompt
        self.rows = rows
        self._forget()

    def give_back(self) -> None:
        """Have the oldest token again that was taken back: its keys lie where they were, as long
        as nothing was stored since."""
        self.rows = [n + 1 for n in self.rows]
        self.seen += 1
        self.stored = self.seen

    def keep(self, tokens: int) -> None:
        """From now on at least so many of the newest tokens can be taken back; CacheError where
        none can: drafts would choose what is kept."""
        for store in self.stores:
            if store.group.eviction is not None:
                raise CacheError(
                    f"drafts are taken back, and what {store.group.eviction.kind} evicted when it "
                    "saw them can't be: generate without an assistant and without prompt lookup, "
                    "or use a plan whose cache is full"
                )
            if isinstance(store, Ring):
                store.slack = max(store.slack, tokens)

    def reset(self) -> None:
        self._prompt = None
        self.seen = self.stored = self.expected = 0
        self.rows = [0] * len(self.rows)
        self._forget()

    def _forget(self) -> None:
        for store in self.stores:
            store.forget(self.rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.rows), device="cpu")
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        picked = torch.arange(len(self.rows), device="cpu")[indices.cpu()].tolist()
        self.rows = [self.rows[i] for i in picked]
        with torch.inference_mode(False):  # buffers are written in any mode
            for store in self.stores:
                store.select(picked)

    def offload(self) -> None:
        raise CacheError(f"offloaded caches are not supported under hfsparse: {DEFAULT}")

    # -- what the attention function calls -------------------------------------------------------

    def put_off(self, k: Tensor, v: Tensor, lengths: Lengths) -> bool:
        """Whether a prompt is kept as it came until stores are asked for: a short one of a new
        cache, whose time is the host's. Where no call goes on from it, nothing is made of it."""
        if self._stores is not None or k.requires_grad or v.requires_grad:
            return False
        if len(self.rows) * lengths.columns > SHORT or self.expected > self.seen:
            return False
        self._prompt = k, v, lengths
        return True

    @without_autocast
    def _store(self, k: Tensor, v: Tensor, lengths: Lengths, rows: Sequence[int]) -> None:
        """Have all stores take a prompt, with room for rows of so many tokens, if any are told."""
        with torch.inference_mode(False):  # each buffer is made so: once for all is quicker
            for store in self._stores:
                store.room(lengths.past, rows or lengths.rows)
        if len(self._stores) == 1 and self.groups[0].selector is None:  # two copies do
            self._stores[0].append(k, v, lengths)
            return
        into = self.table.places([store.place() for store in self._stores])
        asked = {"packed": into.packed, "prompt": True, "plain": into.takes(lengths.longest)}
        append = pick(tables().append, Need.of(k, into.k, into.v, v, **asked))
        with device_guard(k):
            append.run(k, v, into, NewTokens.of_prompt(lengths, k.device))
            for store in self._stores:
                store.settle(lengths.rows)

    def room(self, past: Sequence[int], rows: Sequence[int]) -> Places:
        """Make room for rows that grow from `past` to `rows` tokens; where each head's keys lie."""
        for store in self._all_stored(rows):
            store.room(past, rows)
        return self.places()

    def places(self) -> Places:
        """Where each kv head has its keys, for kernels."""
        return self.table.places([store.place() for store in self.stores])

    @property
    def packed(self) -> bool:
        """Whether some of its keys lie in fewer bits."""
        return any(group.bits != 16 for group in self.groups)

    @property
    def hosted(self) -> bool:
        """Whether some of its keys lie in host memory."""
        return any(group.hot for group in self.groups)

    def bytes(self) -> int:
        """Bytes allocated for keys, values, indexes and choices, without those of the host."""
        return sum(t.nbytes for store in self.stores for t in store.tensors())

    def host_bytes(self) -> int:
        """Bytes allocated in host memory."""
        return sum(t.nbytes for store in self.stores for t in store.outside())

    def held(self) -> Held:
        """What its buffers take."""
        own = []
        for s in self.stores:
            here, outside = (sum([t.nbytes for t in own]) for own in (s.tensors(), s.outside()))
            own.append((s.group.heads, here, s.capacity, s.lacks, s.fixed, outside))
        return Held(own, self.column_bytes(), self.window)

    def outline(self) -> Held | Later:
        """As `held`, and a prompt waits on."""
        if self._prompt is None:
            return self.held()
        k, v, lengths = self._prompt
        given = type(self), self.groups, self.sizes, self.window
        return Later(*given, (k.shape, v.shape), self.types, lengths)

    def column_bytes(self) -> int:
        """Bytes of one column of the stock cache, over all rows and heads."""
        heads, first = 0, self.stores[0]
        for store in self.stores:
            heads += len(store.group.heads)
        dims = sum([t.shape[3] for t in first.held()])
        return len(self.rows) * heads * dims * first.k.itemsize

    def dense_bytes(self) -> int:
        """Bytes of the stock cache: every column, or the model's window, of every row and head."""
        return self.column_bytes() * min(self.seen, self.window or FAR)

    def lengths(self, starts: list[int] | None, new_columns: int) -> Lengths:
        """Of rows when columns follow those that it has seen.

        starts: the first real column of each row (None: all 0).
        """
        lengths = Lengths.of(starts, self.seen, new_columns, len(self.rows))
        if lengths.past != self.rows:
            raise self._other_past(lengths.past)
        return lengths

    def advance(self, lengths: Lengths) -> None:
        """Rows are longer by a call's columns, which `update` has seen."""
        if lengths.past != self.rows:
            raise self._other_past(lengths.past)
        self.rows = lengths.rows

    def state(self) -> dict[str, Any]:
        """What it holds, as `Store.state` tells it of each store."""
        stores = [store.state(self.rows) for store in self.stores]
        own = {"seen": self.seen, "expected": self.expected, "rows": [*self.rows]}
        return {**own, "stores": stores}

    def load(self, state: dict[str, Any]) -> None:
        """Hold what `state` told of a layer with the same groups; this one is new."""
        self.seen = self.stored = state["seen"]
        self.expected, self.rows = state["expected"], state["rows"]
        for store, held in zip(self.stores, state["stores"], strict=True):
            store.load(held)
        first = self.stores[0]
        self.types = first.k.dtype, first.v.dtype
        self.device, self.is_initialized = first.k.device, True

    def _other_past(self, past: list[int]) -> CacheError:
        return CacheError(
            f"the cached rows hold {self.rows} tokens, but by this attention_mask they should "
            f"hold {past}: pass the mask of the whole conversation, earlier padding included"
        )


def copy_prompts(layers: Sequence[CacheLayer]) -> None:
    """Copy the prompts that wait in layers that a call has updated: so far they are the model's.

    Those that are alike are copied in one piece, since an operation a layer is the host's time.
    """
    alike: dict[tuple, list[CacheLayer]] = {}
    for layer in layers:
        if layer._prompt is not None:
            k, v, _ = layer._prompt
            kind = layer.rank, k.shape, v.shape, layer.types, layer.device
            alike.setdefault(kind, []).append(layer)
    for (rank, *_), some in alike.items():
        keys = torch.stack([layer._prompt[0] for layer in some]).unbind()
        if rank:
            values = [k[..., :rank] for k in keys]
        else:
            values = torch.stack([layer._prompt[1] for layer in some]).unbind()
        for layer, k, v in zip(some, keys, values, strict=True):
            layer._like, layer._prompt = (k, v), (k, v, layer._prompt[2])


def _kind(k: Tensor, v: Tensor) -> tuple:
    """What buffers for such keys and values depend on."""
    return k.device, k.dtype, v.dtype, len(k), k.shape[-1], v.shape[-1]


def join_latents(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """A key `[B, 1, S, rank + rope]` and the value `[B, 1, S, rank]` that is part of it."""
    k = torch.cat([latent, rotated.to(latent.dtype)], -1)
    return k, k[..., : latent.shape[-1]]


def _store_of(group: Group, below: int, reserve: int, read_below: int) -> Full | Ring:
    if group.eviction is not None:
        return Evicting(group, reserve, below)
    packs = group.bits != 16
    if group.hot:
        return (HostPacked if packs else HostFull)(group, reserve, read_below)
    if group.band == FULL:
        return (PackedFull if packs else Full)(group, reserve, read_below)
    return (PackedRing if packs else Ring)(group, below)


def _cropped(seen: int, length: int) -> int:
    """Tokens that transformers' layer holds after `crop(length)`: its meaning changed twice."""
    layer = DynamicLayer()
    layer.keys = layer.values = torch.empty(1, 1, seen, 1, device="meta")
    layer.is_initialized = True
    layer.crop(length)
    return layer.keys.shape[2]
