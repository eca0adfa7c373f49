"""Could a decode step read with the attention weights of an earlier layer (arXiv 2407.12866)?

    python -m benchmarks.studies.shared_attention MODEL [--length 1024] [--texts 6] [--seed 0]

A layer that borrows weights needs no keys: it reads half of the bytes. Beside it the same layers
follow `reuse`, which reads chosen pages of keys and values: those that quest chose in the layer
that lends. Each text is read densely but for its end; the end is what decode steps read: the answer
to a question about the text, or the last PROSE tokens of prose. A layer borrows from the nearest
one before it that doesn't, head by head or of the head most like it on other texts. The tables have
the nats a token lost against dense, means over texts with their 95 % interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.ends import Text, ended
from hfsparse.interval import interval
from hfsparse.models.loading import load
from hfsparse.profiler.measure.effects import pages_read
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.profiler.verify.trials import TASKS, make_trial
from hfsparse.selectors.quest import Quest

PROSE = 64
RETRIEVAL = (("numbers", "prose"), ("retrieval", "prose"), ("retrieval", "code"))
SHARES = (0.5, 0.25)  # of the row, that reuse reads
COUNTS = (1, 2, 4, 8)  # layers that borrow
KNOWN = 2.0  # nats a token that an answer costs the dense model, at most


@dataclass
class Borrowing:
    """What layers do at the end of a text; `seen` is what each has used: weights, or pages read."""

    borrow: tuple[int, ...] = ()
    share: float | None = None  # None: of weights; else of the pages that the lender reads
    heads: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by lender and layer
    seen: dict[int, Tensor] = field(default_factory=dict)  # [Hq, R, S]

    def lender(self, layer: int) -> int:
        return max(i for i in range(layer) if i not in self.borrow)

    def weights(self, layer: int, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if layer not in self.borrow:
            weights = logits.softmax(-1)
            self.seen[layer] = weights if self.share is None else self.read(layer, q, k)
            return weights
        lender = self.lender(layer)
        if self.share is not None:
            return logits.masked_fill(~self.seen[lender], -torch.inf).softmax(-1)
        heads = self.heads.get((lender, layer), slice(None))
        return self.seen[lender][heads]

    def read(self, layer: int, q: Tensor, k: Tensor) -> Tensor:
        """Keys that steps of quest would read."""
        (R, D), S = q.shape[2:], k.shape[2]
        every = torch.cat([q.new_zeros(*q.shape[:2], S - R, D), q], 2)
        quest = Quest(self.share, 2).bind(layer, range(k.shape[1]), None)
        return pages_read(quest, every, k, torch.arange(S - R, S), D**-0.5)


def make_texts(model, tokenizer, kind: str, length: int, count: int, seed: int) -> Iterator[Text]:
    if kind == "prose":
        every = make_prompts(tokenizer, length, 4 * count, seed)
        for prompt in (each for each in every if each.name.startswith("prose")):
            yield begin(model, prompt.ids[0, :-PROSE].tolist(), prompt.ids[0, -PROSE:].tolist())
        return
    tasks = {key: task for key, task in TASKS.items() if key in RETRIEVAL}
    for i in range(count):
        trial = make_trial(tokenizer, length, i % len(tasks), seed + i // len(tasks), tasks)
        given, value = trial.turns[0]
        text = begin(model, trial.text + given, value)
        if text.dense <= KNOWN:
            yield text


def begin(model, begun: list[int], value: list[int]) -> Text:
    """The last token before the value is read with it: it foretells the first of it."""
    text = Text(model, begun[:-1], begun[-1:], value)
    text.forget_given()
    return text


def weights_of(texts: list[Text]) -> list[dict[int, Tensor]]:
    """Of each text and layer, `[Hq, R, S]`."""
    arms = [Borrowing() for _ in texts]
    for arm, text in zip(arms, texts, strict=True):
        text.read(arm)
    return [arm.seen for arm in arms]


def alike(seen: list[dict[int, Tensor]], lender: int, layer: int) -> Tensor:
    """Weights that heads [Hq] of a layer share with those [Hq] of the lender, mean over rows."""
    found = [
        torch.minimum(each[layer][:, None], each[lender][None]).sum(-1).mean(-1) for each in seen
    ]
    return torch.stack(found).mean(0)


def lost(texts: list[Text], borrow: tuple[int, ...], **more) -> list[float]:
    return [text.read(Borrowing(borrow, **more)) - text.dense for text in texts]


def tell(values: list[float]) -> str:
    low, high = interval(values)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=6, help="of each kind, and half as many apart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load(args.model, "cpu", "float32")

    def read(kind: str, count: int, seed: int) -> list[Text]:
        return list(make_texts(model, tokenizer, kind, args.length, count, seed))

    with ended(model):
        # Layers are ranked, and heads matched, on texts of their own.
        apart = read("retrieval", args.texts // 2, args.seed + 1000)
        kinds = {kind: read(kind, args.texts, args.seed) for kind in ("retrieval", "prose")}
        tabulate(range(1, model.config.num_hidden_layers), apart, kinds)


def tabulate(layers: range, apart: list[Text], kinds: dict[str, list[Text]]) -> None:
    seen = weights_of(apart)
    same = {i: float(alike(seen, i - 1, i).diagonal().mean()) for i in layers}
    near = {i: float(alike(seen, i - 1, i).amax(1).mean()) for i in layers}
    cost = {i: float(np.mean(lost(apart, (i,)))) for i in layers}
    print("| layer | weights shared with the one before | … head most like | nats, alone |")
    print("| --- | --- | --- | --- |")
    for i in layers:
        print(f"| {i} | {same[i]:.2f} | {near[i]:.2f} | {cost[i]:.3f} |", flush=True)
    counts = {kind: len(texts) for kind, texts in kinds.items()}
    print(f"\nTexts: {counts}; {len(apart)} apart\n")
    print("| layers that borrow | what | answers | prose |\n| --- | --- | --- | --- |")
    orders = {"most alike": sorted(layers, key=lambda i: -near[i])}
    orders["losing least alone"] = sorted(layers, key=lambda i: cost[i])
    for order, ranked in orders.items():
        for count in COUNTS:
            borrow = tuple(sorted(ranked[:count]))
            lenders = {(Borrowing(borrow).lender(i), i) for i in borrow}
            heads = {pair: alike(seen, *pair).argmax(1) for pair in lenders}
            arms = {"weights, head by head": {}, "weights, of the head most like": {"heads": heads}}
            arms |= {f"reuse, {share:g} of the pages": {"share": share} for share in SHARES}
            for name, more in arms.items():
                cells = [tell(lost(t, borrow, **more)) for t in kinds.values()]
                print(f"| {count} {order} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
