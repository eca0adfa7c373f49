"""Gradients of keys that several layers read, where layers are recomputed one by one.

A layer that reads another's keys is recomputed ahead of it, and finds the keys as the first pass
left them, of which autograd knows no origin. What their gradients come to in the readers is kept,
and added where the layer that makes the keys is recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.runtime.layer_plan import LayerPlan


class SharedKeys:
    """What the readers of one backward pass leave for each layer whose keys they read."""

    def __init__(self):
        self.read: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # by layer; of each once

    def follow(self, layer: LayerPlan, k: Tensor, v: Tensor) -> None:
        """Called of every layer with keys and values `[1, Hkv, L, D]`, as attention is given them.

        It does nothing where no gradients are asked for.
        """
        if not torch.is_grad_enabled():  # the first pass
            return
        if layer.producer is not None and k.is_leaf and v.is_leaf:
            found = k.requires_grad_(), v.requires_grad_()
            self.read.setdefault(layer.producer.index, {})[id(k)] = found
        for given in self.read.pop(layer.index, {}).values():
            for own, read in zip((k, v), given, strict=True):
                if read.grad is not None and own.requires_grad:
                    own.register_hook(lambda grad, more=read.grad: grad + more.to(grad))
