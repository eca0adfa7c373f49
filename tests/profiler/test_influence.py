"""Influence by gradient against masking entries one by one, in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from hfsparse.profiler.measure import influence
from hfsparse.profiler.measure.capture import Seen, backward
from hfsparse.profiler.prompts.calibration import Prompt
from hfsparse.runtime.layer_plan import Logits
from tests import tiny
from tests.helpers import batch


def masked(seen: Seen, head: int) -> Tensor:
    """What the loss gains `[L, L]`, to first order, when a row loses one key, from the definition.

    A row of one key and no sink logit can't lose it: 0.
    """
    q, k, v, grad = (t[0].double() for t in (seen.q, seen.k, seen.v, seen.grad))
    kv = head // (q.shape[0] // k.shape[0])
    L, logits = q.shape[1], seen.logits
    scores = q[head] @ k[kv].T * logits.scale
    if logits.softcap:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
    without = scores[:, None].masked_fill(torch.eye(L).bool(), -torch.inf)  # [row, lost key, key]

    def out(scores: Tensor) -> Tensor:
        if logits.s_aux is None:
            return torch.softmax(scores, -1) @ v[kv]
        bare = logits.s_aux[head].double().expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, bare], -1), -1)[..., :-1] @ v[kv]

    gain = ((out(without) - out(scores)[:, None]) * grad[head][:, None]).sum(-1)
    return gain if logits.s_aux is not None else gain.nan_to_num(0)


@pytest.mark.parametrize(
    ("group", "softcap", "sinks"),
    [(1, None, False), (3, None, True), (4, 2.0, False)],
    ids=["mha", "gqa3-sinks", "gqa4-softcap"],
)
def test_influence_is_what_masking_entries_one_by_one_changes(monkeypatch, group, softcap, sinks):
    L, block, kv = 150, influence.BLOCK, 2 if group == 1 else 1
    monkeypatch.setattr(influence, "TILE", 2 * block)
    it = batch(L, group=group, kv_heads=kv)
    made = torch.Generator().manual_seed(5)
    grad = torch.randn(1, kv * group, L, it.v.shape[3], generator=made)
    s_aux = torch.randn(kv * group, generator=made) if sinks else None
    q, k, v = (t[:1] for t in (it.q, it.k, it.v))
    found = influence.measure_influence(
        Seen(q * 2, k, v, grad * 0, grad, Logits(it.scale, softcap, s_aux), torch.arange(1), 0)
    )
    assert found.shape == (kv * group, 3, 3)
    for head in range(kv * group):
        each = masked(
            Seen(q * 2, k, v, grad, grad, Logits(it.scale, softcap, s_aux), None, 0), head
        )
        for i in range(3):
            for j in range(3):
                rows, keys = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                whole = float(each[rows, keys].abs().sum())
                assert float(found[head, i, j]) == pytest.approx(whole, rel=1e-4, abs=1e-4)


def test_influence_is_the_slope_of_the_loss_of_the_models_own_answer(monkeypatch):
    monkeypatch.setattr(influence, "BLOCK", 1)
    model = tiny.llama()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight *= 5.0 if name == "lm_head.weight" else 3.0
    text = torch.randint(2, 400, (1, 80), generator=torch.Generator().manual_seed(1))
    ids, keys = influence.append_answer(model, Prompt("text", text, (72, 80)))
    assert torch.equal(ids[:, :72], text[:, :72])
    with torch.no_grad():
        assert torch.equal(model(ids).logits[0, keys].argmax(1), ids[0, keys + 1])
    kept: list[Seen] = []
    layers = backward(
        model,
        ids,
        keys,
        influence._cross_entropy,
        lambda seen: kept.append(seen) or {"each": influence.measure_influence(seen).numpy()},
    )
    exact, step = deepcopy(model).double(), 0.1

    def loss(at: int, row: int, head: int, change: Tensor) -> float:
        def nudge(module, args):
            moved = args[0].clone()
            moved[0, row, head * 16 : (head + 1) * 16] += change
            return (moved,)

        hook = exact.model.layers[at].self_attn.o_proj.register_forward_pre_hook(nudge)
        with torch.no_grad():
            logits = exact(ids).logits[0, keys]
        hook.remove()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, keys + 1]))

    for at, head, row in ((0, 1, 40), (0, 3, 75), (1, 0, 74), (1, 2, 78)):
        seen = kept[1 - at]
        q, k, v = seen.q[0, head].double(), *(t[0, head // 2].double() for t in (seen.k, seen.v))
        scores = q[row] @ k[: row + 1].T * seen.logits.scale
        for key in torch.softmax(scores, 0).topk(2).indices.tolist():
            without = scores.clone()
            without[key] = -torch.inf
            change = (torch.softmax(without, 0) - torch.softmax(scores, 0)) @ v[: row + 1]
            slope = (loss(at, row, head, change * step) - loss(at, row, head, change * -step)) / (
                2 * step
            )
            assert abs(slope) > 1e-9
            assert layers[at]["each"][head, row, key] == pytest.approx(abs(slope), rel=2e-3)


def test_an_answer_ends_where_the_model_ends_it():
    model = tiny.llama()
    text = torch.randint(2, 400, (1, 80), generator=torch.Generator().manual_seed(1))
    whole, keys = influence.append_answer(model, Prompt("text", text, (60, 80)))
    assert keys.tolist() == list(range(59, 79))
    model.generation_config.eos_token_id = int(whole[0, 63])
    first = whole[0, 60:].tolist().index(int(whole[0, 63])) + 1
    cut, keys = influence.append_answer(model, Prompt("text", text, (60, 80)))
    assert keys.tolist() == list(range(59, 59 + first))
    assert torch.equal(cut[:, : 60 + first], whole[:, : 60 + first])


def test_an_answer_is_greedy_whatever_the_models_settings_say():
    model = tiny.llama()
    text = torch.randint(2, 400, (1, 80), generator=torch.Generator().manual_seed(1))
    plain, _ = influence.append_answer(model, Prompt("text", text, (60, 80)))
    brought = dict(
        num_beams=2, no_repeat_ngram_size=1, min_new_tokens=20, return_dict_in_generate=True
    )
    model.generation_config = GenerationConfig(eos_token_id=1, **brought)
    assert torch.equal(influence.append_answer(model, Prompt("text", text, (60, 80)))[0], plain)
