"""What scripts that time tokens of `model.generate` are asked, and what they refuse."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection

import torch

from benchmarks.common.clock import SKIP
from benchmarks.common.journal import end_in_order


def parser(
    claim: str, lengths: str, tokens: int, shape: str, shapes: Collection[str] | None = None
) -> argparse.ArgumentParser:
    """The options that all have; claim: the script's docstring."""
    made = argparse.ArgumentParser(description=claim.splitlines()[0])
    made.add_argument("--lengths", default=lengths, type=numbers)
    made.add_argument("--tokens", type=int, default=tokens)
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--shape", default=shape, choices=shapes)
    return made


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for, where it can be measured; from now on SIGTERM ends in order."""
    args = made.parse_args()
    if args.shape != "tiny":
        need_cuda()
    if args.tokens < SKIP + 3:
        sys.exit(f"--tokens {args.tokens}: the first {SKIP} are not timed, give {SKIP + 3} or more")
    end_in_order()
    return args


def need_cuda() -> None:
    if not torch.cuda.is_available():
        sys.exit("this measures a CUDA device, and torch sees none: `hfsparse doctor` says why")
