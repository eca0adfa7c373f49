"""Run a prompt through a model and show every layer's attention to an observer, one at a time.

Forward, `see` gets each layer's q, k, v. Backward, from the margin of the tokens to predict, `effects`
gets them again with the attention's output and its gradient. Layers are recomputed one by one on the way
back (reentrant checkpointing), so that memory is one layer's and the hidden states between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hfsparse.attention import Logits
from hfsparse.patcher import patch

See = Callable[[Any, Tensor, Tensor, Tensor, Logits], dict[str, np.ndarray]]
Effects = Callable[[Tensor, Tensor, Tensor, Tensor, Logits], Callable[[Tensor], np.ndarray]]


def capture(
    model: PreTrainedModel, ids: Tensor, targets: tuple[int, int], see: See, effects: Effects
) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
    """What `see` and `effects` answer for every layer, over one dense pass of ids `[1, L]`.

    `see(module, q, k, v, logits)`: q is `[1, Hq, L, D]`, k and v `[1, Hkv, L, D]`, post-RoPE.
    `effects(out, q, k, v, logits)` answers a function of the gradient of out `[1, Hq, L, Dv]`. The gradient
    is of the mean margin of the tokens at `targets` (first, past the last): logit over all others.
    """
    seen: dict[int, dict] = {}
    felt: dict[int, np.ndarray] = {}
    ids = ids.to(model.device)

    def observe(module, q, k, v, logits):
        if not torch.is_grad_enabled():  # the way forward
            seen[module.layer_idx] = see(module, q, k, v, logits)
            return None

        def watch(out: Tensor) -> None:
            with torch.no_grad():
                effect = effects(out, q, k, v, logits)
            out.register_hook(lambda grad: felt.__setitem__(module.layer_idx, effect(grad)))

        return watch

    with patch(model), _checkpointed(model):
        decoder = model.get_decoder()
        for module in decoder.modules():
            if module is not decoder and "_hfsparse" in module.__dict__:
                module._hfsparse.observe = observe
        first, last = targets
        with torch.enable_grad():
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            scores = model.get_output_embeddings()(hidden[:, first - 1 : last - 1])[0].float()
            wanted = ids[0, first:last, None]
            others = scores.scatter(1, wanted, -torch.inf).logsumexp(1)
            (scores.gather(1, wanted)[:, 0] - others).mean().backward()
    return [seen[i] for i in sorted(seen)], [felt[i] for i in sorted(felt)]


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Gradients from the embeddings on, none for weights, each decoder layer recomputed."""
    weights = [p for p in model.parameters() if p.requires_grad]
    layers = [
        module
        for module in model.get_decoder().modules()
        if any("_hfsparse" in child.__dict__ for child in module.children())
    ]
    before = [layer.__dict__.get("forward") for layer in layers]
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out.requires_grad_(True)
    )
    try:
        for weight in weights:
            weight.requires_grad_(False)
        for layer in layers:
            layer.forward = partial(_recomputed, layer.forward)
        yield
    finally:
        hook.remove()
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
        for weight in weights:
            weight.requires_grad_(True)


def _recomputed(forward: Callable, hidden_states: Tensor, *args, **kwargs):
    return checkpoint(partial(forward, **kwargs), hidden_states, *args, use_reentrant=True)
