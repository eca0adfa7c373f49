"""The `duo` method: which kv heads need their whole past, by trained gates (arXiv 2410.10819).

Each kv head has a gate between full and streaming attention. With frozen weights the gates learn to
keep the dense model's last hidden states where passkeys are answered, while an L1 term draws them
to 0. A new text with passkeys each step, hidden in the calibration prompts' own text; AdamW with
the published rates. Training stops once the ranking of heads is stable. Heads of highest gates stay
full, as many as the budgets allow; the others become rings. Or one of `proxies` ranks them, without
training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from random import Random

import numpy as np
import torch
from scipy.stats import spearmanr

from hfsparse.errors import UsageError
from hfsparse.lists import BlockLists, Grid, default_block
from hfsparse.patcher.figures import Prompts, one_head
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler.job import Forecast, Found, Job
from hfsparse.profiler.measure import proxies
from hfsparse.profiler.measure.capture import check_gradients
from hfsparse.profiler.measure.gates import distil
from hfsparse.profiler.measure.modes import isolate_modes
from hfsparse.profiler.methods.one_pass import patterns_in_use
from hfsparse.profiler.parts import mark
from hfsparse.profiler.prompts.passkeys import Passkeys, hide

TRAINED, DEPLOYED = Streaming(128, 256), Streaming(64, 256)
RATE, L1 = 0.02, 0.05  # of AdamW; weight of the mean gate beside the squared distance
STEPS, PIECE = 400, 20  # of training at most (published: 2,000), and between checkpoints
# Training ends when the ranks of a checkpoint and of the one before correlate so well, so many
# times in a row.
STABLE, TIMES = 0.99, 3

Arrays = dict[str, np.ndarray]


def plan(job: Job) -> Found:
    """Rank the kv heads of `job.free` layers, and keep as many full as the budgets allow."""
    count, proxy = count_full_heads(job), job.settings.proxy
    ranks, trained = measure_proxies(job), None
    if not proxy:
        *_, trained = train_gates(job)
    rank = trained[0]["gates"] if trained else ranks[proxy]
    full = keep_top(rank, ranks["error"], count)
    made = {"ring": [DEPLOYED.sink, DEPLOYED.recent], "ranked_by": proxy or "gates"}
    if trained:
        made |= _describe_training(*trained, ranks, full)
    found = plan_rings(job, full, DEPLOYED, made | {"full_heads": count})
    return replace(found, suspects=job.spread(rank))


def _describe_training(state: Arrays, steady: int, ranks: Arrays, full: np.ndarray) -> dict:
    """For `made`: how training went, and how its ranking agrees with those of the proxies."""
    count = int(full.sum())
    return {
        "steps": int(state["step"]),
        "train_seconds": round(float(state["seconds"]), 1),
        "stable": steady >= TIMES,
        "distance": round(float(state["distance"]), 6),
        "rank_correlation": {
            name: correlate_ranks(state["gates"], rank) for name, rank in ranks.items()
        },
        "same_full_heads": {
            name: int((full & keep_top(rank, rank, count)).sum()) for name, rank in ranks.items()
        },
    }


# ---- training


def train_gates(job: Job) -> Iterator[tuple[Arrays, int]]:
    """Each checkpoint, and how many times in a row the ranking was stable by then."""
    check_gradients(job.model)
    this = ModelId.of(job.model)
    shape = int(job.free.sum()), this.kv_heads
    state: Arrays = {name: np.zeros(shape, np.float32) for name in ("exp_avg", "exp_avg_sq")}
    state |= {"gates": np.ones(shape, np.float32), "step": np.array(0), "seconds": np.array(0.0)}
    steady, name = 0, mark(TRAINED, RATE, L1, STEPS, PIECE)
    ends = [min(end, STEPS) for end in range(PIECE, STEPS + PIECE, PIECE)]
    for end in job.progress((f"gates, step {end}, at most {STEPS}", end) for end in ends):
        before = state["gates"]
        state = job.parts.get(f"{name}-gates-{end}", partial(advance, job, state, end))
        same = correlate_ranks(before, state["gates"])
        warm = end > STEPS // 5
        steady = steady + 1 if warm and same is not None and same >= STABLE else 0
        yield state, steady
        if steady == TIMES:
            return


@isolate_modes
@torch.enable_grad()
def advance(job: Job, state: Arrays, end: int) -> Arrays:
    """Gates and AdamW's state after step `end`, from a checkpoint before it."""
    start, distance = time.time(), 0.0
    gates = torch.nn.Parameter(torch.from_numpy(state["gates"].copy()))
    optimizer = torch.optim.AdamW([gates], lr=RATE, weight_decay=0)
    moments = {name: torch.from_numpy(state[name].copy()) for name in ("exp_avg", "exp_avg_sq")}
    first = int(state["step"])
    done = torch.tensor(float(first), dtype=torch.float32, device="cpu")
    optimizer.state[gates] = {"step": done, **moments}
    for step in range(first, end):
        keys = make_passkeys(job, f"step {step}")
        optimizer.zero_grad()
        (L1 * gates.abs().mean()).backward()
        distance = distil(job.model, gates, keys.ids, keys.rows, TRAINED)
        if not np.isfinite(distance):
            raise UsageError(
                f"step {step}: the distance to the dense model is {distance}; load the model in "
                "bfloat16 or float32"
            )
        optimizer.param_groups[0]["lr"] = RATE * scale_rate(step)
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
    moments = {name: optimizer.state[gates][name].numpy() for name in moments}
    seconds = float(state["seconds"]) + time.time() - start
    numbers = {"step": end, "seconds": seconds, "distance": distance}
    return {
        "gates": gates.detach().numpy(),
        **moments,
        **{name: np.array(value) for name, value in numbers.items()},
    }


