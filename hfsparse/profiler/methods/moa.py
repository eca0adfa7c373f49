"""The `moa` method: a span alpha + beta * N for each q head (MoA, arXiv 2406.14909).

One backward pass a prompt shows what each rule costs each head (`influence`). An integer programme
gives every head a rule, at most two a layer, within a bound of density at each length. It is solved
for the loss at each length, with the losses at the others bounded in steps; of the plans that no
other beats at every length, that with the least loss at a longer, unseen length is taken.

What differs from the publication, and why:
- A span follows its query's position, recent + recent_per_token * p, so that prompts in one piece
  and in chunks read the same keys. So alpha is 128 or more, never negative.
- Heads of a GQA group keep their own rules in prompts, and their kv head's ring holds the widest;
  the cache has its own bound at each length. The two rules of a layer are nested (one is longer at
  every position), so the widest holds all that the group reads.
- A density is the share of causal query-key pairs, bounded from above only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from hfsparse.errors import UsageError
from hfsparse.lists import BlockLists, Grid, default_block
from hfsparse.models.loading import input_device
from hfsparse.models.window import context_window
from hfsparse.patcher.figures import Prompts, one_head
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler.job import Forecast, Found, Job
from hfsparse.profiler.measure.influence import BLOCK, measure_costs, measure_losses
from hfsparse.profiler.methods.one_pass import patterns_in_use
from hfsparse.profiler.parts import mark
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.profiler.solve.allocation import Infeasible
from hfsparse.profiler.solve.elastic import Programme, pareto

SINK, LEAST = 64, 128  # tokens: the sink, and the shortest alpha
STEPS = 8  # of alpha, up to the longest prompt; and of beta, up to 1
UNSEEN = 4  # prompts of the last choice, at most


def plan(job: Job) -> Found:
    """Measure influence, solve, and choose by the loss at an unseen length."""
    unseen = _choose_unseen_length(job)
    each = make_rules(max(job.prompts))
    tables = {n: Table.of(each, n, job) for n in sorted({*job.prompts, unseen})}
    found = measure_influences(job, each)
    programme = Programme(
        found[:, job.free],
        np.array([table.pairs for table in tables.values()]),
        np.array([table.held for table in tables.values()]),
        find_crossing(each),
        ModelId.of(job.model).kv_heads,
        job.budget,
    )
    name = mark(found, [table.held for table in tables.values()], job.budget)
    try:
        choices = job.parts.get(f"pareto-{name}", lambda: {"rules": pareto(programme)})["rules"]
    except Infeasible as error:
        raise UsageError(f"{error}. Give larger budgets, or longer --lengths") from None
    patterns = dict(zip(map(_name_rule, each[:-1]), each[:-1], strict=True))
    expect = Forecast(job, patterns, partial(_look_up_prompts, each=each, tables=tables))
    plans = [_make_plan(job, each, choice) for choice in choices]
    best = _choose_best(job, plans, unseen)
    best.expected = expect(best.layers)
    rules_of = choices[plans.index(best)]  # [free layers, q heads]
    lost = np.take_along_axis(programme.scaled.sum(0), rules_of[..., None], 2)
    suspects = job.spread(lost.reshape(len(lost), best.model.kv_heads, -1).sum(2))
    return Found(best, expect, suspects=suspects)


def make_rules(longest: int) -> list[Streaming | None]:
    """Rules shorter than prompts of `longest` tokens, by alpha and then beta; None: everything."""
    step = max(BLOCK, longest // STEPS // BLOCK * BLOCK)
    alphas = sorted({LEAST, *(a for a in range(step, longest, step) if a > LEAST)})
    lines = [(a, b / STEPS) for a in alphas for b in range(STEPS)]
    return [Streaming(SINK, a, b) for a, b in lines if a + b * longest < longest] + [None]


def find_crossing(each: list[Streaming | None]) -> np.ndarray:
    """Pairs of rules `[rules, rules]` neither of which holds the other."""
    lines = [(r.recent, r.recent_per_token) if r else (np.inf, np.inf) for r in each]
    alpha, beta = np.array(lines).T
    wider = (alpha[:, None] > alpha) & (beta[:, None] < beta)
    return wider | wider.T


def share_dropped(rule: Streaming | None, length: int) -> np.ndarray:
    """Share of the causal pairs of each block `[n, n]` that a rule drops, n = ceil(L / BLOCK)."""
    n = -(-length // BLOCK)
    if rule is None:
        return np.zeros((n, n), np.float32)
    query, first = np.arange(length)[:, None], np.arange(n) * BLOCK
    low = np.maximum(query - rule.band.span(query) + 1, rule.sink)  # first key read after the sink
    lost = (np.minimum(low, first + BLOCK) - np.maximum(rule.sink, first)).clip(0)
    seen = (np.minimum(query + 1, first + BLOCK) - first).clip(0)
    rows = np.arange(0, length, BLOCK)
    lost, seen = (np.add.reduceat(t, rows, axis=0) for t in (lost, seen))
    return (lost / seen.clip(1)).astype(np.float32)


@dataclass(frozen=True)
class Table:
    """What each rule costs at one length, as shares [rules] of what full attention does."""

    pairs: np.ndarray  # of a prompt
    blocks: np.ndarray
    held: np.ndarray  # of the cache

    @classmethod
    def of(cls, each: list[Streaming | None], n: int, job: Job) -> Table:
        grid = Grid.causal(1, n, default_block(n, input_device(job.model)))
        lists = [r and BlockLists.of(grid, 1, band=r.band) for r in each]
        pairs = [
            1.0 if b is None else float(b.pairs()[0, 0].float() / grid.pairs()[0]) for b in lists
        ]
        blocks = [1.0 if b is None else float(b.blocks()[0, 0] / grid.blocks()[0]) for b in lists]
        held = [one_head(n, rule)[0] for rule in each]
        return cls(np.array(pairs), np.array(blocks), np.array(held))


def measure_influences(job: Job, each: list[Streaming | None]) -> np.ndarray:
    """Mean over prompts of the cost `[lengths, layers, q heads, rules]` of each rule."""
    name = mark(each)
    rows = [(n, i, prompt) for n, some in job.prompts.items() for i, prompt in enumerate(some)]
    found: dict[int, list[np.ndarray]] = {n: [] for n in job.prompts}
    lost = {n: np.stack([share_dropped(rule, n) for rule in each]) for n in job.prompts}
    for n, i, prompt in job.progress((f"{row[2].name}, {row[0]} tokens", row) for row in rows):

        def measure(n=n, prompt=prompt) -> dict[str, np.ndarray]:
            return {"cost": measure_costs(job.model, prompt, lost[n])}

        found[n].append(job.parts.get(f"influence-{name}-{n}-{i}", measure)["cost"])
    return np.array([np.mean(some, axis=0, dtype=float) for some in found.values()])


def _choose_unseen_length(job: Job) -> int:
    """Twice the longest prompt where the model's window has room, else the longest again."""
    longest = max(job.prompts)
    window = context_window(job.model.config) or longest
    return 2 * longest if 2 * longest <= window else longest


