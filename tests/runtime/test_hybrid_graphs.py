"""A hybrid's recorded steps read and write its linear layers' states where they lie; tests/gpu has
real graphs of each family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hfsparse.runtime.graphs.states import States
from tests import hybrids
from tests.kernels.interpreter import process


@pytest.fixture(scope="module")
def interpreted():
    """`hybrids.compare` in a process in which Triton is interpreted."""
    with process() as there:

        def compare(family, *args, **more):
            if not hybrids.known(family):
                pytest.skip("this transformers keeps its states elsewhere")
            return there(hybrids.compare, family, *args, **more)

        yield compare


@pytest.mark.parametrize("family", ["qwen3_5", "granite", "jamba", "lfm2", "falcon_h1", "zamba2"])
def test_a_replay_carries_the_states_on_bit_for_bit(interpreted, family):
    """Left padding, too: only prompts hold some."""
    found = interpreted(family, hybrids.alone)
    assert (found.same, found.graphs, found.recorded) == (True, "yes", 1)


def test_states_that_a_step_replaces_are_brought_back_to_where_they_lay(interpreted):
    found = interpreted("qwen3_5", hybrids.replacing)
    assert (found.same, found.graphs, found.recorded) == (True, "yes", 1)


def test_two_caches_in_turns_have_graphs_of_their_own_which_a_short_turn_keeps(interpreted):
    found = interpreted("lfm2", hybrids.two_in_turns)
    assert (found.same, found.graphs, found.recorded) == (True, "yes", 2)


def test_a_replay_that_leaves_a_state_behind_is_the_last(interpreted):
    """Though that step itself says the right thing."""
    found = interpreted("lfm2", hybrids.alone, hybrids.Forgetful)
    assert (found.same, found.recorded) == (True, 1)
    assert "gives something else than eagerly" in found.graphs


def test_a_step_that_fails_half_way_is_run_again_from_the_states_that_it_found(interpreted):
    found = interpreted("lfm2", hybrids.waiting)
    assert (found.same, found.recorded) == (True, 0)
    assert "the host waits for _local_scalar_dense" in found.graphs


def test_a_mask_with_holes_is_refused_before_a_replay_moves_a_state(interpreted):
    found = interpreted("lfm2", hybrids.holed)
    assert (found.same, found.graphs) == (True, "yes")


def test_while_steps_may_be_taken_back_none_is_replayed(interpreted):
    found = interpreted("lfm2", hybrids.recording_its_past)
    assert found.same
    assert "keep what speculation may take back" in found.graphs


def test_states_outside_of_the_cache_are_not_recorded(interpreted):
    found = interpreted("recurrent_gemma", hybrids.alone)
    assert (found.same, found.recorded) == (True, 0)
    assert "keep their states outside of the cache" in found.graphs


def test_a_fused_step_carries_the_states_on_and_is_compiled_once_for_all_caches(interpreted):
    found = interpreted("lfm2", hybrids.two_in_turns, hybrids.Kept, fuse=True)
    assert (found.same, found.graphs, found.recorded) == (True, "yes, fused", 2)


def layer() -> SimpleNamespace:
    """A linear layer's states, one of them not there yet."""
    return SimpleNamespace(conv_states={0: torch.ones(2), 1: None}, recurrent_states={0: None})


def test_states_are_told_from_others_by_the_tensors_that_they_are():
    linear = layer()
    cache = SimpleNamespace(layers=[object(), linear])
    states, other = States(cache), States(SimpleNamespace(layers=[layer()]))
    assert states
    assert states == States(cache)
    assert states != other
    assert states != States(SimpleNamespace(layers=[]))
    assert not States(None)
    held, before = linear.conv_states[0], states.copies()
    linear.conv_states[0] = torch.zeros(2)
    assert states != States(cache)
    states.settle()
    assert linear.conv_states[0] is held
    assert held.tolist() == [0, 0]
    states.restore(before)
    assert held.tolist() == [1, 1]
