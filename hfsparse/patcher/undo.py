"""Give a patched model back exactly as it was."""

from __future__ import annotations

from transformers import PreTrainedModel

from hfsparse.errors import PatchError
from hfsparse.patcher.generation import SHADOWS
from hfsparse.patcher.hooks import _forward
from hfsparse.patcher.state import State, _state
from hfsparse.runtime.call import leave


def unpatch(model: PreTrainedModel) -> None:
    """Give a patched model back as it was: names, hooks and functions."""
    state = _state(model)
    if state.model is not model:
        raise PatchError(
            f"this {type(model).__name__} is part of a patched model: give hfsparse.unpatch the "
            "model that was patched, or call handle.undo()"
        )
    _restore(model, state)


def _restore(model: PreTrainedModel, state: State) -> None:
    while leave(state.owner):
        pass  # interrupted forwards may have left this thread inside
    state.graphs.kept.clear()
    for hook in state.hooks:
        hook.remove()
    for own in state.configs:
        own.give_back()
    decoder = model.get_decoder()
    if getattr(decoder.forward, "func", None) is _forward:
        del decoder.forward
    for module in model.modules():
        module.__dict__.pop("_hfsparse", None)
    for name in (*SHADOWS, "_compiled_call", "_cache"):
        model.__dict__.pop(name, None)
