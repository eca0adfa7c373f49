"""What a model computes, holds and reads, as shares of what it does without a plan.

One definition for `Patched.stats()`, a plan's `expected`, `hfsparse eval` and `hfsparse check`:
what all heads did together, over what dense attention of the same model does, within its own
sliding windows. A head counts by its work, and layers without attention count nowhere
(docs/figures.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import isnan, nan

FIGURES = ("pair_density", "block_density", "cache_share", "decode_share")
FREE = "of the layers without a window of their own"  # those that a plan may change


@dataclass(frozen=True)
class Work:
    """By head: what was done, and what dense attention does."""

    done: Sequence[float] = ()
    dense: Sequence[float] = ()

    @classmethod
    def joined(cls, parts: Sequence[Work]) -> Work:
        """Of the heads of all parts."""
        return cls(
            [x for each in parts for x in each.done], [x for each in parts for x in each.dense]
        )

    @classmethod
    def added(cls, parts: Sequence[Work], whole: bool) -> Work:
        """Of the same heads, in all parts. whole: dense attention is told by each of all parts."""
        done, dense = (
            [*map(sum, zip(*each, strict=True))]
            for each in ([part.done for part in parts], [part.dense for part in parts])
        )
        return cls(done, parts[0].dense if whole else dense)

    @property
    def shares(self) -> list[float]:
        """nan where dense attention does nothing: nothing ran."""
        return [a / b if b else nan for a, b in zip(self.done, self.dense, strict=True)]


@dataclass(frozen=True)
class LayerStats:
    """One layer; for a layer without attention all is empty but its state."""

    pairs: Work = Work()  # per q head: query-key pairs of prompts
    blocks: Work = Work()  # per q head: key blocks computed for prompts
    reads: Work = Work()  # per kv head: keys read by decode steps
    cache: Work = Work()  # per kv head: bytes that hold tokens, page summaries included
    kv_bytes: Sequence[int] = ()  # per kv head: bytes allocated, room for later tokens included
    cut: Sequence[int] = ()  # per q head: query blocks that a pattern's max_share cut short
    tiles: Work = Work()  # per q head: tiles of prompts skipped, of those that lists kept
    window: int | None = None  # the model's own sliding window, in tokens
    evicting: int = 0  # kv heads that keep what an eviction chose
    host_bytes: Sequence[int] = ()  # per kv head: bytes allocated in host memory, in no other field
    units: Work = Work()  # per kv head in host memory: units that the GPU held, of those read
    state_bytes: int = 0  # of a linear layer's state, which no plan changes: in no share

    @classmethod
    def joined(cls, parts: Sequence[LayerStats]) -> LayerStats:
        """One layer, whose heads are those of its parts, in their order."""
        heads = {"evicting": sum(each.evicting for each in parts)}
        for field in fields(cls):
            found = [getattr(each, field.name) for each in parts]
            if isinstance(field.default, Work):
                heads[field.name] = Work.joined(found)
            elif field.default == ():
                heads[field.name] = [x for own in found for x in own]
        return replace(parts[0], **heads)

    @classmethod
    def added(cls, parts: Sequence[LayerStats]) -> LayerStats:
        """One layer, whose tokens are those of its parts: all tell of each head. Keys that dense
        attention reads and keeps each part tells of all."""
        found = {}
        for field in fields(cls):
            each = [getattr(part, field.name) for part in parts]
            if isinstance(field.default, Work):
                found[field.name] = Work.added(each, field.name in ("reads", "cache"))
            elif field.default == ():
                found[field.name] = [*map(sum, zip(*each, strict=True))]
        return replace(parts[0], **found)

    @property
    def pair_density(self) -> list[float]:
        return self.pairs.shares

    @property
    def block_density(self) -> list[float]:
        return self.blocks.shares

    @property
    def decode_share(self) -> list[float]:
        return self.reads.shares

    @property
    def skipped(self) -> list[float]:
        return self.tiles.shares


@dataclass
class Drafts:
    """Of exact mode: what the plan drafted, and how much of it `generate` went on with."""

    drafted: int = 0  # tokens a row
    accepted: int = 0
    steps: int = 0  # of the whole model, each over a token and its drafts

    def reset(self) -> None:
        self.drafted = self.accepted = self.steps = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens; nan where none were."""
        return self.accepted / self.drafted if self.drafted else nan


