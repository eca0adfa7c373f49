"""Arms: the dense model, plans, and peers, which stand in files of their own. A run has several.

Sparse(plan, "balanced")                hfsparse.patch(model, plan)
peer("kvpress:SnapKV:0.5")              a press of kvpress: half of a prompt's keys are dropped
peer("kvpress:SnapKV:0.5:agnostic")     the same, before the question is read
peer("modelopt:0.7")                    skip-softmax of nvidia-modelopt: 70 % of a prompt's tiles

A peer is one file with a subclass of `Arm`, which is called with its name on the command line and
the words after the first colon, and its line in PEERS.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from math import nan
from typing import Any, Protocol

from hfsparse.errors import UsageError


class Meter(Protocol):
    """Measures samples while an arm is on."""

    def begin(self, sample) -> None:
        """Start anew: `sample` runs next, alone or as the first of a batch.

        None stands for tokens that are no question, as perplexity reads them.
        """
        ...

    def stats(self):
        """What was measured since, with attributes as those of `hfsparse.Stats`; None: nothing."""
        ...


class Arm(Protocol):
    """What a run asks of an arm. What is the same for most is given here."""

    name: str  # of its result lines
    title: str  # in reports
    hash: str | None = None  # of its plan
    plan = None  # for probes that look into plans
    batches: bool = True  # whether it can run several padded prompts at once

    def check(self, model) -> None:
        """Raise UsageError or PlanError where this arm can't run `model`."""

    def prepare(self, tokenizer, lengths: Collection[int]) -> None:
        """Make ready for samples of these lengths; called before each round of samples."""

    def on(self, model) -> AbstractContextManager[Meter]:
        """A context in which `model` runs under this arm, and is as before once it ends."""
        ...

    def facts(self) -> dict:
        """What run.json keeps, so that a report can be written from its folder alone."""
        return {"arm": self.name, "plan": self.hash, "title": self.title}


class Dense(Arm):
    """The model as it was loaded, of which nothing is measured."""

    name = title = "dense"

    @contextmanager
    def on(self, model) -> Iterator[Meter]:
        yield self

    def begin(self, sample) -> None:
        pass

    def stats(self) -> None:
        return None


# What a report takes from `made.verified` of a plan, which hands may have edited.
PROMISE = {"limit": (int, float), "lengths": list, "told": str}


class Sparse(Arm):
    """The model patched with a plan."""

    name = "sparse"

    def __init__(self, plan, title: str = "sparse"):
        self.plan, self.title, self.hash = plan, title, plan.hash()

    def check(self, model) -> None:
        self.plan.check(model)

    @contextmanager
    def on(self, model) -> Iterator[Meter]:
        from hfsparse import patcher

        with patcher.patch(model, self.plan) as patched:
            yield PatchMeter(patched)

    def facts(self) -> dict:
        expected = {f"{n}": figures for n, figures in self.plan.expected.items()}
        verified = self.plan.verified
        promise = {
            n: verified[n] for n, kind in PROMISE.items() if isinstance(verified.get(n), kind)
        }
        return super().facts() | {"promise": promise, "expected": expected}


@dataclass(frozen=True)
class PatchMeter:
    """Measures by what `hfsparse.patch` gives."""

    handle: Any

    def begin(self, sample) -> None:
        self.handle.reset_stats()

    def stats(self):
        return self.handle.stats()


@dataclass(frozen=True)
class Peer:
    """Where an arm of another package stands, and how it is asked for."""

    distribution: str  # to install
    kind: str  # its class: file.Class
    form: str  # for errors
    examples: str  # for the help


PEERS = {  # by the package, with which a name on the command line begins
    "kvpress": Peer(
        "kvpress",
        "kvpress.KVPress",
        "kvpress:PRESS:RATIO[:agnostic], with the ratio of keys to drop",
        "kvpress:SnapKV:0.5[:agnostic]",
    ),
    "modelopt": Peer(
        "nvidia-modelopt",
        "modelopt.ModelOpt",
        "modelopt:SHARE, with the share of a prompt's tiles to skip",
        "modelopt:0.7",
    ),
}
FORMS = ", or ".join(peer.form for peer in PEERS.values())


def peer(name: str) -> Arm:
    """A peer by its name on the command line; UsageError where it can't be run here."""
    package, *words = name.split(":")
    if package not in PEERS:
        raise UsageError(f"unknown arm {name}: give {FORMS}")
    known = PEERS[package]
    if find_spec(package) is None:
        raise UsageError(
            f"arm {name}: {package} is not installed: pip install {known.distribution}"
        )
    _check_versions(name, known.distribution)
    file, kind = known.kind.split(".")
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


def read_share(name: str, word: str) -> float:
    """The share, 0 to below 1, that `word` of an arm's name says; else UsageError."""
    try:
        share = float(word)
    except ValueError:
        share = nan
    if not 0 <= share < 1:
        raise UsageError(f"arm {name}: {word} is no share from 0 to below 1")
    return share
