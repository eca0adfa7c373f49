"""What do kv heads lose that evict, beside rings that hold as many bytes?

    python -m benchmarks.studies.evictions MODEL [--length 1024] [--shares 0.25 0.5] [--texts 24]
        [--samples 4] [--seed 0] [--out FOLDER]

Plans at each share of the cache's bytes: what `balanced` chooses for the cache from rings, and from
rings and one kind of eviction; and each kind alike on all kv heads. Caches alone are compared: all
prompts are read densely (a plan's rings would stream in them), then each head holds what it would
hold, and the answer to a question about the text is read. The question is the prompt's end, or
comes later: then it has no say in what is kept, and all of it is held. The table has the nats a
token that right answers lost against dense, means over texts with their 95 % interval; texts whose
answer costs the dense model more than KNOWN nats a token are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.common.ends import Text, ended
from benchmarks.common.journal import Journal
from hfsparse.evictions import EVICTIONS, Eviction
from hfsparse.evictions.eviction import best_keys
from hfsparse.interval import interval
from hfsparse.lists import Grid
from hfsparse.models.loading import load
from hfsparse.patcher.figures import predict
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler.job import Job
from hfsparse.profiler.methods import balanced, one_pass
from hfsparse.profiler.run import prepare
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.verify.trials import TASKS, make_trial
from hfsparse.runtime.cache.ring import SLACK

KNOWN = 2.0  # nats a token that an answer costs the dense model, at most
OFFERED = ("snapkv",)  # beside rings


def choose_plans(job: Job, shares: list[float]) -> Iterator[tuple[str, Plan]]:
    """What `balanced` takes for the cache alone; all candidates are measured in one go."""
    length = max(job.prompts)
    offer = {kind: balanced.evictions(kind, length) for kind in OFFERED}
    names = balanced.candidates(length)
    names = replace(
        names,
        patterns=dict(islice(names.patterns.items(), 1)),
        selectors=dict(islice(names.selectors.items(), 1)),
        evictions={name: each for some in offer.values() for name, each in some.items()},
    )
    means, every = one_pass.measure_prompts(job, names), list(names.evictions)
    for share in shares:
        for kind, some in {None: {}, **offer}.items():
            own = replace(names, evictions=some)
            at = [every.index(name) for name in some]
            part = {
                n: {name: t[:, at] if name.startswith("evict") else t for name, t in found.items()}
                for n, found in means.items()
            }
            budget = replace(job.budget, cache=share)
            found = one_pass.choose_plan(replace(job, budget=budget), own, part, balanced.options)
            yield f"{share:g} balanced: rings{f' or {kind}' if kind else ''}", found.plan


def like_plans(model: ModelId, length: int, shares: list[float]) -> Iterator[tuple[str, Plan]]:
    """All kv heads alike."""
    for share in shares:
        size = round(share * length)
        recent = size - balanced.SINK - SLACK
        yield (
            f"{share:g} all: ring",
            of_heads(model, Streaming(balanced.SINK, recent), "ring", "it"),
        )
        for kind, each in EVICTIONS.items():
            window = min(each().window, size // 2)
            yield (
                f"{share:g} all: {kind}",
                of_heads(model, each(size=size, window=window), "kept", "full"),
            )


def of_heads(model: ModelId, kept, read: str, prefill: str) -> Plan:
    layer = Layer((prefill,) * model.q_heads, ("it",) * model.kv_heads, (read,) * model.kv_heads)
    return Plan(model, {"it": kept}, (layer,) * model.layers)


@dataclass
class Caches:
    """What the heads of a plan hold at the end of a text; scores are shared among plans."""

    plan: Plan
    text: Text
    scores: dict

    def weights(self, layer: int, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        (R, S), group = logits.shape[1:], q.shape[1] // k.shape[1]
        row, key = torch.arange(S - R, S)[:, None], torch.arange(S)
        held = torch.ones(k.shape[1], R, S, dtype=torch.bool)
        for g, word in enumerate(self.plan.layers[layer].cache):
            kept = self.plan.patterns.get(word)
            if isinstance(kept, Streaming):
                held[g] = (key < kept.sink) | (key >= kept.band.start(row))
            elif kept is not None:
                held[g, :, : self.text.k[layer].shape[2]] = self.kept(layer, kept, q.shape[3])[g]
        return logits.masked_fill(~held.repeat_interleave(group, 0), -torch.inf).softmax(-1)

    def kept(self, layer: int, eviction: Eviction, dim: int) -> Tensor:
        """Keys [Hkv, S] of what was read densely."""
        q, k = self.text.q[layer], self.text.k[layer]
        n, kind = k.shape[2], replace(eviction, size=eviction.window + 1)
        if n <= eviction.size:
            return torch.ones(k.shape[1], n, dtype=torch.bool)
        if (layer, kind) not in self.scores:
            q = q[:, :, max(0, n - (kind.watched or n)) :]
            grid = Grid(torch.tensor([q.shape[2]]), torch.tensor([n]), q.shape[2], n)
            self.scores[layer, kind] = kind.scores(q, k, grid, dim**-0.5)
        whole, left = torch.tensor([n]), torch.tensor([eviction.size])
        best = best_keys(eviction, self.scores[layer, kind], whole, left, eviction.size)[0]
        return torch.zeros(k.shape[1], n, dtype=torch.bool).scatter_(1, best, True)


def make_texts(model, tokenizer, length: int, count: int, seed: int) -> Iterator[tuple[str, Text]]:
    """Facts hidden in a text, one of which is asked for; tasks alternate."""
    for i in range(count):
        made = make_trial(tokenizer, length, i % len(TASKS), seed + i // len(TASKS))
        yield f"{made.task} {i}", Text(model, made.text, *made.turns[0])


def ask(text: Text, plans: dict[str, Plan]) -> dict[str, float]:
    """Nats a token under each plan, and of dense."""
    scores, found = {}, {"dense": text.dense}
    if found["dense"] <= KNOWN:
        found |= {name: text.read(Caches(plan, text, scores)) for name, plan in plans.items()}
    return {name: round(nats, 5) for name, nats in found.items()}


def tabulate(log: Journal, names: Iterable[str], held: dict[str, float]) -> Iterator[str]:
    rows = {name: row for name, row in log.rows.items() if row["end"]["dense"] <= KNOWN}
    yield f"{len(rows)} texts, {len(log.rows) - len(rows)} left out"
    yield ""
    yield "| cache | share | nats lost, question at the end | question later |"
    yield "| --- | --- | --- | --- |"
    for name in names:
        cells = []
        for mode in ("end", "later"):
            lost = [row[mode][name] - row[mode]["dense"] for row in rows.values()]
            low, high = interval(lost)
            cells.append(f"{sum(lost) / len(lost):.3f} [{low:.3f}, {high:.3f}]")
        yield f"| {name} | {held[name]:.3f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=4, help="prompts that choose")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load(args.model, "cpu", "float32")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    made = f"{args.length} tokens, seed {args.seed}, {versions}"
    log = Journal(args.out and args.out / "texts.jsonl", made)
    settings = Settings(
        out=args.out and args.out / "plan.yaml",
        samples=args.samples,
        prefill_density=1.0,
        decode_share=1.0,
        seed=args.seed,
        verify=False,
        progress=True,
    )
    job, this = prepare(model, tokenizer, settings, (args.length,)), ModelId.of(model)
    plans = dict(choose_plans(job, args.shares)) | dict(like_plans(this, args.length, args.shares))
    held = {n: predict(model.config, p, args.length).cache_share for n, p in plans.items()}
    for name, plan in plans.items():
        words = [word for layer in plan.layers for word in layer.cache]
        counts = ", ".join(f"{words.count(word)} {word}" for word in sorted({*words}))
        print(f"{name}: {counts}", flush=True)
    with ended(model):
        every = make_texts(model, tokenizer, args.length, args.texts, args.seed + 1)
        for i, (name, text) in enumerate(every):
            end = ask(text, plans)
            text.forget_given()
            log.row(name, lambda text=text, end=end: {"end": end, "later": ask(text, plans)})
            if i > 1:
                print("\n".join(["", *tabulate(log, plans, held)]), flush=True)


if __name__ == "__main__":
    main()
