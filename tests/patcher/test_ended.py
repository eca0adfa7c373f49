"""Rows of a batch that have ended read no keys, which shows in time alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)

import hfsparse
from hfsparse.runtime import decode
from hfsparse.runtime.cache import host
from tests.patcher import families
from tests.patcher.families import left_padded, tiny
from tests.patcher.oracle import CACHE

WIDTH, NEW = 150, 12
SAMPLED = dict(do_sample=True, temperature=0.7)


@pytest.fixture
def empty(monkeypatch):
    """Which rows were empty, of each layer's steps; their attention is checked to be zeros."""
    seen, read = [], decode.read_stored

    def spy(tables, layer_plan, layer, places, q, step, logits):
        out = read(tables, layer_plan, layer, places, q, step, logits)
        none = step.length == 0
        assert torch.isfinite(out).all()
        assert not out[none].any()
        assert ((step.query_pos < 0).all(1) == none).all()
        seen.append(none.tolist())
        return out

    monkeypatch.setattr(decode, "read_stored", spy)
    return seen


def run(model, ids, mask, **more):
    torch.manual_seed(0)
    given = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    out = model.generate(ids, **given | more)
    return out if isinstance(out, torch.Tensor) else out.sequences


def early(model, ids, mask, **more) -> list[int]:
    """Tokens with which rows but the last end, one after another."""
    made = run(model, ids, mask, eos_token_id=None, **more)[:-1, WIDTH:]
    ends = [int(row[1 + 3 * b]) for b, row in enumerate(made)]
    assert 0 not in ends
    return ends


def ended(tokens: torch.Tensor, eos: list[int]) -> list[list[bool]]:
    """Which rows had ended before the token that each step read."""
    has = torch.isin(tokens[:, WIDTH:], torch.tensor(eos)).cumsum(1) > 0
    before = torch.cat([torch.zeros_like(has[:, :1]), has], 1)
    return before[:, : tokens.shape[1] - WIDTH - 1].T.tolist()


@pytest.mark.parametrize(
    ("plan", "pads", "more"),
    [
        (families.full, (0, 0, 0, 0), {}),
        (families.mixed, (0, 9, 0), {}),
        (families.mixed, (0, 0, 0), SAMPLED),
        (families.growing, (0, 9, 13), {}),
        (families.corrected, (0, 9, 13), {}),
        (families.choosing, (0, 0, 9), {}),
        (families.packing, (0, 9, 13), {}),
        (families.hosted, (0, 9, 13), {}),
        (families.evicting, (0, 9, 13), {}),
        (families.straddled, (0, 9, 13), dict(max_length=WIDTH + 9, max_new_tokens=None)),
    ],
)
def test_rows_that_have_ended_read_nothing(empty, monkeypatch, plan, pads, more):
    model, (ids, mask) = tiny("qwen2"), left_padded(WIDTH, pads)
    monkeypatch.setattr(host, "why_not", lambda device: None)
    with hfsparse.patch(model, plan(model)):
        eos = early(model, ids, mask, **more)
        more = dict(eos_token_id=eos, **more)
        want = run(model, ids, mask, return_dict_in_generate=True, **more)
        assert not any(map(any, empty)), "logits may be looked at: rows read on"
        empty.clear()
        got = run(model, ids, mask, **more)
    assert got.tolist() == want.tolist()
    steps = ended(got, eos)
    assert any(map(any, steps))
    layers = len(empty) // len(steps)
    assert empty == [rows for rows in steps for _ in range(layers)]


class Stop(StoppingCriteria):
    """Row 0 ends with a token; what it would say goes on, where there is no end of a text."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **more):
        return input_ids[:, -1] == self.token


class Mean(LogitsProcessor):
    """What a row says depends on all rows."""

    def __call__(self, input_ids, scores):
        return scores + scores.mean(0, keepdim=True)


def look(module, args, output):
    """A hook."""


def loop(model, input_ids, **given):
    return model._sample(input_ids, **given)


@pytest.mark.parametrize(
    "more",
    [
        dict(num_beams=2),
        dict(prompt_lookup_num_tokens=3),
        dict(output_logits=True, return_dict_in_generate=True),
        dict(cache=True),
        dict(exact=True),
        dict(hook=True),
        dict(criterion=True),
        dict(stopping_criteria=[EosTokenCriteria(0)]),
        dict(logits_processor=LogitsProcessorList([Mean()])),
        dict(custom_generate=loop),
    ],
    ids=" ".join,
)
def test_where_more_than_tokens_may_be_seen_rows_read_on(empty, more):
    model, (ids, mask) = tiny("qwen2"), left_padded(WIDTH, (0, 9, 13))
    if "prompt_lookup_num_tokens" in more:
        ids, mask = ids[:1], mask[:1]
    given = {CACHE: DynamicCache()} if more.pop("cache", False) else {}
    hook = more.pop("hook", False) and model.model.layers[1].mlp.register_forward_hook(look)
    exact = more.pop("exact", False)
    with hook or nullcontext(), hfsparse.patch(model, families.growing(model), exact=exact):
        eos = early(model, *left_padded(WIDTH, (0, 9, 13)))
        more |= (
            dict(stopping_criteria=[Stop(eos[0])])
            if more.pop("criterion", 0)
            else dict(eos_token_id=eos)
        )
        run(model, ids, mask, **given, **more)
    assert empty
    assert not any(map(any, empty))
