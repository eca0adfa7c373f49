"""What a suite is run under: the dense model, plans, and peers where they are installed.

Sparse(plan, "balanced")                hfsparse.patch(model, plan)
peer("kvpress:SnapKV:0.5")              a press of kvpress: half of a prompt's keys are dropped
peer("kvpress:SnapKV:0.5:agnostic")     the same, before the question is read
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module, metadata
from importlib.util import find_spec
from math import nan
from types import SimpleNamespace

import torch

import hfsparse
from hfsparse.loading import UsageError


class Arm:
    """The model as it was loaded; others change it for a while."""

    name = "dense"  # of its result lines
    title = "dense"  # in reports
    hash: str | None = None  # of its plan
    batches = True  # whether it can run several padded prompts at once

    def on(self, model):
        """A context in which `model` runs under this arm: what measures it, or None."""
        return nullcontext()

    def check(self, model) -> None:
        """Raise where this arm can't run `model`."""

    def ask(self, sample) -> None:
        """Told of each sample before it is run."""

    def facts(self) -> dict:
        """For run.json, so that a report can be written from its folder alone."""
        return {"arm": self.name, "plan": self.hash, "title": self.title}


class Sparse(Arm):
    """The model patched with a plan."""

    name = "sparse"

    def __init__(self, plan, title: str = "sparse"):
        self.plan, self.title, self.hash = plan, title, plan.hash()

    def check(self, model) -> None:
        self.plan.check(model)

    def on(self, model):
        return hfsparse.patch(model, self.plan)

    def facts(self) -> dict:
        expected = {f"{n}": figures for n, figures in self.plan.expected.items()}
        verified = self.plan.made.get("verified") or {}
        promise = {
            name: verified[name] for name in ("limit", "lengths", "told") if name in verified
        }
        return super().facts() | {"promise": promise, "expected": expected}


class KVPress(Arm):
    """A press of NVIDIA's kvpress: prompts are computed densely, then keys are dropped.

    kvpress knows no padding, so samples run one at a time.
    """

    batches = False
    form = "kvpress:PRESS:RATIO or kvpress:PRESS:RATIO:agnostic, with the ratio of keys to drop"

    def __init__(self, name: str, words: list[str]):
        self.name = self.title = name
        self.agnostic = words[2:] == ["agnostic"]
        named = re.fullmatch(r"(\w+?)(?:\((\w+)\))?", words[0]) if words else None
        if named is None or len(words) < 2 or (len(words) > 2 and not self.agnostic):
            raise UsageError(f"arm {name}: give {self.form}")
        self.press, self.inner = named.groups()
        self.ratio = _share(name, words[1])
        self._make()  # names what is wrong before a model is loaded

    def on(self, model):
        self.pressed = Pressed(model, self._make())
        return self.pressed.on()

    def ask(self, sample) -> None:
        self.pressed.first = sample.question if self.agnostic else len(sample.ids)

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
    """Splits the forward pass of a prompt: a first part, whose keys are pressed, and the rest."""

    def __init__(self, model, press):
        self.model, self.press, self.forward = model, press, model.forward
        self.first = 0  # tokens of that part
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

    def reset_stats(self) -> None:
        self.cache = None

    def stats(self) -> SimpleNamespace:
        """Densities against dense attention; bytes as held at the end.

        Presses that only mask keys (AdaKV) keep them all.
        """
        layers = self.cache.layers
        heads = layers[0].keys.shape[1]
        held = [layer.keys.shape[2] for layer in layers]
        dropped = [self.prompt + self.new - tokens for tokens in held]
        masked = [
            len(at[0]) / heads if (at := getattr(layer, "masked_key_indices", None)) else 0
            for layer in (block.self_attn for block in self.model.model.layers)
        ]
        read = [1 - (d + m) / self.prompt for d, m in zip(dropped, masked, strict=True)]
        later = self.prompt - self.first
        gone = (1 - sum(read) / len(read)) * self.prompt * later
        each = [layer.keys.nbytes + layer.values.nbytes for layer in layers]
        dense = sum(b * (n + d) / n for b, n, d in zip(each, held, dropped, strict=True))
        return SimpleNamespace(
            pair_density=1 - gone / (self.prompt * (self.prompt + 1) / 2),
            block_density=nan,
            decode_share=sum(read) / len(read),
            cache_share=sum(each) / dense,
            kv_bytes=sum(each),
        )


PEERS = {"kvpress": KVPress}


def peer(name: str) -> Arm:
    """A peer by its name on the command line; UsageError where it can't be run here."""
    package, *words = name.split(":")
    if package not in PEERS:
        raise UsageError(f"unknown arm {name}: give {'; '.join(p.form for p in PEERS.values())}")
    if find_spec(package) is None:
        raise UsageError(f"arm {name}: {package} is not installed: pip install {package}")
    _check_versions(name, package)
    return PEERS[package](name, words)


def _check_versions(name: str, package: str) -> None:
    """Raise where the transformers that is installed is none of those that a package wants."""
    from packaging.requirements import Requirement

    here = metadata.version("transformers")
    for requirement in map(Requirement, metadata.requires(package) or ()):
        wants = requirement.specifier
        if requirement.name == "transformers" and not wants.contains(here, prereleases=True):
            raise UsageError(
                f"arm {name}: {package} {metadata.version(package)} wants transformers {wants}, "
                f"here is {here}: run this arm in an environment of its own, with the same -o"
            )


def _share(name: str, word: str) -> float:
    try:
        share = float(word)
    except ValueError:
        share = nan
    if not 0 <= share < 1:
        raise UsageError(f"arm {name}: {word} is no share from 0 to below 1")
    return share
