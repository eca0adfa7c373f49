"""The plan: how every head of a model attends, as a YAML file that people read, diff and share.

    plan = Plan.load("plan.yaml")     # PlanError names everything wrong, each with its line
    plan.check(model)                 # PlanMismatch if it was made for another model
    plan.save("copy.yaml")            # atomic

`rules` states what holds for any plan; `reader` and `writer` are its text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hfsparse import reading
from hfsparse.errors import MAX_PROBLEMS, PlanError, PlanMismatch, UsageError
from hfsparse.lists.packed import Bits, said
from hfsparse.models.classes import same_decoder
from hfsparse.models.layers import UNITS, layer_shapes
from hfsparse.plan.bits import find_units, in_bits
from hfsparse.plan.extend import DualChunk
from hfsparse.plan.files import DataFile
from hfsparse.plan.model_rules import model_rules
from hfsparse.plan.parts import (
    MAX_BYTES,
    Below,
    Layer,
    ModelId,
    Placed,
    parameters,
    version_of,
)
from hfsparse.plan.reader import Lines, read
from hfsparse.plan.rules import rules
from hfsparse.plan.words import nearest, show
from hfsparse.plan.writer import write
from hfsparse.writing import write_whole

ALLOWED = ("fingerprint",)  # what `allow` may name
NONE = "none"  # `made.verified.told` begins with it where verification could say nothing


class Origin(NamedTuple):
    """What a plan was read from, for errors: a copy that is changed has none."""

    name: str
    lines: Lines
    layers: tuple[Layer, ...]  # as they were read


@dataclass
class Plan:
    """How every head attends. `patterns` holds named pattern and selector instances.

    skip: in prompts, on full heads and on top of patterns, a tile of scores is left out where in
    each of its rows the largest lies more than that below the row's largest so far (skip-softmax;
    BLASST, arXiv 2512.12087, whose threshold is e^-skip). None computes every tile that is kept.
    data: tables that selectors name by their parameter `data`, in files beside the plan.
    extend: how rows longer than the model was trained on are read; None: as any other.
    """

    model: ModelId
    patterns: dict[str, Any]
    layers: tuple[Layer, ...]
    below: Below = field(default_factory=Below)
    expected: dict[int, dict[str, float]] = field(default_factory=dict)
    measured: dict = field(default_factory=dict)
    made: dict = field(default_factory=dict)
    skip: float | None = None  # prompts: a tile's distance (nats) below the running maximum
    data: dict[str, DataFile] = field(default_factory=dict)
    extend: DualChunk | None = None
    origin: Origin | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def full(cls, model: ModelId) -> Plan:
        """The plan that drops nothing."""
        kv = ("full",) * model.kv_heads
        return cls(model, {}, (Layer(("full",) * model.q_heads, kv, kv),) * model.layers)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read a plan file and the tables beside it; PlanError names everything wrong with them."""
        try:
            text = reading.content(path, MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            why = reading.why(error)
            raise PlanError(
                f"{path}: can't read it: {why}. Give a plan file, or a name that hfsparse plans "
                "lists"
            ) from error
        file = reading.local(path)
        folders = dict.fromkeys((file.parent, file.resolve().parent))  # a link lies elsewhere
        return cls._read(text, str(path), folders)

    @classmethod
    def loads(cls, text: str | bytes) -> Plan:
        """Read a plan from its YAML alone, not the tables beside it.

        PlanError names everything wrong with it.
        """
        return cls._read(text, "plan")

    @classmethod
    def _read(cls, text: str | bytes, name: str, *folders: Iterable[Path]) -> Plan:
        parts, lines = read(text, name, *folders)
        plan = cls(**parts)
        plan.origin = Origin(name, lines, plan.layers)
        return plan

    def dumps(self) -> str:
        """The plan as YAML, one line a layer or a range of equal layers."""
        self.validate()
        text = write(vars(self))
        if (size := len(text.encode())) > MAX_BYTES:
            raise PlanError(
                f"plan takes {size} bytes of YAML, over {MAX_BYTES}: "
                "keep large data in a file beside it"
            )
        return text

    def save(self, path: str | os.PathLike) -> None:
        """Write the whole file or, on failure, leave what was there untouched.

        Its tables are written beside it first, each under its name; where another content has that
        name, which is never overwritten, under one that no content but this has.
        """
        self.validate()
        try:
            target = Path(os.path.realpath(reading.local(path)))
            placed = {name: each.placed(target.parent) for name, each in self.data.items()}
            text = dataclasses.replace(self, data=placed).dumps().encode()
            for each in placed.values():
                each.write(target.parent)
            write_whole(target, text)
        except PlanError:
            raise
        except (OSError, ValueError) as error:
            why = reading.why(error)
            raise PlanError(f"{path}: can't write it: {why}. Give another path") from error

    def validate(self) -> None:
        """Raise PlanError naming every rule that this plan breaks."""
        if problems := list(islice(rules(vars(self)), MAX_PROBLEMS)):
            raise PlanError.of("plan", problems)

    def with_bits(self, bits: Bits, model_or_config: Any) -> Plan:
        """The plan with its caches in so many bits a number: 16, 8, 4 or "fp8".

        Heads that can't be in fewer stay as they are (`bits.find_units`). What was measured and
        proved of this plan is no part of the other, nor is the share of the cache that it expects.
        PlanError for another model, and where no kv head can be in so many.
        """
        self.check(model_or_config)
        units = [*find_units(self.layers, self.patterns, layer_shapes(model_or_config))]
        if not units:
            raise PlanError(
                f"no kv head of this plan can keep its keys in {said(bits)}: latents (MLA), "
                "windows of a model's own, evictions, keys in host memory, means and segments need "
                "16. Use the plan as it is"
            )
        layers, patterns = in_bits(self.layers, self.patterns, bits, units)
        words = {w for each in layers for w in (*each.prefill, *each.cache, *each.decode)}
        expected = {
            length: {name: x for name, x in figures.items() if not name.startswith("cache_share")}
            for length, figures in self.expected.items()
        }
        made = {name: x for name, x in self.made.items() if name != "verified"}
        found = dataclasses.replace(
            self,
            layers=layers,
            patterns={name: each for name, each in patterns.items() if name in words},
            expected=expected,
            measured={},
            made=made | {"in_bits": {"bits": bits, "of": self.hash()[:19]}},
        )
        found.validate()
        found.check(model_or_config)
        return found

    @property
    def verified(self) -> dict:
        """What the profiler's proof found; empty if none ran, or if a hand wrote no mapping."""
        found = self.made.get("verified")
        return found if isinstance(found, dict) else {}

    @property
    def without_attention(self) -> frozenset[int]:
        """The layers that have no attention, as far as `made` names them (of hybrids)."""
        found = self.made.get("no_attention")
        return frozenset(n for n in found if type(n) is int) if type(found) is list else frozenset()

    @property
    def unproved(self) -> str | None:
        """Why verification could say nothing of this plan, if it ran and couldn't."""
        said, _, why = str(self.verified.get("told")).partition(": ")
        return why if said in (NONE, "nothing") else None  # as plans of 0.1 said it

    def table_of(self, selector: Any) -> dict[str, Tensor] | None:
        """The table that a selector names by its parameter `data`; None where it has none.

        PlanError: the table is not known, as where the plan was read from text alone.
        """
        if (name := getattr(selector, "data", None)) is None:
            return None
        if name not in self.data:
            raise PlanError(f"{selector.kind} reads data {name}, which the plan does not have")
        try:
            return self.data[name].tensors
        except PlanError as error:
            raise PlanError(f"data.{name}: {error}") from error

    def hash(self) -> str:
        """Identity of what is computed: `expected`, `measured` and `made` are left out."""
        identity = {
            "version": version_of(self.data, self.extend),
            "model": dataclasses.asdict(self.model),
            "patterns": {name: parameters(pattern) for name, pattern in self.patterns.items()},
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "below": dataclasses.asdict(self.below),
        }
        if self.skip is not None:
            whole = type(self.skip) is int and abs(self.skip) < 2**63
            identity["skip"] = float(self.skip) if whole else self.skip
        if self.data:
            identity["data"] = {name: each.sha256 for name, each in self.data.items()}
        if self.extend is not None:
            identity["extend"] = parameters(self.extend)
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()

    def check(self, model_or_config: Any, allow: Collection[str] = ()) -> None:
        """Raise PlanMismatch for another model; `allow={"fingerprint"}` compares only the shape.

        A multimodal model and its text half are one model.
        PlanError names everything else at once, with the line of a plan that was read: layers that
        would drop keys and have a window of their own, or none; words for layers with chunks of
        their own; a layer that reads another's keys and asks for other ones; a selector's table
        that has not one row for each layer and kv head.
        """
        self._check_identity(model_or_config, allow)
        shapes, line_of = layer_shapes(model_or_config), self._line_of()
        of_layers = model_rules(self.layers, self.model, self.patterns, shapes, line_of)
        found = [*self._table_rules(), *islice(of_layers, MAX_PROBLEMS)]
        if problems := [(line_of(*path), text) for path, text in found]:
            raise PlanError.of(self.origin.name if self.origin else "plan", problems)

    def _line_of(self) -> Callable[..., int | None]:
        """The lines of the file that its layers were read from."""
        if self.origin is None or self.origin.layers is not self.layers:
            return lambda *path: None
        return self.origin.lines.of

    def _table_rules(self) -> Iterator[Placed]:
        """Tables that are read are `[layers, kv heads, ...]`."""
        wanted = self.model.layers, self.model.kv_heads
        readers = (each for each in self.patterns.values() if hasattr(each, "data"))
        for name, kind in {reader.data: reader.kind for reader in readers}.items():
            each = self.data.get(name)
            if each is None or each.content is None:
                continue
            for part, tensor in each.tensors.items():
                if tensor.shape[:2] != wanted:
                    yield (
                        ("data", name),
                        f"data.{name}: {part} has shape {[*tensor.shape]}, the model has "
                        f"{wanted[0]} layers of {wanted[1]} kv heads: give a table whose first "
                        f"dimensions are these; hfsparse profile MODEL --selector {kind} makes one",
                    )

    def _check_identity(self, model_or_config: Any, allow: Collection[str]) -> None:
        names = _allowed_names(allow)
        ours, theirs = self.model, ModelId.of(model_or_config)
        renew = "Profile this model: hfsparse profile <model> -o plan.yaml"
        or_allow = ', or use the plan all the same: patch(..., allow={"fingerprint"})'
        alike = same_decoder(ours.class_name, theirs.class_name)
        if differ := [key for key in UNITS if getattr(ours, key) != getattr(theirs, key)]:
            have = " with " + ", ".join(f"{getattr(ours, key)} {UNITS[key]}" for key in differ)
            found = " with " + ", ".join(str(getattr(theirs, key)) for key in differ)
        elif "fingerprint" in names or (alike and ours.fingerprint == theirs.fingerprint):
            return
        elif not alike:
            have, found = "", ""
            renew += ", where commands load another class hfsparse.profile(model, tokenizer)"
            renew += or_allow
        else:
            have = f" with fingerprint {ours.fingerprint}"
            found = f" with {theirs.fingerprint}: its rope, window or layer kinds differ"
            renew += or_allow
        raise PlanMismatch(
            f"plan was made for {ours.class_name}{have}; "
            f"this model is {theirs.class_name}{found}. {renew}"
        )


def _allowed_names(allow: Any) -> Collection[str]:
    """The names in `allow`, one or several; UsageError for one that means nothing."""
    names = [allow] if isinstance(allow, str) or not isinstance(allow, Collection) else allow
    for name in names:
        if name not in ALLOWED:
            raise UsageError(f"unknown name {show(name)} in allow: {nearest(name, ALLOWED)}")
    return names
