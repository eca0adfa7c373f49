"""Rows of a batch that have ended read no keys.

`generate` goes on until the last row has ended, and gives the others pad tokens, whatever comes of
them: from then on steps take these rows as empty. Logits and a cache that it hands out would show
it: where it returns more than tokens, or goes on with a cache that it was given, all rows read on.
So they do where a user's own processor may mix the scores of rows, criteria end them with other
tokens, a loop goes on behind the ends, or hooks look at what modules compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from hfsparse.models.names import find_cache
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.graphs.obstacles import has_hook, hooks_everywhere


def is_plain(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a `generate` that is given this looks at no more than tokens, and ends rows with the
    tokens that its config says."""
    own = kwargs.get("logits_processor") or kwargs.get("custom_generate") or len(args) > 2
    ends = any(hasattr(x, "eos_token_id") for x in kwargs.get("stopping_criteria") or ())
    return not own and not ends and find_cache(kwargs) is None


def shows_nothing(generation_config: Any) -> bool:
    """Whether a plain `generate` shows tokens alone, and those of rows that have ended are pads."""
    ends = generation_config._eos_token_tensor is not None
    return ends and not generation_config.return_dict_in_generate


def is_watched(model: nn.Module) -> bool:
    """Whether a user's hook may look at what rows compute."""
    return hooks_everywhere() or any(map(has_hook, model.modules()))


class Ended(LogitsProcessor):
    """Tells the layers of a cache which rows have ended. It changes no scores.

    It writes into one tensor, which a step under way may see before or after: rows that have ended
    stay so.
    """

    def __init__(self, layers: Sequence[CacheLayer], eos: Tensor):
        self.layers, self.eos = layers, eos
        self.rows: Tensor | None = None  # bool [B]; steps read it on the device

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(input_ids) == 1:  # `generate` ends with it
            return scores
        if self.rows is None:  # what a prompt ends with ends no row
            device = self.layers[0].device
            self.rows = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
            for layer in self.layers:
                layer.ended = self.rows
        else:
            ended = torch.isin(input_ids[:, -1], self.eos.to(input_ids.device))
            self.rows.logical_or_(ended.to(self.rows.device))
        return scores
