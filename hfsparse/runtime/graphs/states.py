"""Conv and recurrent states of a cache's linear layers, which transformers keeps: a recorded step
reads and writes them where they lay when it was recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class States:
    """Where the states of a cache's linear layers lie; none where all its layers attend."""

    def __init__(self, cache: Any):
        self.layers = [x for x in getattr(cache, "layers", ()) if hasattr(x, "conv_states")]
        self.held: list[tuple[dict, int, Tensor]] = [
            (table, name, state)
            for layer in self.layers
            for table in (layer.conv_states, layer.recurrent_states)
            for name, state in table.items()
            if state is not None
        ]

    def __bool__(self) -> bool:
        return bool(self.held)

    def __eq__(self, other: object) -> bool:
        """Whether both are of the same tensors."""
        if not isinstance(other, States) or len(self.held) != len(other.held):
            return False
        return all(a is b for (_, _, a), (_, _, b) in zip(self.held, other.held, strict=True))

    def why_not(self) -> str | None:
        """Why no step can be recorded now."""
        if any(getattr(layer, "record_past", False) for layer in self.layers):
            return "its linear layers keep what speculation may take back"
        return None

    def places(self) -> tuple[int, ...]:
        return tuple(state.data_ptr() for _, _, state in self.held)

    @property
    def devices(self) -> set[torch.device]:
        return {state.device for _, _, state in self.held}

    def tensors(self) -> list[Tensor]:
        return [table[name] for table, name, _ in self.held]

    def copies(self) -> list[Tensor]:
        """What the states are now."""
        return [state.clone() for state in self.tensors()]

    def restore(self, were: Sequence[Tensor]) -> None:
        """Have them be what `copies` gave, where they lay."""
        for (table, name, state), was in zip(self.held, were, strict=False):
            table[name] = state
            state.copy_(was)

    def unguard(self) -> None:
        """Have torch.compile take the states of any cache: it guards where those that it knows
        lie, where transformers has said that they stay."""
        for _, _, state in self.held:
            torch._dynamo.mark_static_address(state, guard=False)

    def settle(self) -> None:
        """Bring states that a step has replaced to where they lay."""
        for table, name, state in self.held:
            if table[name] is not state:
                state.copy_(table[name])
                table[name] = state

    def settled(self, call: Callable) -> Callable:
        """`call`, which leaves the states where they lie."""
        if not self.held:
            return call

        def run(**given):
            output = call(**given)
            self.settle()
            return output

        return run
