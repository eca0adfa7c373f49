"""Run what a layer does to each token alone in slices of tokens, so that memory is a slice's.

An MLP is several times as wide as the model, and norms work in float32: of a long prompt either is
larger than the attention that a profile looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel

from hfsparse.models.names import text_decoder

SLICE = 2048  # tokens


@contextmanager
def slice_tokens(model: PreTrainedModel) -> Iterator[None]:
    """Norms and dense MLPs of the text decoder see SLICE tokens at a time, and save their input.

    Mixtures of experts stay as they are.
    """
    named = text_decoder(model).named_modules()
    with wrap_forwards(
        [module for name, module in named if _acts_per_token(name, module)], _run_in_slices
    ):
        yield


@contextmanager
def wrap_forwards(modules: list[nn.Module], wrapper: Callable) -> Iterator[None]:
    """Each module's forward is `wrapper(forward, ...)`; afterwards it is as it was."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = partial(wrapper, module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _acts_per_token(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    if last == "mlp":
        return not any(
            "expert" in child or "router" in child for child, _ in module.named_modules()
        )
    return last.endswith("norm")


def _run_in_slices(forward: Callable, *args, **kwargs):
    """Run a call of a lone tensor `[B, S, ...]` in slices; any other passes through."""
    if kwargs or len(args) != 1 or args[0].ndim < 3 or args[0].shape[1] <= SLICE:
        return forward(*args, **kwargs)
    if torch.is_grad_enabled():
        forward = partial(checkpoint, forward, use_reentrant=False)
    with set_checkpoint_early_stop(False):  # hooks that offload weights run behind a forward
        parts: list[Tensor] = [forward(part) for part in args[0].split(SLICE, 1)]
    return torch.cat(parts, 1)
