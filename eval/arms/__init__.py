"""The dense model and plans as arms of a run; peers stand in files of their own.

Sparse(plan, "balanced")                hfsparse.patch(model, plan)
peer("kvpress:SnapKV:0.5")              a press of kvpress: half of a prompt's keys are dropped
peer("kvpress:SnapKV:0.5:agnostic")     the same, before the question is read
peer("modelopt:0.7")                    skip-softmax of nvidia-modelopt: 70 % of a prompt's tiles
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from importlib import import_module, metadata
from importlib.util import find_spec
from math import nan

from hfsparse.errors import UsageError


class Arm:
    """The model as it was loaded; others change it for a while."""

    name = "dense"  # of its result lines
    title = "dense"  # in reports
    hash: str | None = None  # of its plan
    batches = True  # whether it can run several padded prompts at once

    def check(self, model) -> None:
        """Raise where this arm can't run `model`."""

    def prepare(self, tokenizer, lengths: Collection[int]) -> None:
        """Told of what will be run, before the first sample."""

    def on(self, model):
        """A context in which `model` runs under this arm: what measures it, or None."""
        return nullcontext()

    def ask(self, sample) -> None:
        """Told of each sample before it is run."""

    def facts(self) -> dict:
        """For run.json, so that a report can be written from its folder alone."""
        return {"arm": self.name, "plan": self.hash, "title": self.title}


# What a report takes from `made.verified` of a plan, which hands may have edited.
PROMISE = {"limit": (int, float), "lengths": list, "told": str}


class Sparse(Arm):
    """The model patched with a plan."""

    name = "sparse"

    def __init__(self, plan, title: str = "sparse"):
        self.plan, self.title, self.hash = plan, title, plan.hash()

    def check(self, model) -> None:
        self.plan.check(model)

    def on(self, model):
        from hfsparse import patcher

        return patcher.patch(model, self.plan)

    def facts(self) -> dict:
        expected = {f"{n}": figures for n, figures in self.plan.expected.items()}
        verified = self.plan.verified
        promise = {
            n: verified[n] for n, kind in PROMISE.items() if isinstance(verified.get(n), kind)
        }
        return super().facts() | {"promise": promise, "expected": expected}


# The package that a name on the command line begins with: its distribution, our class for it.
PEERS = {
    "kvpress": ("kvpress", "presses.KVPress"),
    "modelopt": ("nvidia-modelopt", "skips.ModelOpt"),
}
FORMS = (
    "kvpress:PRESS:RATIO[:agnostic], with the ratio of keys to drop, or modelopt:SHARE, with "
    "the share of a prompt's tiles to skip"
)


def peer(name: str) -> Arm:
    """A peer by its name on the command line; UsageError where it can't be run here."""
    package, *words = name.split(":")
    if package not in PEERS:
        raise UsageError(f"unknown arm {name}: give {FORMS}")
    distribution, ours = PEERS[package]
    if find_spec(package) is None:
        raise UsageError(f"arm {name}: {package} is not installed: pip install {distribution}")
    _check_versions(name, distribution)
    file, kind = ours.split(".")
    return getattr(import_module(f".{file}", __package__), kind)(name, words)


def _check_versions(name: str, package: str) -> None:
    """Raise where the transformers that is installed is none of those that a package wants."""
    from packaging.requirements import Requirement

    here = metadata.version("transformers")
    for requirement in map(Requirement, metadata.requires(package) or ()):
        wants, marker = requirement.specifier, requirement.marker
        if requirement.name != "transformers" or (marker and not marker.evaluate({"extra": ""})):
            continue
        if not wants.contains(here, prereleases=True):
            raise UsageError(
                f"arm {name}: {package} {metadata.version(package)} wants transformers {wants}, "
                f"here is {here}: run this arm in an environment of its own, with the same -o"
            )


def share(name: str, word: str) -> float:
    try:
        share = float(word)
    except ValueError:
        share = nan
    if not 0 <= share < 1:
        raise UsageError(f"arm {name}: {word} is no share from 0 to below 1")
    return share
