"""Whether queries of a model can be turned as a plan's `extend` asks, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfsparse.errors import PatchError
from hfsparse.models.fingerprint import rope_of
from hfsparse.models.layers import LayerShape, text_config
from hfsparse.models.loading import input_device
from hfsparse.models.names import text_decoder
from hfsparse.patcher.supported import ROPES
from hfsparse.plan import Plan
from hfsparse.runtime.extend import Extension, rotate
from hfsparse.runtime.layer_plan import layer_plan_of, observed

AT = 1000  # where a token is turned back from; its queries may differ by so much, relatively
NEAR = 0.05


def find_extensions(
    model: PreTrainedModel, plan: Plan, shapes: Sequence[LayerShape]
) -> dict[int, Extension]:
    """For each layer that sees whole rows, how the plan's `extend` turns its queries.

    PatchError: this can't be told of the model's rope.
    """
    if plan.extend is None:
        return {}
    found, config = {}, text_config(model)
    if hasattr(model.config, "vision_config"):
        raise _refusal(model, "it may hold images, whose tokens have other places")
    for index, shape in enumerate(shapes):
        if not shape.attends or shape.window is not None:
            continue  # a window is shorter than what a model was trained on
        rope = rope_of(config, shape.kind)
        inv_freq = _inv_freq(model, shape.kind)
        if why := next(_obstacles(shape, rope, inv_freq), None):
            raise _refusal(model, f"layer {index}: {why}")
        found[index] = Extension(plan.extend, inv_freq)
    return found


def _inv_freq(model: PreTrainedModel, kind: str) -> Tensor | None:
    """[n] radians a token, as the decoder's rope turns layers of a kind, if it says so."""
    rope = getattr(text_decoder(model), "rotary_emb", None)
    return getattr(rope, f"{kind}_inv_freq", getattr(rope, "inv_freq", None))


def _obstacles(shape: LayerShape, rope: dict[str, Any], inv_freq: Any) -> Iterator[str]:
    if shape.rank:
        yield "its cache holds latents (MLA)"
    if rope["rope_type"] not in ROPES:
        yield f"rope {rope['rope_type']} turns by a call's length"
    if not isinstance(inv_freq, Tensor):
        yield "its decoder has no rotary embedding that tells its frequencies"
    elif 2 * len(inv_freq) != shape.head_dim:
        yield f"rope turns {2 * len(inv_freq)} of a head's {shape.head_dim} dims"


@torch.no_grad()
def check_turns(model: PreTrainedModel, extensions: dict[int, Extension]) -> None:
    """PatchError unless queries of the patched model turn as rope says.

    One token by itself is read at two positions, which differ in nothing else. A model without
    weights is not looked at.
    """
    if any(each.inv_freq.is_meta for each in extensions.values()):
        return
    decoder, device = text_decoder(model), input_device(model)
    pad = getattr(decoder.get_input_embeddings(), "padding_idx", None)  # whose vector may be zero
    ids = torch.tensor([[int(pad == 0)]], device=device)
    seen: list[dict[int, Tensor]] = []
    for position in (0, AT):
        queries: dict[int, Tensor] = {}
        seen.append(queries)

        def observe(module, q: Tensor, *_, queries=queries) -> None:
            queries[layer_plan_of(module).index] = q

        at = torch.full_like(ids, position)
        with observed(model, observe):
            decoder(input_ids=ids, position_ids=at, use_cache=False)
    for index, extension in extensions.items():
        near, far = (queries[index].float() for queries in seen)
        angle = -AT * extension.inv_freq.double().to(far.device)
        if not (rotate(far, angle) - near).norm() < NEAR * near.norm():
            raise _refusal(model, f"layer {index} turns queries in another way than Llama's rope")


def _refusal(model: PreTrainedModel, why: str) -> PatchError:
    return PatchError(
        f"{type(model).__name__} can't be extended: {why}. Supported: rope of whole heads, as "
        f"Llama, Qwen and Mistral have it ({', '.join(ROPES)}). Leave extend out of the plan"
    )
