"""How many tokens a model can read, and at which lengths it is calibrated unless others are given.

most = limit(model)     # None: as many as there is memory for
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfsparse.errors import UsageError
from hfsparse.models.fingerprint import rope_of
from hfsparse.models.layers import CHUNKED, LINEAR, STATELESS
from hfsparse.models.loading import input_device
from hfsparse.models.names import text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORTEST = 256  # tokens of a calibration prompt
ROOMY = 512  # tokens in which its question and answer fit, whatever the tokenizer
OFFSET = 2  # a table of positions may have so many rows more than there are positions


def context_window(config: Any) -> int | None:
    """Tokens that a model of this config can read; None: its config sets no limit.

    It is `max_position_embeddings`, or what rope scaling makes of the length in training where that
    is more: the factor times as much with yarn, longrope and dynamic NTK, whose configs may leave
    `max_position_embeddings` at that length. Configs with other scaling name the scaled length.
    """
    config = config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or getattr(config, "alibi", False):
        return None
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    # These look no further than a window or a chunk.
    near = {"sliding_attention", CHUNKED, *LINEAR, *STATELESS}
    far = kinds - near
    return min(_reach(rope_of(config, kind), longest) for kind in far or kinds)


def _reach(scaling: dict, longest: int) -> int:
    trained = scaling.get("original_max_position_embeddings", longest)
    scaled = scaling["rope_type"] in ("yarn", "longrope", "dynamic")
    return max(longest, round(scaling.get("factor", 1) * trained)) if scaled else longest


def limit(model: PreTrainedModel, beyond: bool = False) -> int | None:
    """Tokens that `model` may be given, answers included; None: as many as there is memory for.

    With `beyond` its window is no limit. UsageError where nothing lies beyond it.
    """
    window = context_window(model.config)
    if not beyond or window is None:
        return window
    decoder = text_decoder(model)
    words = decoder.get_input_embeddings()
    tables = [
        m.weight for m in decoder.modules() if hasattr(m, "num_embeddings") and m is not words
    ]
    for table in (*tables, *decoder.buffers()):
        if table.ndim == 2 and window <= len(table) <= window + OFFSET:
            raise UsageError(
                f"this {type(model).__name__} can't go beyond its window of {window} tokens: it "
                "looks positions up in a table, which has no more of them"
            )
    return None


def calibration_lengths(model: PreTrainedModel) -> tuple[int, ...]:
    """Two lengths in tokens, for a model whose user named none; one where its window is short.

    The longer is half the model's window, at least 2,048 and at most 16,384; on a CPU it is 2,048.
    Neither passes the window.
    """
    window = context_window(model.config)
    on_cpu = input_device(model).type == "cpu"
    half = 16384 if window is None else window // 2
    longest = 2048 if on_cpu else max(2048, min(16384, half))
    longest = longest if window is None else min(longest, window)
    shortest = max(ROOMY, longest // (2 if on_cpu else 4))
    return tuple(sorted({min(shortest, longest), longest}))
