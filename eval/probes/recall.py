"""Which head lost the needle: dense attention to the answer's place, and what a plan keeps of it.

The right answer is given after the prompt, and the rows that predict it are looked at in a dense
run: the prompt's last row reads as the plan's prefill does, the others as its decode steps do. For
each q head: the mass on the gold tokens, and the share of it on keys that the head still reads.
(Refreshed choices count as if each step chose; tiles that `skip` leaves out count as read.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from hfsparse.errors import UsageError
from hfsparse.lists import Grid, default_block
from hfsparse.models.loading import input_ids
from hfsparse.models.names import text_decoder
from hfsparse.patcher import patch
from hfsparse.plan import Plan
from hfsparse.profiler.measure.effects import bind_selector, pages_read
from hfsparse.profiler.measure.exact import attention
from hfsparse.runtime.layer_plan import layer_plan_of, observed
from hfsparse_eval.arms import Arm
from hfsparse_eval.run.generate import answer
from hfsparse_eval.run.prompter import Sample
from hfsparse_eval.run.runner import by_case
from hfsparse_eval.run.samples import Case, Suite
from hfsparse_eval.run.world import Session

LOST = 1e-3  # of a row's attention: heads that lose less are not named


def check(arms: Sequence[Arm]) -> None:
    """UsageError for plans with heads of which it can't tell what steps read."""
    for arm in arms:
        if any("kept" in layer.decode for layer in arm.plan.layers):
            raise UsageError(
                f"{arm.title} has kv heads that evict keys: recall can't tell which of them stay. "
                "Give plans without evictions, or ask by hfsparse eval needle"
            )


def run(session: Session, suite: Suite) -> None:
    """Fill the results with what they lack: every arm's answers, what a plan's heads lost."""
    model, tokenizer = session.model, session.tokenizer

    def judge(case: Case, todo: Sequence[Arm]):
        sample = suite.sample(case)
        own = [arm for arm in todo if arm.plan]
        lost = look(model, tokenizer, sample, [arm.plan for arm in own]) if own else []
        found = dict(zip(own, lost, strict=True))

        def tell(arm: Arm) -> dict:
            said = answer(model, tokenizer, sample)
            shown = {"score": said.score, "answers": sample.answers, "output": said.text}
            return shown | found.get(arm, {})

        return tell

    by_case(session, suite.cases, judge)


@torch.no_grad()
def look(model, tokenizer, sample: Sample, plans: Sequence[Plan]) -> list[dict]:
    """For each plan: mass on gold tokens over all heads, what is kept of it, and who lost some."""
    right = tokenizer(f" {', '.join(sample.answers)}", add_special_tokens=False).input_ids
    ids = input_ids(model, [[*sample.ids, *right]])
    first = len(sample.ids) - 1
    gold = sorted({token for low, high in sample.gold for token in range(low, high)})
    found = [{"mass": 0.0, "kept": 0.0, "lost": []} for _ in plans]
    eyes = [Kept(plan, first) for plan in plans]

    def observe(module, q, k, v, logits) -> None:
        layer_plan = layer_plan_of(module)
        if layer_plan.window is not None:
            return  # the model's own window decides there
        layer = layer_plan.index
        seen = SimpleNamespace(q=q, k=k, logits=logits)
        rows = torch.arange(first, first + len(right), device=q.device)
        at = torch.tensor(gold, device=q.device)
        mass = torch.stack([attention(seen, rows, h)[:, at] for h in range(q.shape[1])])
        whole = mass.sum(2).mean(1)  # [Hq], of a row
        for told, eye in zip(found, eyes, strict=True):
            kept = (mass * eye.mask(layer, q, k, rows, logits.scale)[..., at]).sum(2)
            kept = kept.mean(1)
            told["mass"] += float(whole.sum())
            told["kept"] += float(kept.sum())
            told["lost"] += [
                {
                    "layer": layer,
                    "head": head,
                    "mass": round(float(whole[head]), 5),
                    "kept": round(float(kept[head]), 5),
                    "words": words(eye.plan, layer, head),
                }
                for head in (whole - kept > LOST).nonzero()[:, 0].tolist()
            ]

    with patch(model), observed(model, observe):
        text_decoder(model)(input_ids=ids, use_cache=False)
    return found


class Kept:
    """The keys that a plan's heads read at a prompt's last row, `first`, and in the steps after."""

    def __init__(self, plan: Plan, first: int):
        self.plan, self.first = plan, first
        self.chosen: Tensor | None = None  # by the last layer that chose pages

    def mask(self, layer: int, q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
        """bool `[Hq, rows, L]`, future keys included; q `[1, Hq, L, D]`, k `[1, Hkv, L, D]`."""
        prompt, steps = self.first + 1, rows[1:]
        q_prompt, k_prompt = q[:, :, :prompt], k[:, :, :prompt]
        kept = q.new_ones(q.shape[1], len(rows), k.shape[2], dtype=torch.bool)
        kept[:, :1, :prompt] = self._prefill(layer, q_prompt, k_prompt, scale)
        kept[:, 1:] = self._decode(layer, q, k, steps, scale)
        return kept

    def _prefill(self, layer: int, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """`[Hq, 1, L]` of the last row."""
        heads, length, ratio = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]
        words, below = self.plan.layers[layer], self.plan.below
        grid = Grid.causal(1, length, default_block(length, q.device), q.device)
        groups = defaultdict(list)
        for head, word in enumerate(words.prefill):
            limit = below.prefill if words.cache[head // ratio] == "full" else below.cache
            if word != "full" and length >= limit:
                groups[word].append(head)
        kept = q.new_ones(heads, 1, length, dtype=torch.bool)
        last = torch.tensor([length - 1], device=q.device)
        for word, own in groups.items():
            kv = [head // ratio for head in own]
            lists = self.plan.patterns[word].lists(q[:, own], k[:, kv], grid, scale)
            kept[own] = lists.mask(last)[0]
        return kept

    def _decode(self, layer: int, q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
        """`[Hq, rows, L]`."""
        ratio, (words, below) = q.shape[1] // k.shape[1], (self.plan.layers[layer], self.plan.below)
        kept = q.new_ones(q.shape[1], len(rows), k.shape[2], dtype=torch.bool)
        if not len(rows):
            return kept
        key, tokens = torch.arange(k.shape[2], device=q.device), rows[:, None] + 1
        reads = {word: self.plan.patterns.get(word) for word in words.decode}
        for chooser in {p for p in reads.values() if hasattr(p, "pages")}:
            bound = bind_selector(
                replace(chooser, refresh=0), layer, range(k.shape[1]), self.plan.data
            )
            mine = pages_read(bound, q, k, rows, scale)
            own = [h for h in range(q.shape[1]) if reads[words.decode[h // ratio]] == chooser]
            if self.chosen is None:
                self.chosen = mine.clone()
            self.chosen[own] = mine[own]
        for head in range(q.shape[1]):
            cache, decode = words.cache[head // ratio], words.decode[head // ratio]
            if cache != "full":
                band = self.plan.patterns[cache].band
                near = (key < band.sink) | (key >= band.start(rows[:, None]))
                kept[head] = near | (tokens < below.cache)
            elif decode != "full":
                kept[head] = self.chosen[head] | (tokens < below.decode)
        return kept


def words(plan: Plan, layer: int, head: int) -> str:
    """What the plan's line of this layer says of a q head and its kv head."""
    said = plan.layers[layer]
    kv = head * len(said.cache) // len(said.prefill)
    return f"prefill {said.prefill[head]}, cache {said.cache[kv]}, decode {said.decode[kv]}"
