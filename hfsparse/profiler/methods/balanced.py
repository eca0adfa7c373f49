"""The `balanced` method, this project's own and the default: prefill, cache and decode at once.

One forward and backward pass a prompt measures every candidate on every head. What a head loses is
the first-order effect on the prompt's key tokens, in units of its mean over rings, and a little for
the share of attention that is missed; `allocate` takes one choice a head, of least total loss under
all budgets.

In decode two selectors compete: quest, whose pages cost little to rank, and lowrank, which ranks
single tokens and so finds what is needed in fewer keys, but reads more to rank them. Both are
priced by all that a step reads. In the cache an eviction, where one is asked for, competes with
rings by the bytes that are held; so do rings and full heads in fewer bits.

Losses are read off a line over the logarithm of the length, at the longest: a fixed count of tokens
that loses more in longer rows gives way to a share of the row, or to a window that grows
(`recent_per_token`). One length alone shows nothing of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hfsparse.errors import UsageError
from hfsparse.evictions import EVICTIONS
from hfsparse.lists import PAGE
from hfsparse.lists.packed import Bits
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.plan import ModelId
from hfsparse.plan.bits import FULL, name_in
from hfsparse.plan.kept import Full
from hfsparse.profiler.job import Found, Job
from hfsparse.profiler.measure.effects import Candidates
from hfsparse.profiler.methods import minference, one_pass
from hfsparse.profiler.settings import show_bits
from hfsparse.profiler.solve.allocation import Options
from hfsparse.selectors import SELECTORS
from hfsparse.selectors.quest import Quest

# Missed attention beside the effect: it decides between heads that no key token needs. At a weight
# of 1 it took full heads from those that find answers (benchmarks/results/methods.md).
MISSED = 0.1
SINK = 64
SHARES = (0.1, 0.2, 0.4)  # of the row: streaming windows, blocks, columns and diagonals
SMALL = 0.05  # another, where the row is long enough to show it
MASSES = (0.8, 0.9, 0.95)  # of the estimated attention: antidiagonal
RATES = (1 / 32, 1 / 16, 1 / 8)  # of the row: rings that grow
SELECTED = ("quest", "lowrank")  # the kinds of selectors
PAGES = (0.06, 0.12, 0.25, 0.5)  # of the row: selectors of whole pages
UNITS = (0.02, 0.06, 0.12, 0.25)  # of the row: selectors of smaller units, which need fewer keys
FEWEST = 4  # blocks and pages that are always kept
HELD = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the row: evictions


def plan(job: Job) -> Found:
    """Measure, fit over lengths, and allocate."""
    head_dim = ModelId.of(job.model).head_dim
    names = candidates(max(job.prompts), [offer(kind, head_dim) for kind in kinds_offered(job)])
    if job.settings.eviction is not None:
        names = replace(names, evictions=evictions(job.settings.eviction, max(job.prompts)))
    if few := [bits for bits in job.settings.bits or () if bits != 16]:
        names = in_bits(job, names, few)
    names = one_pass.calibrate_tables(job, one_pass.drop_slow(job, names))
    return one_pass.choose_plan(job, names, one_pass.measure_prompts(job, names), options)


def kinds_offered(job: Job) -> tuple[str, ...]:
    """The kinds of selectors that compete; none where nothing asks what fewer reads lose."""
    budget, settings = job.budget, job.settings
    if budget.decode == 1 and budget.loss is None and settings.curves is None:
        return ()
    return SELECTED if settings.selector is None else (settings.selector,)


def offer(kind: str, head_dim: int) -> Any:
    """A selector of this kind, for keys of so many channels."""
    selector = SELECTORS[kind]()
    sizes = [name for name in ("rank", "channels") if hasattr(selector, name)]
    return replace(selector, **{name: min(getattr(selector, name), head_dim) for name in sizes})


def candidates(longest: int, selectors: Sequence[Any] = (Quest(),)) -> Candidates:
    """What heads may choose from, for prompts of up to `longest` tokens.

    `selectors`: one of each kind, whose shares are set here.
    """
    near, shares = min(32, longest // 16), (SMALL, *SHARES)[longest < 4096 :]
    patterns = {f"grow{_percent(s)}": Streaming(SINK, near, s) for s in shares}
    patterns |= {f"blocks{_percent(s)}": BlockTopK(s, FEWEST) for s in shares}
    patterns |= {f"mass{_percent(m)}": Antidiagonal(m, max_share=0.6) for m in MASSES}
    for share in shares:
        columns, diagonals = round(longest * share * 0.8), round(longest * share * 0.15)
        patterns[f"vs{columns}x{diagonals}"] = VerticalSlash(columns, diagonals)
    rings = {f"ring{_percent(r)}": Streaming(SINK, near, r) for r in RATES}
    rings |= {f"last{n}": Streaming(SINK, n) for n in minference.windows(longest)}
    chosen = {}
    for each in selectors:
        shares = PAGES if each.budget.unit == PAGE else UNITS
        # Smaller ones read FEWEST pages, too.
        some = [s for s in shares if s * longest > (FEWEST - 0.5) * PAGE] or shares[-1:]
        for share in some:
            chosen[f"{each.kind}{_percent(share)}"] = replace(each, share=share, min_pages=FEWEST)
    return Candidates(patterns, rings, chosen)


def evictions(kind: str, longest: int) -> dict[str, Any]:
    """Evictions of this kind that leave a share of `longest` tokens each."""
    eviction, sizes = EVICTIONS[kind](), [round(longest * share) for share in HELD]
    window = min(eviction.window, sizes[0] // 2)
    return {f"{kind}{n}": replace(eviction, size=n, window=window) for n in sizes}


def in_bits(job: Job, names: Candidates, few: Sequence[Bits]) -> Candidates:
    """The candidates with full heads and rings that keep numbers in so few bits.

    UsageError for a model whose keys can't be in these.
    """
    shape = job.shape
    if shape.rank:
        raise UsageError(
            f"bits are {show_bits(few)}, and this model keeps latents (MLA), which stay in its own "
            "type: leave bits out"
        )
    if 4 in few and (odd := [d for d in (shape.head_dim, shape.value_dim) if d % 2]):
        raise UsageError(
            f"bits are {show_bits(few)}, and heads have {odd[0]} channels: two numbers of 4 bits "
            f"share a byte. Give {show_bits([16, *(bits for bits in few if bits != 4)])}"
        )
    rings, packed = {**names.rings}, {name_in(FULL, bits): Full(bits) for bits in few}
    for bits in few:
        rings |= {name_in(x, bits): replace(ring, bits=bits) for x, ring in names.rings.items()}
    return replace(names, rings=rings, packed=packed)


def options(
    means: Mapping[int, Mapping[str, np.ndarray]],
    names: Candidates,
    costs: Mapping[str, Any],
) -> Options:
    """Every candidate of every head, from measurements `[layers, candidates, heads]` by length.

    costs: what `one_pass.price_candidates` says of the longest.
    """
    longest = means[max(means)]
    layers, _, q_heads = longest["pattern_pairs"].shape
    kv_heads = longest["ring_pairs"].shape[2]
    group = q_heads // kv_heads

    def missed(kind: str) -> np.ndarray:
        return fit({n: 1 - t[f"{kind}_recall"] for n, t in means.items()})

    whole = [ring.bits == 16 for ring in names.rings.values()]
    unit = missed("ring")[:, whole].mean() or 1.0
    units = {n: t["ring_effect"][:, whole].mean() or 1.0 for n, t in means.items()}

    def loss(kind: str, heads: int = 1) -> np.ndarray:
        """By candidate and head; `heads` of them are one kv head."""
        effect = fit({n: t[f"{kind}_effect"] / units[n] for n, t in means.items()})
        return effect + MISSED * missed(kind) / unit / heads

    words = np.array(list(names.patterns), dtype=object)[None, :, None]
    return Options(
        prefill=np.broadcast_to(words, (layers, len(names.patterns), q_heads)),
        prefill_effect=loss("pattern", group),
        prefill_cost=longest["pattern_pairs"],
        rings=list(names.rings),
        ring_effect=loss("ring"),
        ring_cost=longest["ring_pairs"],
        selectors=list(names.selectors),
        page_effect=loss("page") if names.selectors else np.zeros((layers, 0, kv_heads)),
        evictions=list(names.evictions),
        evict_effect=loss("evict") if names.evictions else None,
        packed=list(names.packed),
        packed_effect=loss("bits") if names.packed else None,
        **costs,
    )


def fit(losses: Mapping[int, np.ndarray]) -> np.ndarray:
    """Losses at the longest length, on a line over the logarithm of the length that never falls.

    `losses` holds an array of any shape for each length in tokens.
    """
    at = np.log2(list(losses))
    at -= at.mean()
    values = np.stack(list(losses.values()))
    slope = np.tensordot(at, values, 1) / max((at**2).sum(), 1e-9)
    return values.mean(0) + np.maximum(slope, 0) * at.max()


def _percent(share: float) -> int:
    return round(100 * share)
