"""Ranks that share a model's heads run each step alike: as the one that is ready for least."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from transformers import DynamicCache

import hfsparse
from hfsparse.patcher.state import state_of
from hfsparse.runtime import graphs
from hfsparse.runtime.graphs import EAGER, LIVE, OTHERS, RECORD, REPLAY, Planned
from tests.patcher.families import fresh, full, tokens
from tests.patcher.runs import forward


class Ranks:
    """Threads that tell one another numbers."""

    def __init__(self, count: int):
        self.met, self.said = Barrier(count, timeout=60), [0] * count

    def agree(self, rank: int):
        def least(number: int) -> int:
            self.said[rank] = number
            self.met.wait()
            found = min(self.said)
            self.met.wait()  # before anyone says the next
            return found

        return least


def on_each(count: int, work):
    with ThreadPoolExecutor(count) as pool:
        return [*pool.map(work, range(count))]


@pytest.fixture
def no_obstacle(monkeypatch):
    monkeypatch.setattr(graphs, "find_obstacle", lambda *call: None)


@pytest.mark.parametrize(
    ("ready", "run"),
    [
        ((REPLAY, REPLAY), REPLAY),
        ((REPLAY, RECORD), RECORD),
        ((LIVE, REPLAY), LIVE),
        ((RECORD, EAGER), EAGER),
    ],
)
def test_a_step_runs_as_the_rank_that_is_ready_for_least_can(no_obstacle, ready, run):
    ranks = Ranks(2)

    def step(rank: int) -> tuple[list[int], str | None]:
        model, how = fresh("llama"), []
        with hfsparse.patch(model, full(model)):
            own, cache = state_of(model).graphs, DynamicCache()
            forward(model, tokens(1, 20), cache=cache)
            own.agree = ranks.agree(rank)
            level = ready[rank]
            own._plan = lambda *given: Planned(level, {}, [21]) if level else None
            own._replay = lambda *given: how.append(REPLAY)
            own._first = lambda *given: how.append(given[-1])
            given = {"input_ids": tokens(1, 1)}
            own.run(lambda **given: how.append(EAGER), model.model, given, cache)
            return how, own.why

    assert on_each(2, step) == [([run], OTHERS if run == EAGER else None)] * 2


def test_where_one_rank_can_not_record_none_has_a_graph(monkeypatch):
    class Recorded:
        def __init__(self, rank: int):
            if rank == 1:
                raise torch.cuda.OutOfMemoryError("full")
            self.weights = self

        def moved(self) -> bool:
            return False

    monkeypatch.setattr(graphs, "Graph", Recorded)
    ranks, model = Ranks(2), fresh("llama")
    with hfsparse.patch(model, full(model)):
        layers = state_of(model).layers

    def record(rank: int) -> str:
        own = graphs.Graphs(layers, agree=ranks.agree(rank))
        with pytest.raises(RuntimeError) as told:
            own._recorded(rank)
        return str(told.value)

    assert on_each(2, record) == ["another rank couldn't record it", "full"]
