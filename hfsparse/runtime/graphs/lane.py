"""A stream beside the one that the host's work is told to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from hfsparse.runtime.graphs.pool import find_place


class Lane:
    """A device's stream for steps that run ahead; without streams all runs in the order told."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = find_place(device).ahead if device.type == "cuda" else None

    @contextlib.contextmanager
    def run(self, read: list[Tensor]) -> Iterator[None]:
        """What is told inside runs here, behind all that was told before; it may read these."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        _lend(read, self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """How far it has been told to go."""
        return None if self.stream is None else self.stream.record_event()

    def join(self, mark: torch.cuda.Event | None, made: list[Tensor]) -> None:
        """The current stream goes on behind a mark, and may read what was made there."""
        if mark is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(mark)
            _lend(made, current)


def _lend(tensors: list[Tensor], stream: torch.cuda.Stream) -> None:
    """Have the memory of tensors serve nothing else before a stream has read them."""
    for t in tensors:
        if t.is_cuda:
            t.record_stream(stream)
