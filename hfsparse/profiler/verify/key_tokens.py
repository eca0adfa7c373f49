"""What a plan loses on tokens that need the far context, in texts held out from calibration.

Any model predicts such tokens, whether or not it can answer questions. As in LongPPL (arXiv
2410.23771) a key token is one that the dense model predicts well, and loses where every head sees
only its neighbourhood: the profiler's own notion, here with thresholds in nats. All but the end of
a text is read in one go; the end is read in decode steps, so that caches and pages count, too.
A dense model's luck helps to pick the tokens, so a plan may look slightly worse, never better.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hfsparse.interval import chance, interval
from hfsparse.models.logits import read_logits
from hfsparse.plan import Plan
from hfsparse.profiler.measure.capture import SLICE
from hfsparse.profiler.methods import minference, one_pass
from hfsparse.profiler.prompts import calibration as prompts
from hfsparse.profiler.prompts.calibration import Prompt
from hfsparse.profiler.verify.answers import SIGNIFICANCE, compare_to_limit
from hfsparse.profiler.verify.reader import open_reader
from hfsparse.profiler.verify.runs import Runs
from hfsparse.runtime.decode import STEP

TEXTS = 4  # a length that choose, and as many that report: one of each kind that we make
KNOWN = 2.0  # nats that a key token costs the dense model, at most
GAIN = 2.0  # nats that it costs more without the far context, at least
TAIL = 128  # tokens of a text, at its end, that are read in decode steps; a quarter at most


def hold_out(
    found: dict[int, list[Prompt]], samples: int
) -> tuple[dict[int, list[Prompt]], dict[int, list[Prompt]]]:
    """Up to `samples` prompts a length to calibrate on, and others, up to 2 * TEXTS, held out.

    Where there are fewer than both need, a quarter is held out. What is held out at one length is
    held out at all, by its name.
    """
    held: list[str] = []
    for _, each in sorted(found.items(), reverse=True):
        names = [prompt.name for prompt in each]
        wanted = max(len(each) - samples, min(2 * TEXTS, len(each) // 4))
        rest = [name for name in reversed(names) if name not in held]
        held += rest[: max(0, wanted - (len(names) - len(rest)))]
    kept = {n: [p for p in each if p.name not in held][:samples] for n, each in found.items()}
    out = {n: [p for p in each if p.name in held][: 2 * TEXTS] for n, each in found.items()}
    return kept, out


def fill_up(tokenizer, held: dict[int, list[Prompt]], seed: int) -> dict[int, list[Prompt]]:
    """2 * TEXTS a length: one half of those held out, then the other, each filled up with ours."""
    full = {}
    for n, each in held.items():
        middle, full[n] = len(each) // 2, []
        for first, part in ((0, each[:middle]), (TEXTS, each[middle:])):
            more = range(first, first + TEXTS - len(part))
            full[n] += part + [prompts.make_prompt(tokenizer, n, i, seed) for i in more]
    return full


@torch.no_grad()
def measure_losses(model: PreTrainedModel, prompt: Prompt) -> dict[str, np.ndarray]:
    """`loss` of each token `[L - 1]` but the first, in nats. Patched or not."""
    ids = prompt.ids[0]
    tail = min(TAIL, len(ids) // 4)
    read, found = open_reader(model), []
    start = 0
    for piece in chain([ids[: len(ids) - tail]], ids[len(ids) - tail :].split(STEP)):
        hidden = read(piece.tolist())
        wanted = ids[start + 1 : start + 1 + len(piece)]
        for part, next_ones in zip(hidden.split(SLICE, 1), wanted.split(SLICE), strict=False):
            scores = read_logits(model, part[:, : len(next_ones)])[0].float()
            found.append(cross_entropy(scores, next_ones.to(scores.device), reduction="none"))
        start += len(piece)
    return {"loss": torch.cat([each.cpu() for each in found]).numpy()}


@dataclass
class KeyTokens:
    """Some texts with key tokens, and how many nats a plan may lose on each of these, in mean."""

    runs: Runs[Prompt]
    texts: list[Prompt]
    limit: float

    def __post_init__(self) -> None:
        named = {hashlib.sha256(p.ids.numpy().tobytes()).hexdigest()[:12]: p for p in self.texts}
        self.runs.items |= named
        self.dense = self.runs.get(self.runs.dense, named, "dense, texts")
        self.keys: dict[str, np.ndarray] = {}
        self.worth: list[float] = []  # nats of each, to the dense model
        for name, prompt in named.items():
            candidates = minference.candidates(prompt.ids.shape[1])
            short = one_pass.short_sighted_plan(self.runs.job.model, candidates)
            near = self.runs.get(short, [name], "short-sighted, texts")[name]["loss"]
            loss = self.dense[name]["loss"]
            keys = np.flatnonzero((loss <= KNOWN) & (near - loss >= GAIN))
            if len(keys):
                self.keys[name] = keys
                self.worth += (near - loss)[keys].tolist()

    @property
    def suffice(self) -> bool:
        """Whether enough texts have key tokens for an estimate."""
        return len(self.keys) >= 2

    def sum_losses(self, plan: Plan, label: str = "plan, texts") -> tuple[np.ndarray, np.ndarray]:
        """By text: nats lost on its key tokens, in sum, and how many these are."""
        found = self.runs.get(plan, self.keys, label)
        sums = [
            float((found[name]["loss"] - self.dense[name]["loss"])[keys].sum())
            for name, keys in self.keys.items()
        ]
        return np.array(sums), np.array([len(keys) for keys in self.keys.values()], float)

    def rejects(self, plan: Plan, label: str = "plan, texts") -> bool:
        """Whether the plan loses more than the limit, and not by chance."""
        sums, counts = self.sum_losses(plan, label)
        return sums.sum() > self.limit * counts.sum() and chance(sums, counts) < SIGNIFICANCE

    def wins_back(self, plan: Plan) -> Callable[[Plan, str], bool]:
        """Whether another plan loses no more than the limit."""
        return lambda other, label: not self.rejects(other, f"{label}, texts")

    def report(self, plan: Plan) -> dict:
        """For `made`: what was lost, and `told`, in a sentence."""
        sums, counts = self.sum_losses(plan)
        mean, (low, high) = float(sums.sum() / counts.sum()), interval(sums, counts)
        tokens = int(counts.sum())
        own = sum(self.runs.items[name].name.startswith("data-") for name in self.keys)
        texts = f"{len(sums)} texts" + (f", {own} of them yours" if own else "")
        return {
            "told": f"{mean:.3f} nats lost a key token (one that needs the far context), 95 % "
            f"interval {low:.3f} to {high:.3f}, {tokens} in {texts}: "
            f"{compare_to_limit(low, high, self.limit, f'{self.limit:g}')}",
            "limit": self.limit,
            "texts": len(sums),
            "tokens": tokens,
            "worth": round(float(np.mean(self.worth)), 4),
            "nats": round(mean, 4),
            "interval": [round(low, 4), round(high, 4)],
        }
