"""Heads between full and streaming, by a gate a kv head (DuoAttention, arXiv 2410.10819).

A layer's attention is gate * full + (1 - gate) * streaming. Gates enter through the attention
function of a patched model; weights stay frozen, and layers are recomputed one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfsparse import kernels
from hfsparse.lists import Grid, default_block
from hfsparse.models.loading import input_device
from hfsparse.models.names import text_decoder
from hfsparse.patcher import patch
from hfsparse.patterns.streaming import Streaming
from hfsparse.profiler.measure.capture import checkpoint_layers
from hfsparse.profiler.measure.modes import isolate_modes
from hfsparse.profiler.measure.shared_keys import SharedKeys
from hfsparse.profiler.measure.slices import slice_tokens
from hfsparse.runtime.layer_plan import (
    LayerPlan,
    Logits,
    layer_plan_of,
    layer_plans_of,
    observed,
)


@isolate_modes
def distil(
    model: PreTrainedModel, gates: Tensor, ids: Tensor, rows: list[int], stream: Streaming
) -> float:
    """Squared distance to the dense model's last hidden states at `rows`, mean over rows and dims.

    gates [layers, Hkv], a leaf: one row for each layer without a window of its own; its gradient is
    added to `gates.grad`. ids `[1, L]`.
    """
    ids = ids.to(input_device(model)).clone()
    decoder = text_decoder(model)

    def hidden() -> Tensor:
        return decoder(input_ids=ids, use_cache=False).last_hidden_state[0, rows]

    with patch(model):
        with torch.no_grad(), slice_tokens(model):
            dense = hidden()
        with torch.enable_grad(), checkpoint_layers(model), gate_heads(model, gates, stream):
            distance = (hidden() - dense).float().square().mean()
            distance.backward()
    return float(distance.detach())


@contextmanager
def gate_heads(model: PreTrainedModel, gates: Tensor, stream: Streaming) -> Iterator[None]:
    """Attention goes by gate in a patched model whose plan is full, without a cache."""

    rows = {layer.index: row for row, layer in enumerate(find_sparse_layers(model))}
    shared = SharedKeys()

    def observe(module, q: Tensor, k: Tensor, v: Tensor, logits: Logits):
        shared.follow(layer_plan_of(module), k, v)
        if (row := rows.get(layer_plan_of(module).index)) is None:
            return None

        def mix(full: Tensor) -> Tensor:
            gate = gates[row].to(full).repeat_interleave(q.shape[1] // k.shape[1])
            return torch.lerp(attend_streaming(q, k, v, stream, logits), full, gate[:, None, None])

        return mix

    with observed(model, observe):
        yield


def find_sparse_layers(model: PreTrainedModel) -> list[LayerPlan]:
    """The layers of a patched model that may be sparse."""
    return [layer for layer in layer_plans_of(model) if layer.alone]


def attend_streaming(q: Tensor, k: Tensor, v: Tensor, stream: Streaming, logits: Logits) -> Tensor:
    """Attention that autograd can follow: q `[1, Hq, L, D]`, k, v `[1, Hkv, L, D]`.

    By FlexAttention on CUDA, and by the reference elsewhere and where logits are special.
    """
    if q.is_cuda and not logits.special:
        from hfsparse.kernels import flex

        return flex.streaming(q, k, v, stream.band, scale=logits.scale)
    heads, length = q.shape[1:3]
    grid = Grid.causal(1, length, default_block(length, q.device), q.device)
    kv = torch.arange(heads, device=q.device) // (heads // k.shape[1])
    lists = stream.lists(q, k, grid, logits.scale)
    need = kernels.Need.of(
        *(q, k, v, logits.s_aux), lists=True, logits=logits.special, block=grid.block
    )
    kernel = kernels.pick(kernels.PREFILL, need)
    return kernel.run(q, k, v, lists, kv, **logits.of())
