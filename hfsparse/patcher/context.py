"""Context parallel: the forward of a text decoder whose prompts are shared by the ranks of a group.

Every rank is called with the same tokens. Of a prompt it reads its own part, of all that follows
everything; the last rank, which keeps what follows, tells the others what it made of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from hfsparse.errors import PatchError
from hfsparse.models.layers import LayerShape
from hfsparse.models.names import new_tokens, text_decoder
from hfsparse.models.sharding import gather, group_of
from hfsparse.patcher.generation import why_in_one_call
from hfsparse.plan import Plan
from hfsparse.runtime.call import running
from hfsparse.runtime.layer_plan import LayerPlan
from hfsparse.runtime.parts import ContextParallel

NO_GRAPH = "context parallel: ranks merge what they read in each layer"


def why_not(
    model: PreTrainedModel, plan: Plan, shapes: Sequence[LayerShape], layers: Sequence[LayerPlan]
) -> str | None:
    """Why ranks can't share this model's tokens; None: they can."""
    if group_of(model) is not None:
        return "its heads are shared by ranks (tensor parallel)"
    if any(shape.rank for shape in shapes):
        return "it keeps latents (MLA)"
    if any(shape.producer is not None for shape in shapes):
        return "layers read other layers' keys"
    if any(shape.chunked for shape in shapes):
        return "layers attend in the model's own chunks"
    if plan.extend is not None:
        return "the plan has extend"
    if any(layer.hosts for layer in layers):
        return "the plan keeps keys in host memory"
    if any(layer.means for layer in layers):
        return "steps of the plan read what they leave out by its means"
    if (why := why_in_one_call(model.config, plan)) is not None:
        return f"a prompt can't be read in parts: {why}"
    if "forward" in vars(text_decoder(model)):
        return "its decoder's forward is not its class's (accelerate's hooks?)"
    return None


@torch.no_grad()
def run(
    context: ContextParallel, forward: Callable[..., Any], decoder: Any, kwargs: dict, cache: Any
) -> Any:
    """`forward(**kwargs)` of this rank's part; what it answers is the last rank's on all.

    Of a prompt that is its last token, of what follows all tokens.
    """
    new, given = new_tokens(kwargs), {**kwargs, "attention_mask": None}
    _check(decoder, kwargs, cache)
    if cache.get_seq_length():
        output = forward(**given)
        return _told(context, output, output[0])
    parts, tokens = context.parts(new.shape[1], new.device), new.shape[1]
    running().parts = parts
    _check_same(context, new)
    own = [torch.arange(*ends, device=new.device) for ends in parts.read[context.rank]]
    output = forward(**_take(given, torch.cat(own), tokens))
    if parts.tokens < tokens:
        behind = torch.arange(parts.tokens, tokens, device=new.device)
        output = forward(**_take(given, behind, tokens))
    return _told(context, output, output[0][:, -1:])


def _check(decoder: Any, kwargs: dict, cache: Any) -> None:
    """PatchError for a call that ranks can't share."""
    mask, why = kwargs.get("attention_mask"), None
    if cache is None or decoder.training:
        why = "it keeps no cache (use_cache=False, or training)"
    elif kwargs.get("output_hidden_states"):
        why = "it asks for hidden states (output_hidden_states)"
    elif mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and mask.all()):
        why = "its rows are padded: give rows of one length, or one row"
    if why is not None:
        raise PatchError(
            f"ranks can't share this call's tokens (context parallel): {why}. Or patch the model "
            "without context_parallel"
        )


def _check_same(context: ContextParallel, new: Tensor) -> None:
    """PatchError on every rank unless all were given the same prompt."""
    told = f"{[*new.shape]}"
    if not new.is_floating_point():
        told += hashlib.sha256(new.cpu().numpy().tobytes()).hexdigest()
    if len({*gather(context.group, told)}) > 1:
        raise PatchError(
            "ranks were given different prompts, and each reads a part of one (context parallel): "
            "give every rank the same tokens"
        )


def _take(kwargs: dict, at: Tensor, tokens: int) -> dict:
    """A prompt's arguments for its tokens at these positions."""
    places = kwargs.get("position_ids")
    places = torch.arange(tokens, device=at.device)[None] if places is None else places
    taken = {**kwargs, "position_ids": places[..., at]}
    for name, axis in (("input_ids", 1), ("inputs_embeds", 1), ("cache_position", 0)):
        if kwargs.get(name) is not None:
            taken[name] = kwargs[name].index_select(axis, at)
    return taken


def _told(context: ContextParallel, output: Any, hidden: Tensor) -> Any:
    """A decoder's output with the last rank's hidden states in the place of its own."""
    hidden = hidden.contiguous()
    source = distributed.get_global_rank(context.group, context.ranks - 1)
    distributed.broadcast(hidden, source, group=context.group)
    if isinstance(output, tuple):
        return hidden, *output[1:]
    output.last_hidden_state = hidden
    return output
