"""Room for what is made of rows, and the device that it is made on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

NO_GUARD = nullcontext()
_devices = cache(torch.cuda.device_count)


def device_guard(t: Tensor) -> AbstractContextManager:
    """Its device as the current one: Triton launches there (a model may lie on several)."""
    return torch.cuda.device(t.device) if t.is_cuda and _devices() > 1 else NO_GUARD


def new_output(q: Tensor, v: Tensor) -> Tensor:
    """Room for the output `[B, H, Q, Dv]`, token by token in memory, as models want it next."""
    B, H, Q, _ = q.shape
    if torch.is_grad_enabled():  # autograd refuses some writes into a view of a leaf
        return q.new_empty(B, H, Q, v.shape[3])
    return q.new_empty(B, Q, H, v.shape[3]).transpose(1, 2)
