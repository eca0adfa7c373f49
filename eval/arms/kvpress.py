"""Presses of NVIDIA's kvpress as arms."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from math import nan
from types import SimpleNamespace

import torch

from hfsparse.errors import UsageError
from hfsparse.lists import Grid
from hfsparse.models.layers import layer_shapes
from hfsparse_eval.arms import FORMS, Arm, read_share


class KVPress(Arm):
    """A press of NVIDIA's kvpress: prompts are computed densely, then keys are dropped.

    kvpress knows no padding, so samples run one at a time.
    """

    batches = False

    def __init__(self, name: str, words: list[str]):
        self.name = self.title = name
        self.agnostic = words[2:] == ["agnostic"]
        named = re.fullmatch(r"(\w+?)(?:\((\w+)\))?", words[0]) if words else None
        if named is None or len(words) < 2 or (len(words) > 2 and not self.agnostic):
            raise UsageError(f"arm {name}: give {FORMS}")
        self.press, self.inner = named.groups()
        self.ratio = read_share(name, words[1])
        self._make()  # names what is wrong before a model is loaded

    def on(self, model) -> AbstractContextManager[Pressed]:
        return Pressed(model, self._make(), self.agnostic).on()

    def _make(self):
        outer = self._class(self.press)
        ratio = {"compression_ratio": self.ratio}
        if self.inner is None:
            return outer(**ratio)
        return outer(press=self._class(self.inner)(**ratio))

    def _class(self, word: str):
        """A press by its name without `Press`: those that score keys, and wrappers of one."""
        try:
            kvpress = import_module("kvpress")
        except ImportError as error:
            raise UsageError(f"arm {self.name}: kvpress can't be imported: {error}") from error
        wraps = word == self.press and self.inner is not None
        wanted = "press" if wraps else "compression_ratio"
        known = {
            kind.removesuffix("Press"): press
            for kind, press in vars(kvpress).items()
            if kind.endswith("Press")
            and issubclass(press, kvpress.BasePress)
            and wanted in inspect.signature(press).parameters
        }
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"arm {self.name}: kvpress has no {'wrapper' if wraps else 'press'} {word} that "
                f"this can run: did you mean {near}? ({', '.join(sorted(known))})"
            )
        return known[word]


class Pressed:
    """Splits the forward pass of a prompt: a first part, whose keys are pressed, and the rest.

    agnostic: the first part ends where the question begins; else it is the whole prompt.
    """

    def __init__(self, model, press, agnostic: bool = False):
        self.model, self.press, self.forward = model, press, model.forward
        self.agnostic = agnostic
        self.first = 0  # tokens of the first part
        self.cache = None

    @contextmanager
    def on(self) -> Iterator[Pressed]:
        @functools.wraps(self.forward)
        def forward(input_ids=None, **more):
            cache = more.get("past_key_values")
            if cache is None or not cache.get_seq_length():
                return self._prompt(input_ids, cache)
            self.new += input_ids.shape[1]
            return self.forward(input_ids=input_ids, **more)

        self.model.forward = forward
        try:
            yield self
        finally:
            del self.model.forward

    def _prompt(self, ids, cache):
        places = torch.arange(ids.shape[1], device=ids.device)
        more = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        with self.press(self.model):
            out = self.forward(
                input_ids=ids[:, : self.first], cache_position=places[: self.first], **more
            )
        self.cache, self.prompt, self.new = cache, ids.shape[1], 0
        if self.first < self.prompt:
            rest = places[None, self.first :]  # true positions; the cache's own length masks
            out = self.forward(input_ids=ids[:, self.first :], position_ids=rest, **more)
        return out

    def begin(self, sample) -> None:
        self.first = sample.question if self.agnostic else len(sample.ids)
        self.cache = None

    def stats(self) -> SimpleNamespace:
        """Densities against dense attention, over all layers; bytes as held at the end.

        Presses that only mask keys (AdaKV) keep them all. What a window of the model's own drops,
        no press did.
        """
        layers = self.cache.layers
        heads, total = layers[0].keys.shape[1], self.prompt + self.new
        own = [shape.window for shape in layer_shapes(self.model)]
        kept = [total if window is None else min(window - 1, total) for window in own]
        held = [layer.keys.shape[2] for layer in layers]
        dropped = [stock - tokens for stock, tokens in zip(kept, held, strict=True)]
        masked = [
            len(at[0]) / heads if (at := getattr(layer, "masked_key_indices", None)) else 0
            for layer in (block.self_attn for block in self.model.model.layers)
        ]
        gone = sum(dropped) + sum(masked)
        pairs = sum(int(Grid.causal(1, self.prompt, window=window).pairs()) for window in own)
        seen = sum(min(window or total, self.prompt) for window in own)
        each = [layer.keys.nbytes + layer.values.nbytes for layer in layers]
        dense = sum(b * n / tokens for b, n, tokens in zip(each, kept, held, strict=True))
        return SimpleNamespace(
            pair_density=1 - gone * (self.prompt - self.first) / pairs,
            block_density=nan,
            decode_share=1 - gone / seen,
            cache_share=sum(each) / dense,
            kv_bytes=sum(each),
        )
