"""Perplexity of a text and what a plan changes in its next-token distributions, by position.

A window of the text is one prompt, read at once. KL(dense || arm) is measured on every token, so it
sees changes that the perplexity of the text averages away; neither sees what only retrieval needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hfsparse.errors import UsageError
from hfsparse.models.loading import input_ids
from hfsparse.models.logits import read_logits
from hfsparse.models.names import text_decoder
from hfsparse_eval.arms import Arm
from hfsparse_eval.run.runner import by_case
from hfsparse_eval.run.world import Session
from hfsparse_eval.tasks import haystack as text

BINS = (0, 64, 256, 1024, 4096, 16384, 65536, 262144, 1 << 62)  # positions in a window
ROWS = 256  # positions whose logits are held at a time


@dataclass(frozen=True)
class Window:
    id: str
    length: int
    ids: tuple[int, ...]
    first: int  # positions before this one were scored in the window before
    task: str = "ppl"
    depth: float | None = None


def source(path: Path | None) -> tuple[str, str]:
    """The text to read, the built-in prose without a file, and what it is."""
    if path is None:
        return " ".join(text.prose()), text.prose_source()
    return text.read(path)


def windows(
    tokenizer, content: str, length: int, count: int, stride: int | None = None
) -> list[Window]:
    """At most `count` windows of `length` tokens, `stride` apart; None: side by side."""
    bos = tokenizer("").input_ids[:1]
    bos = bos if bos == [tokenizer.bos_token_id] else []
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    size = length - len(bos)
    if stride and stride > length:
        raise UsageError(f"stride {stride} skips text between windows of {length}: give less")
    if size < 2:
        raise UsageError(f"length {length} has no token to foresee: give more")
    stride = min(stride or size, size)
    if len(ids) < size:
        raise UsageError(f"the text has {len(ids)} tokens: give lengths up to that, or more text")
    starts = range(0, len(ids) - size + 1, stride)[:count]
    return [
        Window(
            f"ppl-{length}-{stride}-{i:04d}",
            length,
            tuple(bos + ids[start : start + size]),
            first=max(length - stride if i else 0, 1),
        )
        for i, start in enumerate(starts)
    ]


def run(session: Session, windows: Sequence[Window]) -> None:
    """Fill the results with what they lack; each window is read densely, then under each arm."""
    model = session.model

    def look(window: Window, arms: Sequence[Arm]):
        dense = hidden(model, window.ids)

        def tell(arm: Arm) -> dict:
            found = hidden(model, window.ids) if arm.hash else dense
            return {"bins": compare(model, window.ids, dense, found, window.first)}

        return tell

    by_case(session, windows, look)


@torch.inference_mode()
def hidden(model, ids: Sequence[int]) -> Tensor:
    """What the output embedding reads, `[S, hidden]`."""
    return text_decoder(model)(input_ids(model, [ids])).last_hidden_state[0]


@torch.inference_mode()
def compare(model, ids: Sequence[int], dense: Tensor, found: Tensor, first: int) -> list[dict]:
    """Sums over the tokens of each bin of positions: nats of loss, KL in nats, equal first choices.

    dense, found `[S, hidden]`; tokens before `first` are left out.
    """
    wanted = torch.tensor(ids, device=found.device)
    sums = torch.zeros(len(BINS) - 1, 4, dtype=torch.float64)
    for start in range(first, len(ids), ROWS):
        at = torch.arange(start, min(start + ROWS, len(ids)), device=found.device)
        p, q = (log_probabilities(model, rows[at - 1]) for rows in (dense, found))
        loss = -q.gather(1, wanted[at, None])[:, 0]
        kl = (p.exp() * (p - q)).sum(1)
        same = p.argmax(1) == q.argmax(1)
        each = torch.stack([torch.ones_like(kl), loss, kl, same.to(kl.dtype)], 1).double().cpu()
        place = torch.bucketize(at.cpu(), torch.tensor(BINS[1:]), right=True)
        sums.index_add_(0, place, each)
    names = "tokens", "loss", "kl", "same"
    return [
        {"from": low, **dict(zip(names, row, strict=True))}
        for low, row in zip(BINS, sums.tolist(), strict=False)
        if row[0]
    ]


def log_probabilities(model, rows: Tensor) -> Tensor:
    """Of the next token after each of `rows` `[n, hidden]`, float32."""
    return read_logits(model, rows[None])[0].float().log_softmax(-1)
