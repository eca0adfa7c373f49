"""What a patched model computed and holds, against dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, nan


@dataclass(frozen=True)
class LayerStats:
    """One layer. Densities are shares of dense attention, nan where nothing ran.

    All are empty for a layer without attention.
    """

    pair_density: list[float]  # per q head: query-key pairs of prompts
    block_density: list[float]  # per q head: blocks computed for prompts
    decode_share: list[float]  # per kv head: keys read by decode steps
    kv_bytes: list[int]  # per kv head: cache bytes allocated, page summaries included
    cut: list[int]  # per q head: query blocks that a pattern's max_share cut short
    skipped: list[float]  # per q head: tiles of prompts skipped, of those that lists kept


@dataclass(frozen=True)
class Stats:
    """Densities since the last reset, and the cache after the last call that had one."""

    layers: list[LayerStats]
    kv_bytes_dense: int

    @property
    def pair_density(self) -> float:
        return _mean(d for layer in self.layers for d in layer.pair_density)

    @property
    def block_density(self) -> float:
        return _mean(d for layer in self.layers for d in layer.block_density)

    @property
    def decode_share(self) -> float:
        return _mean(d for layer in self.layers for d in layer.decode_share)

    @property
    def skipped(self) -> float:
        return _mean(d for layer in self.layers for d in layer.skipped)

    @property
    def kv_bytes(self) -> int:
        return sum(sum(layer.kv_bytes) for layer in self.layers)

    @property
    def cache_share(self) -> float:
        return self.kv_bytes / self.kv_bytes_dense if self.kv_bytes_dense else nan

    def __str__(self) -> str:
        mib = 1 << 20
        head = (
            f"pair density {_show(self.pair_density)}, block density {_show(self.block_density)}, "
            f"decode share {_show(self.decode_share)}, cache {self.kv_bytes / mib:.1f} of "
            f"{self.kv_bytes_dense / mib:.1f} MiB ({_show(self.cache_share)})"
        )
        if not isnan(self.skipped):
            head += f", {_show(self.skipped)} of the kept tiles skipped"
        rows = [
            f"{i:>5}  {_list(layer.pair_density)}  {_list(layer.block_density)}  "
            f"{_list(layer.decode_share)}  {' '.join(f'{b / 1024:.0f}' for b in layer.kv_bytes)}"
            for i, layer in enumerate(self.layers)
            if layer.kv_bytes
        ]
        title = "layer  pair density (q heads)  block density  decode share (kv heads)  KiB"
        return "\n".join([head, title, *rows])


def _mean(values) -> float:
    known = [value for value in values if not isnan(value)]
    return sum(known) / len(known) if known else nan


def _show(share: float) -> str:
    return "-" if isnan(share) else f"{share:.3f}"


def _list(shares: list[float]) -> str:
    return " ".join("-" if isnan(share) else f"{share:.2f}" for share in shares)
