"""The attention and mask functions that a patched model calls.

`attention` is registered with transformers' AttentionInterface; `attend` does its work. It shifts
left-padded rows to column 0, appends the new keys to the cache layer, and sends each head's queries
to a pattern and a kernel (a prompt or a chunk) or to a selector and a kernel (a few new tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse import kernels
from hfsparse.errors import PatchError
from hfsparse.lists import PAGE
from hfsparse.precision import casts
from hfsparse.runtime.cache.buffers import autocast
from hfsparse.runtime.call import Call, running, take_layer
from hfsparse.runtime.decode import _decode, _step, is_step
from hfsparse.runtime.layer_plan import LayerPlan, Logits
from hfsparse.runtime.masks import NAME, _refuse, _shift
from hfsparse.runtime.prefill import _prefill
from hfsparse.runtime.rows import _on


def attention(module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, None]:
    """What is registered: `attend`, or one opaque operator where a step is compiled to be fused."""
    plan = getattr(module, "_hfsparse", None)
    if torch.compiler.is_dynamo_compiling() and plan is not None and plan.fusing:
        more = (kwargs.get(name) for name in ("scaling", "softcap", "s_aux"))
        return torch.ops.hfsparse.step(query, key, value, plan.index, *more), None
    return attend(module, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable  # a graph break a layer; traced, its Python takes longer than it saves
def attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of query `[B, Hq, Q, D]` over the cache and key, value `[B, Hkv, Q, D]`.

    Returns `[B, Q, Hq, Dv]`.
    """
    if casts(kind := query.device.type):  # nothing inside may change its type
        more = scaling, dropout, sliding_window, softcap, s_aux
        cast = autocast(query, key, value)
        with torch.autocast(kind, enabled=False):
            return attend(module, *cast, attention_mask, *more, **kwargs)
    plan: LayerPlan | None = getattr(module, "_hfsparse", None)
    if plan is None:
        raise PatchError(
            f"this model's attention was set to {NAME} without a plan: choose another, as in "
            "set_attn_implementation('sdpa'), and call hfsparse.patch(model, plan)"
        )
    (B, _, Q, D), dtype = query.shape, query.dtype
    _refuse(plan, query, key, attention_mask, dropout, sliding_window, kwargs)
    call = running()
    if call is None or call.owner != plan.owner:
        call = Call()  # the layer runs by itself, as where gradients recompute it
    if call.recorded is not None:
        return _recorded_step(query, key, value, plan.index, scaling, softcap, s_aux), None
    layer = take_layer(call)
    if layer is not None:  # perhaps it was filled under autocast, or before
        k, v = layer.tensors()
        query, key, value = query.to(k.dtype), key.to(k.dtype), value.to(v.dtype)
    logits = Logits(D**-0.5 if scaling is None else scaling, softcap, s_aux)
    watch = plan.observe and plan.observe(module, query, key, value, logits)
    starts = None if attention_mask is None else call.starts_of(attention_mask)
    if layer is None:
        past, new = [0] * B, [Q - s for s in starts or [0] * B]
    else:
        past, new = layer.advance(starts, Q)
    padded = min(new) < Q
    if padded:
        pads = torch.tensor([Q - n for n in new], device=query.device)
        query, key, value = (_shift(t, pads) for t in (query, key, value))
    if layer is not None and is_step(layer, Q, layer.seen):
        need = kernels.Need.of(query, key, value, s_aux, lists=True, block=PAGE)
        whole = kernels.pick(kernels.DECODE, need).name == "Triton"  # it skips what is empty
        step = call.once(_step, tuple(past), tuple(layer.rows), Q, whole).on(query.device)
        if plan.leads:
            plan.steps.update(zip(layer.rows, new, strict=True))
        with _on(query):
            out = _decode(plan, layer, query, key, value, step, logits)
    else:
        with _on(query):
            out = _prefill(call, plan, layer, query, key, value, past, new, logits)
    if watch:
        changed = watch(out)
        out = out if changed is None else changed
    if padded:
        out = _shift(out, -pads)
    if layer is not None:
        layer.stored = layer.seen
    return out.transpose(1, 2).contiguous().to(dtype), None


def _recorded_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: int,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """As `attend`, for the step that this thread records; it changes nothing on the host."""
    step, layers, cut = running().recorded
    if cut is not None:
        cut(index)
    plan, layer = layers[index]
    logits = Logits(query.shape[3] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    step = step.on(query.device)
    with _on(query):
        out = _decode(plan, layer, query, key, value, step, logits)
    return out.transpose(1, 2).contiguous()


torch.library.custom_op(
    "hfsparse::step",
    _recorded_step,
    mutates_args=(),  # that compilers know of: the cache is none of theirs
    schema="(Tensor query, Tensor key, Tensor value, int index, float? scaling, float? softcap, "
    "Tensor? s_aux) -> Tensor",
)


@torch.library.register_fake("hfsparse::step")
def _(query, key, value, index, scaling, softcap, s_aux):
    B, H, Q, _ = query.shape
    return query.new_empty(B, Q, H, value.shape[3])
