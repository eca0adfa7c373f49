"""Nothing depends on global state: each part of the library under each world, on a CPU."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import pytest
import torch

import hfsparse
from hfsparse.runtime import call
from tests import worlds
from tests.patcher import families

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain():
    return worlds.asked(CPU)


@pytest.mark.parametrize("name", worlds.SLICES)
@pytest.mark.parametrize("world", worlds.WORLDS)
def test_a_world_changes_nothing(world, name, plain):
    off = worlds.WORLDS[world][1]
    off = min(off, worlds.SUMS) if name in worlds.CHOICES else off
    worlds.compare(worlds.run(world, name, CPU), plain(name), off)


def test_threads_share_a_patched_model_and_run_another_beside_it():
    model, *inputs = worlds.prepare_model(CPU)
    other, ids, mask, more = worlds.prepare_model(CPU)
    with torch.no_grad(), ExitStack() as stack:
        for each in (model, other):
            stack.enter_context(hfsparse.patch(each, families.mixed(each)))
        theirs = ids.flip(0), mask.flip(0), more.flip(0)
        want = [worlds.talk(model, *inputs), worlds.talk(model, *theirs)]
        want.append(worlds.talk(other, ids[:1], mask[:1], more[:1]))
        for _ in range(2):
            got = worlds.at_once(
                lambda: worlds.talk(model, *inputs),
                lambda: worlds.talk(model, *theirs),
                lambda: worlds.talk(other, ids[:1], mask[:1], more[:1]),
            )
            for found, truth in zip(got, want, strict=True):
                worlds.compare(found, truth, worlds.EXACT)


def test_threads_profile_models_of_their_own(plain):
    prepare, work = worlds.SLICES["profile_balanced"]
    made = [prepare(CPU), prepare(CPU)]
    for got in worlds.at_once(*(lambda each=each: work(each) for each in made)):
        worlds.compare(got, plain("profile_balanced"), worlds.EXACT)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("same", [False, True])
def test_a_model_inside_anothers_forward_leaves_it_as_it_was(same, error):
    """A draft, or a look ahead by the model itself, in the middle of a layer; it may fail."""
    model, ids, mask, more = worlds.prepare_model(CPU)
    inner = model if same else worlds.prepare_model(CPU)[0]
    running = []

    def look_ahead(module, args):
        if not running:
            running.append(True)
            with nullcontext() if error is None else pytest.raises(error):
                worlds.talk(inner, ids[:, :150], mask[:, :150], more)
            running.clear()

    def fail(module, args):
        if running and error is not None:
            raise error

    with torch.no_grad(), ExitStack() as stack:
        for each in {model, inner}:
            stack.enter_context(hfsparse.patch(each, families.mixed(each)))
        want = worlds.talk(model, ids, mask, more)
        hooks = [
            model.model.layers[1].self_attn.register_forward_pre_hook(look_ahead, prepend=True),
            inner.model.layers[2].mlp.register_forward_pre_hook(fail),
        ]
        if not same:
            hooks.append(model.model.layers[1].mlp.register_forward_pre_hook(look_ahead))
        worlds.compare(worlds.talk(model, ids, mask, more), want, worlds.EXACT)
        for hook in hooks:
            hook.remove()


def test_a_call_that_was_interrupted_holds_nothing_back():
    model, ids, mask, _ = worlds.prepare_model(CPU)
    handle = hfsparse.patch(model, families.mixed(model))

    def stop(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(ids, attention_mask=mask)
        assert call.running() is None
    hook.remove()
    handle.undo()
