"""Claim: prompt lookup gains under a patch, whose steps of several tokens are CUDA graphs, too.

    python -m benchmarks.lookup [--lengths 16384] [--drafts 8] [--tokens 300] [--shape llama-3.1-8b]
                                [--plans "no plan,quest 6 %"]

`model.generate`, greedy, random weights in the shape of Llama-3.1-8B (bf16). What attention and
MLPs add is set to zero, so that a token alone says which comes next, and the prompt goes round in a
circle of tokens: a draft is right, as of a text that repeats itself, but where rounding decides
between equal logits (tokens a round tell). ms a token: a round of drafts, over the tokens that it
gave; the median, the least of the rounds. "Eager": the same patch, its steps not replayed. --shape
tiny tries it on a CPU.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import SKIP
from benchmarks.common.shapes import describe, endless, plan_of, tidy
from hfsparse.patcher.state import state_of

PLANS = ("no plan", "quest 6 %", "quest 6 % + half ring")


class Rounds(StoppingCriteria):
    """Notes when a round of drafts has ended, and how many tokens there were."""

    def __init__(self):
        self.at: list[tuple[float, int]] = []

    def __call__(self, input_ids, scores, **more):
        self.at.append((time.perf_counter(), input_ids.shape[1]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def figures(self) -> tuple[float, float]:
        """ms a token and tokens a round; the last round may have been cut."""
        spent = [(b - a, there - here) for (a, here), (b, there) in pairwise(self.at[SKIP:-1])]
        ms = statistics.median(1e3 * seconds / new for seconds, new in spent)
        return ms, statistics.mean(new for _, new in spent)


@torch.no_grad()
def make_circle(model: PreTrainedModel) -> list[int]:
    """Tokens of which each is the model's next one, the first behind the last."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    every = torch.arange(model.config.vocab_size, device=model.device)
    said = [model(ids[:, None]).logits[:, -1].argmax(-1) for ids in every.split(1024)]
    following, longest = torch.cat(said).tolist(), []
    for start in range(64):
        seen = [start]
        while (then := following[seen[-1]]) not in seen:
            seen.append(then)
        longest = max(longest, seen[seen.index(then) :], key=len)
    return longest


def lookup(model, circle: list[int], length: int, tokens: int, drafts: int | None):
    """ms a token and tokens a round, of `generate` behind a prompt of the circle."""
    tidy()
    ids, rounds = (circle * (length // len(circle) + 1))[:length], Rounds()
    more = {} if drafts is None else {"prompt_lookup_num_tokens": drafts}
    model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([rounds]),
        **more,
    )
    return rounds.figures()


def measure(model, circle: list[int], length: int, args) -> None:
    """Rows of the table, as they come."""

    def show(arm: str, asked: int | None, eager: float = 0.0, graphs: object = "") -> float:
        ms, new = min(lookup(model, circle, length, args.tokens, asked) for _ in range(args.rounds))
        row = f"{length:,} | {arm} | {asked or 0} | {ms:.2f} | {new:.1f}"
        print(f"| {row} | {f'{eager / ms:.2f}' if eager else ''} | {graphs} |", flush=True)
        return ms

    show("stock", None)
    show("stock", args.drafts)
    for name in args.plans:
        with hfsparse.patch(model, plan_of(model, name)):
            state_of(model).graphs.never = "told to be eager"
            eager = show(f"{name}, eager", args.drafts)
        with hfsparse.patch(model, plan_of(model, name)):
            graphs = state_of(model).graphs
            show(name, None, graphs=graphs)
            show(name, args.drafts, eager, graphs)


def main() -> None:
    made = options.parser(__doc__, "16384", 300, "llama-3.1-8b")
    made.add_argument("--drafts", type=int, default=8)
    made.add_argument("--plans", default=PLANS, type=lambda text: text.split(","))
    args = options.parse(made)
    model = endless(args.shape)
    circle = make_circle(model)
    print(describe(model, args.shape))
    print(f"\nThe prompt is a circle of {len(circle)} tokens.\n")
    print("| tokens | arm | drafts | ms a token | tokens a round | x eager | graphs |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | --- |", flush=True)
    for length in args.lengths:
        measure(model, circle, length, args)


if __name__ == "__main__":
    main()
