"""What keeps a decode step from being replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache

from hfsparse.runtime.call import running

FSDP = "torch.distributed.fsdp"  # where classes of modules are from whose weights are gathered
OWN_HOOKS = ("transformers.", "hfsparse.patcher")  # of modules whose steps can be recorded


def has_hook(module: nn.Module) -> bool:
    """Whether a hook watches a module: not those by which transformers collects outputs, which stay
    where they were once asked for, or has ranks share a projection."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(hook.__module__.startswith(OWN_HOOKS) for hook in hooks)


def hooks_everywhere() -> bool:
    """Whether hooks watch every module there is."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def is_known(module: nn.Module) -> bool:
    """Whether the forward that was put on a module can be recorded: accelerate's, which brings
    inputs to the device of the weights, or transformers' of a tensor parallel projection."""
    if getattr(module.forward, "__module__", "").startswith("transformers."):
        return True
    hook = module.__dict__.get("_hf_hook")
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


class NoWait(TorchDispatchMode):
    """Raises where the host would wait for the GPU: a recording that does is broken for good."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # torch.compile does its work inside, where it is put off

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS or (name in ("index", "index_put_") and _by_mask(*args[1:])):
            raise RuntimeError(f"the host waits for {name}")
        made = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and args[name == "copy_"].is_cuda and not made.is_cuda:
            raise RuntimeError("the host waits for a copy to it")
        return made


WAITS = "_local_scalar_dense nonzero masked_select equal bincount _unique2 unique_dim".split()


def _by_mask(indices, value: Tensor | None = None, adds: bool = False, *more) -> bool:
    """Whether places are looked for; one number of the host's fills a mask without that."""
    one = value is not None and value.numel() == 1 and value.device.type == "cpu"
    fills = one and not adds
    masks = (t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)
    return any(masks) and not fills


class Through(Cache):
    """Stands for the cache in a recorded step: attention knows the layers that it serves.

    `layers` are those of a hybrid's cache, where its linear layers find their states.
    """

    def __init__(self, layers: Sequence[Any] = ()):
        super().__init__(layers=[*layers])

    def update(self, key_states, value_states, *args, **kwargs):
        if not torch.compiler.is_dynamo_compiling():  # latents are never fused
            running().given = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, *args, **kwargs) -> int:
        return 0  # positions are given

    def get_mask_sizes(self, *args, **kwargs) -> tuple[int, int]:
        return 1, 0


def find_obstacle(decoder, kwargs, new: Tensor) -> str | None:
    """Why this step can't be a graph: what may differ from step to step."""
    mask = kwargs.get("attention_mask")
    if not new.is_cuda:
        return f"no CUDA graphs on {new.device.type}"
    if torch.is_grad_enabled():
        return "gradients are wanted: call under torch.no_grad()"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if torch.cuda.is_current_stream_capturing():
        return "the caller records a graph of its own"
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return "the mask is not [batch, columns]"
    for name, x in kwargs.items():
        if not isinstance(x, Tensor | Cache | bool | int | float | str | None):
            return f"{name} is a {type(x).__name__}"
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name) or getattr(decoder.config, name, False):
            return f"{name} is asked for"
    return "tuples are asked for" if kwargs.get("return_dict") is False else None
