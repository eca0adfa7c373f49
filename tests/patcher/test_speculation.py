"""Speculation with a patched hybrid: what stock does, token by token, or its refusal beforehand."""

from __future__ import annotations

import pytest
import torch

import hfsparse
from tests import hybrids
from tests.patcher.families import fresh, full, tokens
from tests.patcher.runs import generate


def build(family: str):
    if not hybrids.known(family):
        pytest.skip("this transformers keeps its states elsewhere")
    return hybrids.hybrid(family)


def prompt() -> torch.Tensor:
    """A text that comes twice and a half: lookup finds what follows."""
    text = tokens(1, 30)
    return torch.cat([text, text, text[:, :15]], 1)


def by_lookup(model) -> dict:
    return dict(prompt_lookup_num_tokens=4)


def by_assistant(model) -> dict:
    return dict(assistant_model=fresh("llama"))


@pytest.mark.parametrize("plan", [full, hybrids.rings_and_pages])
@pytest.mark.parametrize("way", [by_lookup, by_assistant])
def test_drafts_of_a_hybrid_without_a_recurrence_are_taken_back(way, plan):
    """Its states are the last inputs of a convolution: as many more are kept as a draft is long."""
    model, ids = build("lfm2"), prompt()
    with hfsparse.patch(model, plan(model)):
        want = generate(model, ids, new=24).sequences.tolist()
        assert generate(model, ids, new=24, **way(model)).sequences.tolist() == want


@pytest.mark.parametrize("way", [by_lookup, by_assistant])
@pytest.mark.parametrize("family", ["qwen3_5", "granite", "jamba"])
def test_a_recurrence_can_not_be_taken_back_and_no_token_is_said(family, way):
    model, said = build(family), []
    model.register_forward_hook(lambda *args: said.append(args))
    with hfsparse.patch(model), pytest.raises(ValueError, match="not supported with stateful mod"):
        generate(model, prompt(), new=24, **way(model))
    assert not said


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5"])
def test_a_patched_hybrid_drafts_for_another_model(family):
    model, ids = fresh("llama"), prompt()
    want = generate(model, ids, new=24).sequences.tolist()
    assistant = build(family)
    with hfsparse.patch(assistant):
        got = generate(model, ids, new=24, assistant_model=assistant)
    assert got.sequences.tolist() == want


def test_a_turn_behind_drafts_goes_on_as_stock():
    """transformers goes on keeping what it might take back: steps stay right, and eager."""
    model, ids, found = build("lfm2"), prompt(), []
    for patched in (False, True):
        handle = hfsparse.patch(model) if patched else None
        cache = hybrids.transformers.DynamicCache(config=model.config)
        out = generate(model, ids, cache=cache, new=12, prompt_lookup_num_tokens=4)
        more = torch.cat([out.sequences, ids[:, :9]], 1)
        found.append(generate(model, more, cache=cache, new=12).sequences.tolist())
        if handle:
            handle.undo()
    assert found[0] == found[1]
