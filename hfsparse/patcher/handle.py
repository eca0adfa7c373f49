"""The handle of a patched model."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from hfsparse.errors import PatchError
from hfsparse.models.names import text_decoder
from hfsparse.models.sharding import gather as gather_from
from hfsparse.models.sharding import group_of
from hfsparse.patcher import saved
from hfsparse.patcher.explain import explain
from hfsparse.patcher.install import unpatch
from hfsparse.patcher.state import State
from hfsparse.patcher.supported import Handle
from hfsparse.runtime.cache.held import NOTHING, Held
from hfsparse.stats import LayerStats, Stats, Work


class Patched(Handle):
    """A patched model's handle and context manager; leaving the context undoes the patch."""

    def __init__(self, model: PreTrainedModel, state: State):
        super().__init__(model)
        self._patch = state

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *error) -> None:
        self.undo()

    def undo(self) -> None:
        """Give the model back as it was; a second call does nothing, nor touches a later patch."""
        if text_decoder(self.model).__dict__.get("_hfsparse") is self._patch:
            unpatch(self.model)

    def stats(self, gather: bool = False) -> Stats:
        """Densities since the last reset, and KV bytes held after the last call with a cache.

        Where ranks share the heads (tensor parallel) or the tokens (context parallel) they are
        those of this rank's; with gather=True those of all, which every rank must ask for: one that
        asks alone waits.
        """
        state = self._own_state()
        own = self._own_stats(state)
        if not state.whose:
            return own
        if not gather:
            return replace(own, whose=state.whose)
        if state.context is not None:
            return Stats.added(gather_from(state.context.group, own))
        return Stats.joined(gather_from(group_of(self.model), own))

    def _own_stats(self, state: State) -> Stats:
        states = [*state.states, *[0] * len(state.plan.layers)]
        layers = [
            LayerStats(state_bytes=n) for _, n in zip(state.plan.layers, states, strict=False)
        ]
        for at, layer in enumerate(state.layers):
            held = Held.together(state.held[at]) if state.held else NOTHING
            pairs, blocks = layer.counts.work()
            layers[layer.index] = LayerStats(
                pairs,
                blocks,
                (layer.draft or layer).reads(),
                held.work(layer.kv_heads, state.seen),
                held.bytes(layer.kv_heads),
                layer.counts.cut.tolist(),
                Work(*layer.counts.skipped.T.tolist()),
                layer.window,
                layer.evicting,
                held.outside(layer.kv_heads),
                layer.counts.found(layer.kv_heads),
                states[layer.index],
            )
        return Stats(layers, None if state.exact is None else replace(state.exact.drafts))

    def reset_stats(self) -> None:
        """Forget the densities counted so far."""
        state = self._own_state()
        for layer in state.layers:
            for each in filter(None, (layer, layer.draft)):
                each.counts.reset()
                each.steps.clear()
        if state.exact is not None:
            state.exact.drafts.reset()

    def explain(self) -> str:
        """What runs where and why, in words."""
        self._own_state()
        return explain(self.model)

    def save(
        self,
        cache: Cache,
        folder: str | os.PathLike,
        tokens: torch.Tensor | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a cache of this patch into a new folder, from which `load` goes on with it.

        tokens `[B, columns or more]`: the ids that it was read from, padding included; `load` can
        then tell whether a prompt begins with them. A cache that the folder holds is replaced with
        overwrite=True, nothing else is. The folder is whole, or is not there. Raises a CacheError
        for a cache that can't be saved, a UsageError for a folder that can't be written.
        """
        saved.save(self._own_state(), cache, folder, tokens, overwrite)

    def load(
        self,
        folder: str | os.PathLike,
        tokens: torch.Tensor | None = None,
        device: str | torch.device | None = None,
    ) -> DynamicCache:
        """The cache that `save` has written into a folder; a call goes on from it as from that.

        tokens `[B, columns or more]`: the prompt that it is for; what it begins with is compared
        with the tokens that the cache was saved with. device: where it will lie, None: each layer
        where the model's layer runs. Raises a CacheError for a cache of another plan, model or
        dtype, of other tokens, or in files that were changed, a UsageError where there is none.
        """
        return saved.load(self._own_state(), folder, tokens, device)

    def _own_state(self) -> State:
        if text_decoder(self.model).__dict__.get("_hfsparse") is not self._patch:
            raise PatchError(
                f"this handle's patch is no longer on the {type(self.model).__name__}: ask before "
                "undo(), or ask the handle of the patch that is on it now"
            )
        return self._patch
