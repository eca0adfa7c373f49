"""Whether two models have the same weights, found in a moment."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from types import NoneType
from typing import Any

import torch
from torch import Tensor

PLAIN = (NoneType, bool, int, float, str, torch.dtype)  # what state dicts hold beside tensors


def weights_mark(model: Any) -> str:
    """Hash of a sample of every weight: tells a fine-tune from its base in a moment.

    Of a weight that can't be read it takes name, kind, shape and dtype; it says how many these are.
    """
    seen, unread, state = hashlib.sha256(), 0, model.state_dict()
    for name, value in state.items():
        few = _sample(value)
        if few is None:
            few = _sample(_kept_elsewhere(model, name, value))
        if few is None:
            unread += 1
            shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
            few = f"{type(value).__name__} {tuple(shape)} {dtype}".encode()
        seen.update(name.encode() + few)
    mark = seen.hexdigest()[:16]
    return f"{mark}, {unread} of {len(state)} weights not read" if unread else mark


def _sample(value: Any) -> bytes | None:
    """A few values of what a state dict holds: tensors, or what they are made of; None: unread."""
    if isinstance(value, tuple | list):
        parts = [_sample(part) for part in value]
        return None if None in parts else b"".join(parts)
    if not isinstance(value, Tensor):
        return repr(value).encode() if isinstance(value, PLAIN) else None
    if hasattr(value, "__tensor_flatten__"):  # quantised or distributed
        parts, how = value.__tensor_flatten__()
        named = re.sub("0x[0-9a-f]+", "", repr(how))  # no address, which changes from run to run
        return _sample([named, *(getattr(value, part) for part in parts)])
    try:
        whole = value.dequantize() if value.is_quantized else value.detach()
        return whole.flatten()[:: max(1, whole.numel() // 64)].float().cpu().numpy().tobytes()
    except (NotImplementedError, RuntimeError):  # it lies nowhere, or its dtype can't be converted
        return None


def _kept_elsewhere(model: Any, name: str, value: Any) -> Any:
    """A weight that accelerate brings when its module is called, from where it is meanwhile."""
    path = name.split(".")
    for at in reversed(range(len(path))):
        hook = getattr(model.get_submodule(".".join(path[:at])), "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            with suppress(KeyError):
                return (getattr(each, "weights_map", None) or {})[".".join(path[at:])]
    return value