def _make_plan(job: Job, each: list[Streaming | None], choice: np.ndarray) -> Plan:
    """The plan of rules `[free layers, q heads]`; a kv head keeps what its widest head reads."""
    this = ModelId.of(job.model)
    widest = choice.reshape(len(choice), this.kv_heads, -1).max(2)  # rules of a layer are nested
    words = np.array([_name_rule(rule) for rule in each], dtype=object)
    reads = np.array(["ring" if rule else "full" for rule in each], dtype=object)
    taken = (
        Layer(tuple(words[prefill]), tuple(words[kept]), tuple(reads[kept]))
        for prefill, kept in zip(choice, widest, strict=True)
    )
    layers = job.fill(taken)
    patterns = patterns_in_use(dict(zip(words[:-1], each[:-1], strict=True)), layers)
    return Plan(this, patterns, layers, job.below)


def _name_rule(rule: Streaming | None) -> str:
    return "full" if rule is None else f"a{rule.recent}b{rule.recent_per_token:g}"


def _look_up_prompts(
    layers: tuple[Layer, ...], each: list[Streaming | None], tables: dict[int, Table]
) -> dict[int, Prompts]:
    """What these layers do in prompts, by length."""
    at = {_name_rule(rule): i for i, rule in enumerate(each)}
    heads = np.array([[at[word] for word in layer.prefill] for layer in layers])
    return {n: Prompts(table.pairs[heads], table.blocks[heads]) for n, table in tables.items()}


def _choose_best(job: Job, plans: list[Plan], length: int) -> Plan:
    """The plan of least loss on prompts that influence was not measured on."""
    seed, count = job.settings.seed + 1, min(UNSEEN, min(map(len, job.prompts.values())))
    prompts = make_prompts(job.tokenizer, length, count, seed)
    every = [Plan.full(plans[0].model), *plans]
    name = mark(*(each.hash() for each in every), seed, length)
    found = []
    rows = ((f"{p.name}, {length} tokens", (i, p)) for i, p in enumerate(prompts))
    for i, prompt in job.progress(rows):

        def look(prompt=prompt) -> dict[str, np.ndarray]:
            return {"loss": measure_losses(job.model, prompt, every)}

        found.append(job.parts.get(f"loss-{name}-{i}", look)["loss"])
    dense, *sparse = np.mean(found, axis=0).tolist()
    best = plans[int(np.argmin(sparse))]
    best.made = {
        "chosen": {
            "plans": len(plans),
            "length": length,
            "unseen_length": length not in job.prompts,
            "prompts": count,
            "seed": seed,
            "loss": round(min(sparse), 6),
            "dense_loss": round(dense, 6),
        }
    }
    return best
