"""What masks say: where rows begin, and what attention other than causal is refused."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import masking_utils

from hfsparse.errors import PatchError
from hfsparse.runtime.call import running
from hfsparse.runtime.image_blocks import block_mask, last_seen
from hfsparse.runtime.layer_plan import LayerPlan

NAME = "hfsparse"


def mask_start(
    *args,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    mask_function=None,
    **kwargs,
) -> Tensor | None:
    """Registered mask function: each row's first real column `[B, 1, 1, 1]`, or None.

    Of a prompt in which the tokens of an image see each other it is `image_blocks.block_mask`. No
    mask of length times length is built; as of one, models may cut off its first queries.
    """
    call = None if torch.compiler.is_dynamo_compiling() else running()  # a fused step has no mask
    if call is not None and call.batch is not None:
        return None  # requests say themselves what each reads
    bidirectional = mask_function is getattr(masking_utils, "bidirectional_mask_function", NAME)
    last = None
    if bidirectional or not allow_is_causal_skip:
        last = None if bidirectional else _last_seen(mask_function, attention_mask, **kwargs)
        if last is None:
            raise PatchError(
                "this call asks for more than causal attention (packed sequences, bidirectional). "
                "hfsparse follows causal and sliding-window attention, and images inside a prompt: "
                "pass one sequence a row with an attention_mask, or run it on the unpatched model "
                "(handle.undo())."
            )
    if last is not None and bool((last[:, :-1] > _columns(**kwargs)[:-1]).any()):
        return _block_mask(last, attention_mask, **kwargs)
    if attention_mask is None or is_start(attention_mask):
        return attention_mask
    if attention_mask.ndim != 2:
        raise PatchError(_wrong_mask(attention_mask))
    found = row_starts(attention_mask)
    if found is None:
        return None
    starts = torch.tensor(found, device=attention_mask.device)[:, None, None, None]
    if call is not None:
        call.starts[starts] = tuple(found)
    return starts


def is_start(mask: Tensor) -> bool:
    """Whether a mask is what `mask_start` answers."""
    return mask.ndim == 4 and mask.shape[1:].numel() == 1 and mask.dtype == torch.long


def row_starts(mask: Tensor | None) -> list[int] | None:
    """The first real column of each row of a mask `[B, columns]`; None: all 0. Asks the device."""
    if mask is None:
        return None
    real, width = (mask != 0).byte(), mask.shape[1]
    count, first = torch.stack([real.sum(1), real.argmax(1)]).tolist()  # one wait
    starts = [f if n else width for f, n in zip(first, count, strict=True)]
    if any(f + n != width for f, n in zip(starts, count, strict=True)):
        raise PatchError(_not_left(real.tolist()))
    return starts if any(starts) else None


def _not_left(mask: list[list[int]]) -> str:
    """What is wrong with a mask `[B][columns]`, by its first row masked behind a real column."""
    firsts = [(*real, 1).index(1) for real in mask]
    row = next(row for row, first in enumerate(firsts) if 0 in mask[row][first:])
    column = mask[row].index(0, firsts[row])
    if 1 in mask[row][column:]:
        return (
            f"attention_mask has holes (row {row}, from column {column} on): columns behind the "
            "row's first token, such as padding between two turns. hfsparse supports padding in "
            "front of a row only: start again from the whole conversation, padded there, give one "
            "row at a time, or run this on the unpatched model (handle.undo())."
        )
    return (
        f"attention_mask has right padding (row {row}, from column {column} on). hfsparse supports "
        "left padding only: set tokenizer.padding_side = 'left', or run this on the unpatched "
        "model (handle.undo())."
    )


def _last_seen(
    mask_function, attention_mask, batch_size: int = 1, local_size=None, config=None, **kwargs
) -> Tensor | None:
    """[B, Q] the last column that each new token sees; None: neither causal, nor by blocks.

    transformers 4.57 composes a mask for packed sequences also where nothing is packed.
    """
    columns = _columns(**kwargs)
    if local_size is None or local_size != getattr(config, "attention_chunk_size", None):
        return last_seen(mask_function, batch_size, columns)
    starts = columns.new_tensor(row_starts(attention_mask) or [0] * batch_size)[:, None]
    row = torch.arange(batch_size, device=columns.device)[:, None]
    before, behind = columns[:-1], columns[1:]
    together = (behind - starts) % local_size > 0  # in one chunk
    wrong = mask_function(row, 0, behind, before) != together
    wrong |= mask_function(row, 0, before, behind)
    return None if bool(wrong.any()) else columns.expand(batch_size, -1)


def _columns(
    cache_position: Tensor | None = None, q_length: int = 0, q_offset=0, device="cpu", **kwargs
) -> Tensor:
    """[Q] columns of the new tokens, by what this transformers calls them."""
    if cache_position is not None:
        return cache_position
    return torch.arange(q_length, device=device) + q_offset


def _block_mask(last: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
    """PatchError behind a past, whose keys a plan may have dropped."""
    if int(_columns(**kwargs)[0]):
        raise PatchError(
            "this call brings an image behind a past: hfsparse reads images of the first call "
            "with a cache. Give the whole conversation as one prompt with a new cache, without "
            "prefill_chunk_size, or run it on the unpatched model (handle.undo())."
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise PatchError(_wrong_mask(attention_mask))
    return block_mask(last, row_starts(attention_mask))


def refuse_other(
    layer_plan: LayerPlan,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    dropout: float,
    window: int | None,
    packed: bool,
) -> None:
    """PatchError where a layer is asked for another attention than the plan's."""
    if mask is not None and not is_start(mask):
        raise PatchError(_wrong_mask(mask))
    heads = layer_plan.counts.q_heads, layer_plan.key_heads
    index = layer_plan.index
    if (query.shape[1], key.shape[1]) != heads:
        raise PatchError(
            f"layer {index} has {query.shape[1]} q and {key.shape[1]} kv heads, its config "
            f"says {heads[0]} and {heads[1]}: hfsparse can't follow this model. Where ranks share "
            "its heads, load it by from_pretrained(tp_plan='auto') and patch the whole of it"
        )
    if packed:
        raise PatchError(
            "this call packs several sequences in a row (cu_seq_lens_q): pass one sequence a row "
            "with an attention_mask, or run it on the unpatched model (handle.undo())"
        )
    if dropout:
        raise PatchError(
            f"attention dropout is {dropout}: hfsparse has none, call model.eval() first"
        )
    if window != layer_plan.sliding_window:
        raise PatchError(
            f"layer {index} was called with a sliding window of {window}, its config says "
            f"{layer_plan.sliding_window}: please report this model to hfsparse"
        )
    unread = key.shape[2] - query.shape[2]  # by layers that need their last queries alone
    if unread < 0 or (unread and layer_plan.producer is None):
        raise PatchError(
            f"layer {index} got more keys than queries: this cache does not belong to hfsparse"
        )


def _wrong_mask(mask) -> str:
    return (
        f"got an attention mask of shape {list(mask.shape)}: hfsparse follows [batch, columns] "
        "masks with left padding only. Pass such a mask, or run this on the unpatched model "
        "(handle.undo())."
    )


def shift_rows(t: Tensor, by: Tensor) -> Tensor:
    """t `[B, H, S, D]` with row b moved `by[b]` places towards the front, zeros behind."""
    at = torch.arange(t.shape[2], device=t.device) + by[:, None]
    real = (at >= 0) & (at < t.shape[2])
    at = at.clamp(0, t.shape[2] - 1)[:, None, :, None]
    moved = t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3]))
    return moved.masked_fill(~real[:, None, :, None], 0)
