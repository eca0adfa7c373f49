"""What is asked of a family: is it accepted, right, undone, profiled, and how is it refused?

    answer = ask(entry)      # Answer(outcome="right", profile="works", …)

The truth is the stock model. Where heads stream it runs its own eager attention under a mask by
head, so that nothing of the model's (sinks, softcaps, scales, latents) is written a second time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

import hfsparse
from hfsparse.errors import first_line
from hfsparse.models.layers import layer_shapes
from hfsparse.models.names import text_decoder
from hfsparse.patcher.probe import attention_modules
from hfsparse.patcher.state import is_patched
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from tests.census.entries import Entry, build
from tests.patcher.families import left_padded, tokens
from tests.patcher.runs import forward, generate
from tests.tiny import tokenizer

NAME = "census"
LENGTH, PADS, NEW = 70, (0, 9), 12
PROFILED = 320  # tokens: a calibration prompt has 312 with the tiny tokenizer
RING = Streaming(sink=4, recent=16)
CLOSE, MOVED = 1e-4, 1e-3  # of logits: equal up to rounding; something was dropped
SENTENCE = re.compile(r"\w+ can't be patched: (?P<why>[^\n]{8,}?)\. Supported: [^\n]+")
CODE = re.compile(r"object has no attribute|NoneType|Traceback|<class|Error\b|\w+\(\)")


@dataclass(frozen=True)
class Answer:
    """What the census knows of a family."""

    outcome: str  # of OUTCOMES
    reason: str = ""
    profile: str = ""  # works, refused, crash; nothing where it was not asked
    profile_reason: str = ""
    kind: str = ""  # "hybrid" or "windowed", where it has no layer that could drop keys


class Wrong(Exception):
    """A patched model differs from the stock model, in words."""


def ask(entry: Entry) -> Answer:
    """All questions, in the order in which one makes the next meaningless."""
    try:
        model = build(entry)
    except Exception as error:  # a package that is missing, a class that wants more than a config
        return Answer("unbuilt", _shown(error))
    try:
        hfsparse.patch(model).undo()
    except hfsparse.Error as error:
        return _refusal(model, error)
    except Exception as error:  # what the census is for
        return Answer("crash", _shown(error))
    try:
        stock = _runs(model)
    except Exception as error:  # images, codes or boxes are wanted beside text
        return Answer("uncompared", f"the stock model: {_shown(error)}")
    kind = _kind(model)
    try:
        _check(model, stock)
    except Wrong as error:
        return Answer("wrong", str(error), kind=kind)
    except Exception as error:  # of the first call, ours or the model's
        return Answer("useless", _shown(error), kind=kind)
    return Answer("right", "", *_profiled(model), kind)


def _refusal(model: PreTrainedModel, error: Exception) -> Answer:
    if is_patched(model):
        return Answer("wrong", "patch raised, and left the model patched")
    told = SENTENCE.fullmatch(str(error))
    if told is None or CODE.search(told["why"]):
        return Answer("unexplained", _shown(error))
    return Answer("refused", told["why"])


def _check(model: PreTrainedModel, stock: list) -> None:
    """Full, streams, undo; raises Wrong, or whatever a call ends in."""
    before = forward(model, tokens(1, LENGTH)).logits
    with hfsparse.patch(model) as handle:
        _same("full", _runs(model), stock)
        whole = handle.stats().kv_bytes
    if (plan := streams(model)) is not None:
        with masked(model, plan):
            truth = _runs(model)
        with hfsparse.patch(model, plan) as handle:
            _same("streams", _runs(model), truth)
            kept = handle.stats().kv_bytes
        if not kept < whole:
            raise Wrong(f"streams: {kept} bytes of cache are held, {whole} without a plan")
        if _apart(truth[0].logits[0], stock[0].logits[0]) < MOVED:
            raise Wrong("streams: what was dropped doesn't show, so nothing was compared")
    if not torch.equal(forward(model, tokens(1, LENGTH)).logits, before):
        raise Wrong("undo: logits are not bit-equal")


def _runs(model: PreTrainedModel) -> list:
    """What the model says to a prompt, and to a left-padded batch."""
    ids, mask = left_padded(LENGTH, PADS)
    return [generate(model, tokens(1, LENGTH), new=NEW), generate(model, ids, mask, new=NEW)]


def _same(what: str, got: list, want: list) -> None:
    for ours, truth, prompt in zip(got, want, ("", ", left-padded"), strict=True):
        worst = max(map(_apart, ours.logits, truth.logits))
        if not worst <= CLOSE:  # NaN, too
            raise Wrong(f"{what}{prompt}: logits differ by {worst:.1e}")
        if ours.sequences.tolist() != truth.sequences.tolist():
            raise Wrong(f"{what}{prompt}: other tokens")


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _kind(model: PreTrainedModel) -> str:
    shapes = layer_shapes(model)
    if any(shape.has_state or not shape.attends for shape in shapes):
        return "hybrid"
    return "" if any(shape.free for shape in shapes) else "windowed"


def streams(model: PreTrainedModel) -> Plan | None:
    """Every second kv head a ring, in layers that may have any; None where there are none."""
    whole = Plan.full(ModelId.of(model))
    layers = [
        _second(words, at) if shape.free else words
        for at, (words, shape) in enumerate(zip(whole.layers, layer_shapes(model), strict=True))
    ]
    if layers == [*whole.layers]:
        return None
    plan = Plan(whole.model, {"s": RING}, tuple(layers), whole.below)
    plan.validate()
    return plan


def _second(words: Layer, at: int) -> Layer:
    """A layer's words with every second kv head a ring, and its q heads streaming."""
    q_heads, kv_heads = len(words.prefill), len(words.cache)
    rings = [(head + at) % 2 == 0 for head in range(kv_heads)]
    return Layer(
        tuple("s" if rings[head * kv_heads // q_heads] else "full" for head in range(q_heads)),
        tuple("s" if ring else "full" for ring in rings),
        tuple("ring" if ring else "full" for ring in rings),
    )


@contextmanager
def masked(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """The stock model, eager, whose streaming heads see first and last keys alone."""
    decoder = model.get_decoder()
    layers = attention_modules(text_decoder(model))
    AttentionInterface.register(NAME, partial(_attend, plan, layers))
    AttentionMaskInterface.register(NAME, eager_mask)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _attend(plan: Plan, layers: dict, module, query, key, value, attention_mask, *args, **kwargs):
    """The module's own eager attention; attention_mask `[B, 1, Q, K]` is of its own, too."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    streaming = torch.tensor([word != "full" for word in plan.layers[layers[module]].prefill])
    if streaming.any():
        Q, K = query.shape[2], key.shape[2]
        if attention_mask is None:
            attention_mask = query.new_zeros(len(query), 1, Q, K)
        start = (attention_mask[:, 0, -1] == 0).int().argmax(-1)[:, None, None, None]
        at, column = torch.arange(K - Q, K)[:, None], torch.arange(K)
        kept = (column - start < RING.sink) | (at - column < RING.recent)
        kept = kept | ~streaming[:, None, None]
        attention_mask = attention_mask.masked_fill(~kept, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, attention_mask, *args, **kwargs)


def _profiled(model: PreTrainedModel) -> tuple[str, str]:
    """What profile comes to, with budgets that a short prompt can meet."""
    budgets = dict(prefill_density=0.95, cache_share=0.95, decode_share=1.0)
    try:
        hfsparse.profile(
            model, tokenizer(), lengths=(PROFILED,), samples=2, verify=False, **budgets
        ).validate()
    except hfsparse.Error as error:
        return "refused", _shown(error)
    except Exception as error:  # what the census is for
        return "crash", _shown(error)
    return "works", ""


def _shown(error: Exception) -> str:
    """An error in a line: one of ours as it is, of another its class and first sentence."""
    text = re.sub(r"\s+", " ", first_line(error))
    if isinstance(error, hfsparse.Error):
        return text
    return f"{type(error).__name__}: {text.partition('. ')[0][:160]}"
