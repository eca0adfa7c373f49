"""Where a device's graphs are recorded: its pool of memory, its stream, one recording at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from functools import cached_property

import torch


class Place:
    """What all graphs on a device share: streams, and memory, since no two of them run at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)  # that they are recorded on
        self.aside = torch.cuda.Stream(device)  # for what is asked while one runs
        self.ahead = torch.cuda.Stream(device)  # for steps that the host has not asked for yet
        self.last: torch.cuda.Stream | None = None  # of the last replay
        self.lock = threading.Lock()

    @cached_property
    def held(self) -> torch.cuda.CUDAGraph:
        """A graph that holds the pool from which graphs that begin on this device are recorded.

        A pool whose graphs are all gone can't be used again, and stays reserved.
        """
        held = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            held.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self.device)  # of an empty graph torch warns
            held.capture_end()
        return held

    @cached_property
    def pool(self) -> torch.cuda.MemPool:
        """The memory of graphs that begin on another device."""
        with torch.cuda.device(self.device):
            return torch.cuda.MemPool()


_places: dict[torch.device, Place] = {}


def find_place(device: torch.device) -> Place:
    if device not in _places:
        _places.setdefault(device, Place(device))
    return _places[device]


@contextlib.contextmanager
def lock_devices(devices: Sequence[torch.device]):
    """The places of some devices, where no other graph is recorded or launched meanwhile."""
    places = [find_place(device) for device in devices]
    with contextlib.ExitStack() as stack:
        for place in sorted(places, key=lambda place: str(place.device)):
            stack.enter_context(place.lock)
        yield places


@contextlib.contextmanager
def join_recording(device: torch.device):
    """A stream of a device, as its current one, that joins another's recording.

    What is allocated there meanwhile lies in the pool of such recordings.
    """
    place = find_place(device)
    with torch.cuda.stream(place.stream), torch.cuda.use_mem_pool(place.pool, device):
        yield
