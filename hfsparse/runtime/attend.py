"""The attention that a patched model calls.

`attend` is registered with transformers' AttentionInterface. It shifts left-padded rows to column
0, appends the new keys to the cache layer (where a layer that reads another's finds them), and
sends each head's queries to a pattern and a kernel (a prompt or a chunk) or to a selector and a
kernel (a few new tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.errors import PatchError
from hfsparse.kernels import Need, pick
from hfsparse.lists import PAGE
from hfsparse.precision import casts
from hfsparse.runtime import context
from hfsparse.runtime.batch import attend_batch
from hfsparse.runtime.cache.buffers import autocast
from hfsparse.runtime.call import call_of, running
from hfsparse.runtime.decode import decode, is_step, make_step
from hfsparse.runtime.image_blocks import read_blocks, split_mask
from hfsparse.runtime.latent import Latents
from hfsparse.runtime.layer_call import LayerCall
from hfsparse.runtime.layer_plan import Logits, layer_plan_of
from hfsparse.runtime.masks import NAME, refuse_other, shift_rows
from hfsparse.runtime.prefill import prefill
from hfsparse.runtime.rows import device_guard


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
    cu_seq_lens_q: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of query `[B, Hq, Q, D]` over the cache and key, value `[B, Hkv, Q, D]`.

    Returns `[B, Q, Hq, Dv]`.
    """
    layer_plan = layer_plan_of(module)
    more = scaling, dropout, sliding_window, softcap, s_aux, cu_seq_lens_q
    if torch.compiler.is_dynamo_compiling():
        if layer_plan is not None and layer_plan.mode.fusing:
            step = torch.ops.hfsparse.step  # one opaque operator, where a step is to be fused
            return step(query, key, value, layer_plan.number, scaling, softcap, s_aux), None
        return attend_apart(module, query, key, value, attention_mask, *more)
    call = running()
    if call is not None and call.plain is not None and layer_plan is not None:
        plain = attention_mask is sliding_window is softcap is s_aux is cu_seq_lens_q is None
        if plain and not dropout:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            out = call.plain.attend(call, layer_plan, query, key, value, scale)
            if out is not None:
                return out.transpose(1, 2).contiguous(), None
    if casts(kind := query.device.type):  # nothing inside may change its type
        cast = autocast(query, key, value)
        with torch.autocast(kind, enabled=False):
            return attend(module, *cast, attention_mask, *more)
    if layer_plan is None:
        raise PatchError(
            f"this model's attention was set to {NAME} without a plan: choose another, as in "
            "set_attn_implementation('sdpa'), and call hfsparse.patch(model, plan)"
        )
    call = call_of(layer_plan.owner)
    if call.drafts and layer_plan.draft is not None:
        layer_plan = layer_plan.draft
    last = None
    if attention_mask is not None:
        last, attention_mask = call.once(split_mask, attention_mask)
    packed = cu_seq_lens_q is not None and call.batch is None
    refuse_other(layer_plan, query, key, attention_mask, dropout, sliding_window, packed)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits, dtype = Logits(scale, softcap, s_aux), query.dtype
    if call.batch is not None:
        with device_guard(query):
            out = attend_batch(call, layer_plan, query, key, value, logits)
        return out.transpose(1, 2).contiguous(), None
    if call.recorded is not None:
        return attend_recorded(call, module, layer_plan, query, key, value, logits), None
    producer, place, latents = layer_plan.producer, query.device, None
    layer = call.take_layer() if producer is None else call.layer_of(producer.index)
    if producer is not None and layer is not None:  # the producer may lie on another device
        query, key, value = (t.to(layer.device) for t in (query, key, value))
    if layer is not None:  # perhaps it was filled under autocast, or before
        kind, kind_of_values = layer.types
        if (query.dtype, key.dtype, value.dtype) != (kind, kind, kind_of_values):
            query, key, value = query.to(kind), key.to(kind), value.to(kind_of_values)
        if layer.rank:
            latents = Latents(module, *(t.to(kind) for t in call.given))
    observe = layer_plan.mode.observe
    watch = observe and observe(module, query, key, value, logits)
    given = attention_mask, query, key, value, logits, latents
    layer_call = LayerCall(call, layer_plan, layer, *given)
    run = prefill
    if layer_plan.context is not None:
        run = context.attend
    elif layer is not None and is_step(layer, key.shape[2], layer.seen):
        run = decode_step
    with device_guard(query):
        out = run(layer_call)
    changed = watch and watch(out)
    out = out if changed is None else changed
    if layer_call.pads is not None:
        out = shift_rows(out, -layer_call.pads)
    if last is not None:
        read_blocks(query, key, value, last, layer_plan.window, logits, out)
    out = out.transpose(1, 2).contiguous()
    return (out if (out.device, out.dtype) == (place, dtype) else out.to(place, dtype)), None


# A graph break a layer: traced, its Python takes longer than it saves.
attend_apart = torch.compiler.disable(attend)


def decode_step(layer_call: LayerCall) -> Tensor:
    """A few new tokens behind a past; `[B, Hq, Q, Dv]`."""
    layer_plan, lengths, logits = layer_call.layer_plan, layer_call.lengths, layer_call.logits
    q, (k, v), latents = layer_call.q, layer_call.kept, layer_call.latents
    q = q if latents is None else latents.absorb(q)
    call, asked = layer_call.call, {"lists": True, "block": PAGE, "latents": latents is not None}
    asked |= {"packed": layer_call.layer.packed, "hosted": layer_call.layer.hosted}
    need = Need.of(q, k, v, logits.s_aux, **asked)
    whole = pick(call.tables.decode, need).device_lengths  # it skips what is empty
    ended = layer_call.layer.ended
    step = call.once(make_step, lengths, whole, ended)
    if layer_call.given is not lengths:  # pages were chosen for more queries
        step.chosen = call.once(make_step, layer_call.given, whole, ended).chosen
    step = step.on(q.device)
    if layer_plan.leads:
        layer_plan.steps.update(zip(lengths.rows, lengths.new, lengths.rows, strict=True))
    out = decode(call.tables, layer_plan, layer_call.layer, q, k, v, step, logits)
    return out if latents is None else latents.values(out)


def attend_recorded(call, module, layer_plan, q, k, v, logits) -> Tensor:
    """A layer's attention in a step that is recorded; `[B, Q, Hq, Dv]`."""
    if not layer_plan.rank:
        return call.recorded(layer_plan.index, q, k, v, logits)
    latents = Latents(module, *call.given)
    read = call.recorded(layer_plan.index, latents.absorb(q), *latents.kept, logits)
    return latents.values(read.transpose(1, 2)).transpose(1, 2).contiguous()


def _recorded_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    number: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """As `attend`, in a step that is compiled and recorded."""
    logits = Logits(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    return running().recorded(int(number), query, key, value, logits)


torch.library.custom_op(
    "hfsparse::step",
    _recorded_step,
    mutates_args=(),  # that compilers know of: the cache is none of theirs
    schema="(Tensor query, Tensor key, Tensor value, Tensor number, float? scaling, "
    "float? softcap, Tensor? s_aux) -> Tensor",
)


@torch.library.register_fake("hfsparse::step")
def _(query, key, value, number, scaling, softcap, s_aux):
    B, H, Q, _ = query.shape
    return query.new_empty(B, Q, H, value.shape[3])