def scale_rate(step: int) -> float:
    """Share of the rate: up in the first fifth of the steps, down in the last, never below 0.1."""
    fifth = max(1, STEPS // 5)
    return min(1.0, max((step + 1) / fifth, 0.1), max((STEPS - step) / fifth, 0.1))


def make_passkeys(job: Job, what: str) -> Passkeys:
    """New passkeys in the text of a calibration prompt, the same for the same job and `what`."""
    prompts = [p for each in job.prompts.values() for p in each]
    plain = [p for p in prompts if p.answer_span is None] or prompts
    rng = Random(f"hfsparse duo {what} {job.settings.seed}")
    return hide(job.tokenizer, rng.choice(plain).ids[0].tolist(), rng)


# ---- ranking


def measure_proxies(job: Job) -> Arrays:
    """Mean of each proxy `[layers, Hkv]` over as many texts with passkeys as there are prompts."""
    count, name = sum(map(len, job.prompts.values())), mark(DEPLOYED, proxies.ROWS)
    found = [
        job.parts.get(
            f"{name}-proxies-{i}",
            lambda i=i: proxies.measure_proxies(
                job.model, make_passkeys(job, f"proxy {i}"), DEPLOYED
            ),
        )
        for i in job.progress((f"proxies, text {i + 1} of {count}", i) for i in range(count))
    ]
    return {name: np.mean([each[name] for each in found], 0) for name in proxies.PROXIES}


def correlate_ranks(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's, over all heads; None where all of either are equal."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return round(float(spearmanr(a.ravel(), b.ravel()).statistic), 4)


def keep_top(rank: np.ndarray, then: np.ndarray, count: int) -> np.ndarray:
    """bool [layers, Hkv]: the `count` highest by `rank`, of equal ones the highest by `then`."""
    order = np.lexsort((-then.ravel(), -rank.ravel()))
    kept = np.zeros(rank.size, bool)
    kept[order[:count]] = True
    return kept.reshape(rank.shape)


# ---- the plan


def count_full_heads(job: Job) -> int:
    """How many kv heads may stay full for every budget to be met at the longest length."""
    heads = int(job.free.sum()) * ModelId.of(job.model).kv_heads
    longest, at, limits = max(job.prompts), job.cache_length, job.budget.limits
    ring = price_ring(longest, DEPLOYED, job.model.device)
    ring["cache_share"] = one_head(at, DEPLOYED)[0]
    shares = {  # the budget, what a full head costs, and at how many tokens
        "pair_density": (limits["pairs"], 1.0, longest),
        "cache_share": (limits["cache"], one_head(at)[0], at),
        "decode_share": (limits["decode"], 1.0, longest),
    }
    counts = [heads]
    for name, (budget, full, tokens) in shares.items():
        if ring[name] > budget:
            raise UsageError(
                f"a ring of {DEPLOYED.sink} + {DEPLOYED.recent} tokens alone has {name} "
                f"{ring[name]:.3f} at {tokens} tokens, over the budget of {budget:.5g}. Give "
                "larger budgets, or longer --lengths"
            )
        if budget < full:
            counts.append(int((budget - ring[name]) / (full - ring[name]) * heads + 1e-9))
    return min(counts)


def price_ring(
    length: int, ring: Streaming, device: torch.device | None = None
) -> dict[str, float]:
    """Shares of dense attention that a ring head costs at `length` tokens."""
    grid = Grid.causal(1, length, default_block(length, device))
    lists = BlockLists.of(grid, 1, band=ring.band)
    kept, read = one_head(length, ring)
    return {
        "pair_density": float(lists.pairs().float() / grid.pairs()),
        "block_density": float(lists.blocks() / grid.blocks()),
        "cache_share": kept,
        "decode_share": read,
    }


def _look_up_prompts(
    layers: tuple[Layer, ...], costs: dict[int, dict[str, float]]
) -> dict[int, Prompts]:
    """What a choice of full heads and rings does in prompts, by length."""
    full = np.array([[word == "full" for word in layer.prefill] for layer in layers])
    shares = ("pair_density", "block_density")
    return {n: Prompts(*(np.where(full, 1.0, of[x]) for x in shares)) for n, of in costs.items()}


def plan_rings(job: Job, full: np.ndarray, ring: Streaming, made: dict) -> Found:
    """The plan in which kv heads stream but for those in `full`, bool [free layers, Hkv]."""
    this = ModelId.of(job.model)
    group, taken = this.q_heads // this.kv_heads, []
    for kept in full:
        cache = tuple("full" if each else "stream" for each in kept)
        prefill = tuple(word for word in cache for _ in range(group))
        taken.append(Layer(prefill, cache, tuple("full" if each else "ring" for each in kept)))
    layers = job.fill(taken)
    costs = {n: price_ring(n, ring, job.model.device) for n in job.prompts}
    patterns = {"stream": ring}
    expect = Forecast(job, patterns, partial(_look_up_prompts, costs=costs))
    used = patterns_in_use(patterns, layers)
    return Found(Plan(this, used, layers, job.below, expect(layers), made=made), expect)