@dataclass(frozen=True)
class Stats:
    """Densities since the last reset, and the cache after the last call that had one.

    Each figure is a share of the whole model's dense attention, nan where nothing ran.
    """

    layers: Sequence[LayerStats]
    drafts: Drafts | None = None  # in exact mode, where `decode_share` is of drafting steps
    whose: str = ""  # heads or tokens these are, where it is not all

    @classmethod
    def joined(cls, parts: Sequence[Stats]) -> Stats:
        """Of one model, whose heads are those of its parts, in their order."""
        layers = zip(*(each.layers for each in parts), strict=True)
        return cls([LayerStats.joined(each) for each in layers])

    @classmethod
    def added(cls, parts: Sequence[Stats]) -> Stats:
        """Of one model, whose tokens are those of its parts; what several hold counts for each."""
        layers = zip(*(each.layers for each in parts), strict=True)
        return cls([LayerStats.added(each) for each in layers])

    @property
    def pair_density(self) -> float:
        return _share(layer.pairs for layer in self.layers)

    @property
    def block_density(self) -> float:
        return _share(layer.blocks for layer in self.layers)

    @property
    def cache_share(self) -> float:
        return _share(layer.cache for layer in self.layers)

    @property
    def decode_share(self) -> float:
        return _share(layer.reads for layer in self.layers)

    @property
    def skipped(self) -> float:
        return _share(layer.tiles for layer in self.layers)

    @property
    def kv_bytes(self) -> int:
        return sum(sum(layer.kv_bytes) for layer in self.layers)

    @property
    def host_bytes(self) -> int:
        return sum(sum(layer.host_bytes) for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        """Of what steps read of pages in host memory: the share that the GPU held."""
        return _share(layer.units for layer in self.layers)

    @property
    def kv_bytes_dense(self) -> int:
        return sum(sum(layer.cache.dense) for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def free(self) -> Stats:
        """The same of the layers without a window of their own, which a plan may change."""
        return Stats([layer for layer in self.layers if layer.window is None])

    @property
    def parts(self) -> dict[str, Stats]:
        """The whole model and, if other layers have attention, too, what is `free`; by what the
        names of their figures end in."""
        kinds = {layer.window is None for layer in self.layers if layer.reads.dense}
        return {"": self, "_free": self.free} if len(kinds) > 1 else {"": self}

    @property
    def known(self) -> dict[str, float]:
        """Those of FIGURES that something is known of, rounded."""
        found = {name: getattr(self, name) for name in FIGURES}
        return {name: round(value, 4) for name, value in found.items() if not isnan(value)}

    def figures(self) -> dict[str, float]:
        """What is known of each part, as a plan holds it."""
        parts = self.parts.items()
        return {f"{name}{end}": x for end, part in parts for name, x in part.known.items()}

    def __str__(self) -> str:
        mib = 1 << 20
        held = sum(sum(layer.cache.done) for layer in self.layers)
        head = f"{self.whose}: " if self.whose else ""
        head += (
            f"{self._densities}, cache {held / mib:.1f} of "
            f"{self.kv_bytes_dense / mib:.1f} MiB ({_show(self.cache_share)})"
        )
        if evicting := sum(layer.evicting for layer in self.layers):
            head += f", {evicting} kv heads evict: "
            head += "what they keep was chosen before any later question"
        if self.host_bytes:
            head += f", {self.host_bytes / mib:.1f} MiB in host memory"
        if not isnan(self.hit_rate):
            head += f", {_show(self.hit_rate)} of what is read of it found on the GPU"
        if self.state_bytes:
            head += f", states of linear layers {self.state_bytes / mib:.1f} MiB"
        if not isnan(self.skipped):
            head += f", {_show(self.skipped)} of the kept tiles skipped"
        if drafts := self.drafts:
            head += f", drafts accepted {_show(drafts.acceptance)} ({drafts.accepted} of "
            head += f"{drafts.drafted} tokens, {drafts.steps} verifying steps)"
        if free := self.parts.get("_free"):
            head += f"\n{FREE}: {free._densities}, cache share {_show(free.cache_share)}"
        rows = [
            f"{i:>5}  {_list(layer.pair_density)}  {_list(layer.block_density)}  "
            f"{_list(layer.decode_share)}  {' '.join(f'{b / 1024:.0f}' for b in layer.cache.done)}"
            for i, layer in enumerate(self.layers)
            if layer.kv_bytes
        ]
        title = "layer  pair density (q heads)  block density  decode share (kv heads)  KiB"
        return "\n".join([head, title, *rows])

    @property
    def _densities(self) -> str:
        return (
            f"pair density {_show(self.pair_density)}, block density {_show(self.block_density)}, "
            f"decode share {_show(self.decode_share)}"
        )


def _share(works: Iterator[Work]) -> float:
    sums = [(sum(work.done), sum(work.dense)) for work in works]
    done, dense = (sum(each) for each in zip(*sums, strict=True)) if sums else (0, 0)
    return done / dense if dense else nan


def _show(share: float) -> str:
    return "-" if isnan(share) else f"{share:.3f}"


def _list(shares: list[float]) -> str:
    return " ".join("-" if isnan(share) else f"{share:.2f}" for share in shares)
