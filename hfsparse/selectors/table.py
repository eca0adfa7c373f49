"""Tables that selectors are bound to, where steps can read them."""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.registry import require


def layer_of(
    kind: str, data: dict[str, Tensor] | None, name: str, layer: int, dims: int = 1
) -> Tensor:
    """A layer's part `[kv heads, D]` of what a table holds under a name; of 2 `dims` `[..., D, D]`.

    ValueError if it is missing, of another shape or not finite: `kind` is the selector that needs
    it.
    """
    made = f"hfsparse profile MODEL --selector {kind} makes one"
    require(bool(data) and name in data, f"{kind} needs a table with {name}: {made}")
    layers = len(data[name])
    require(layer < layers, f"{kind} has a table of {layers} layers, not of layer {layer}: {made}")
    shape, sizes = [*data[name].shape], ", ".join("D" * dims)
    fits = len(shape) == 2 + dims and len({*shape[2:]}) == 1
    require(
        fits,
        f"{kind} has a table with {name} of shape {shape}, not [layers, kv heads, {sizes}]: {made}",
    )
    found = data[name][layer]
    finite = bool(found.isfinite().all())
    require(finite, f"{kind} has a table with {name} that is not finite in layer {layer}: {made}")
    return found


class DeviceTensor:
    """A tensor, and a copy of it on each device that has asked for one.

    A step that is recorded as a CUDA graph can't copy from the host: the eager steps before have,
    and the copy lies where it is as long as this lives.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._copies: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo) -> DeviceTensor:
        return self  # nobody writes into it

    def __reduce__(self):
        return DeviceTensor, (self.tensor,)

    def on(self, device: torch.device) -> Tensor:
        """Its copy there; the tensor itself where it lies there already."""
        if device not in self._copies:  # two threads both get the first one's
            with torch.inference_mode(False):
                self._copies.setdefault(device, self.tensor.to(device))
        return self._copies[device]
