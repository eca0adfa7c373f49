"""Run a prompt through a model and show every layer's queries and keys to an observer, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfsparse.attention import Logits
from hfsparse.patcher import patch

Observer = Callable[[Any, Tensor, Tensor, Tensor, Logits], None]


@torch.inference_mode()
def capture(model: PreTrainedModel, ids: Tensor, observe: Observer) -> None:
    """One dense forward of ids `[1, L]`; `observe(module, q, k, v, logits)` is called layer by layer.

    q is `[1, Hq, L, D]`, k and v `[1, Hkv, L, D]`, post-RoPE. Nothing is kept: memory is one layer's.
    """
    with patch(model):
        decoder = model.get_decoder()
        for module in decoder.modules():
            plan = module.__dict__.get("_hfsparse")
            if module is not decoder and plan is not None:
                plan.observe = observe
        decoder(input_ids=ids.to(model.device), use_cache=False)
