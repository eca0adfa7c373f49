"""Undoing a patch gives back the very same model; failing to patch never touches it."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import LlamaForSequenceClassification

import hfsparse
from hfsparse.errors import PatchError
from hfsparse.patcher.handle import Patched
from hfsparse.patcher.state import is_patched
from hfsparse.plan import PlanError, PlanMismatch
from tests.patcher.families import (
    FAMILIES,
    fresh,
    full,
    left_padded,
    mixed,
    plan_of,
    streaming,
    tiny,
    tokens,
)
from tests.patcher.runs import close, far, forward, generate
from tests.support.models import tiny as supported

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def trace(model) -> dict:
    """Everything that a patch could leave behind."""
    left = {}
    for name, module in model.named_modules():
        left[name] = sorted(module.__dict__), [len(module.__dict__[h]) for h in HOOKS]
        if hasattr(module, "config"):
            left[name] += module.config._attn_implementation, module.config.to_json_string()
    left["config"] = json.dumps(model.config.to_dict(), default=str, sort_keys=True)
    left["generation"] = model.generation_config.to_json_string() if model.can_generate() else None
    return left


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_plan_generates_the_unpatched_models_tokens(family):
    model = tiny(family)
    ids, mask = left_padded(60)
    want = generate(model, ids, mask, new=20)
    for plan in (None, full(model)):
        with hfsparse.patch(model, plan):
            got = generate(model, ids, mask, new=20)
        assert got.sequences.tolist() == want.sequences.tolist()
        close(torch.stack(got.logits, 1), torch.stack(want.logits, 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_undo_leaves_nothing_and_logits_are_bit_equal(family, implementation):
    model, ids = fresh(family), tokens(2, 90)
    model.set_attn_implementation(implementation)
    before, logits = trace(model), forward(model, ids).logits
    handle = hfsparse.patch(model, mixed(model))
    assert trace(model) != before
    far(forward(model, ids).logits, logits)
    generate(model, ids, new=3)
    handle.undo()
    assert trace(model) == before
    assert torch.equal(forward(model, ids).logits, logits)
    generate(model, ids, new=3)


def test_a_plan_is_taken_from_its_file(tmp_path):
    model, ids = tiny("llama"), tokens(1, 80)
    plan = mixed(model)
    plan.save(tmp_path / "plan.yaml")
    with hfsparse.patch(model, plan):
        want = forward(model, ids).logits
    with hfsparse.patch(model, tmp_path / "plan.yaml"):
        assert torch.equal(forward(model, ids).logits, want)
    far(want, forward(model, ids).logits)


def test_leaving_the_context_undoes_the_patch_also_after_an_exception():
    model, ids = tiny("llama"), tokens(1, 50)
    before, logits = trace(model), forward(model, ids).logits

    def fail_inside():
        with hfsparse.patch(model, mixed(model)):
            forward(model, ids)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert trace(model) == before
    assert torch.equal(forward(model, ids).logits, logits)


def test_undo_twice_does_nothing():
    model = tiny("llama")
    handle = hfsparse.patch(model)
    handle.undo()
    handle.undo()
    assert not is_patched(model)


def test_a_stale_handle_leaves_a_later_patch_alone():
    model = tiny("llama")
    stale = hfsparse.patch(model)
    stale.undo()
    with hfsparse.patch(model, streaming(model)) as later:
        stale.undo()
        assert is_patched(model)
        for ask in (stale.stats, stale.explain, stale.reset_stats):
            with pytest.raises(PatchError, match="no longer on the LlamaForCausalLM"):
                ask()
        later.stats()


@pytest.mark.parametrize("plan", [5, {"layers": {}}, b"plan.yaml", True])
def test_what_is_no_plan_is_refused_in_a_sentence(plan):
    model = tiny("llama")
    for name in ("fuse", "exact"):
        with pytest.raises(PatchError, match=f"{name} is 8: give True or False"):
            hfsparse.patch(model, **{name: 8})
    with pytest.raises(PatchError, match=f"the plan is a {type(plan).__name__}: give a Plan"):
        hfsparse.patch(model, plan)
    assert not is_patched(model)


def test_patching_twice_raises_and_keeps_the_first_patch():
    model, ids = tiny("llama"), tokens(1, 50)
    with hfsparse.patch(model, streaming(model)):
        logits = forward(model, ids).logits
        for again in (model, model.model):
            with pytest.raises(PatchError, match=r"is patched already: call handle\.undo\(\)"):
                hfsparse.patch(again)
        assert torch.equal(forward(model, ids).logits, logits)


def test_unpatch_needs_no_handle():
    model = tiny("llama")
    before = trace(model)
    hfsparse.patch(model, streaming(model))
    hfsparse.unpatch(model)
    assert trace(model) == before


def test_unpatching_an_unpatched_model_is_one_clear_sentence():
    with pytest.raises(PatchError, match=r"LlamaForCausalLM is not patched: call hfsparse\.patch"):
        hfsparse.unpatch(tiny("llama"))


def test_unpatching_a_part_of_a_patched_model_is_refused():
    model = tiny("llama")
    with hfsparse.patch(model):
        with pytest.raises(PatchError, match="part of a patched model"):
            hfsparse.unpatch(model.model)
        generate(model, tokens(1, 5), new=2)


@pytest.mark.parametrize("thing", [None, torch.nn.Linear(2, 2), "model"], ids=repr)
def test_patching_something_else_is_one_clear_sentence(thing):
    with pytest.raises(PatchError, match=f"got {type(thing).__name__}: give a transformers model"):
        hfsparse.patch(thing)


class Adapter(torch.nn.Module):
    """As a PeftModel: no model of transformers, but around one."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (Adapter, r"got Adapter.*: patch its get_base_model\(\), and go on with the Adapter"),
        (torch.nn.DataParallel, "patch its module, and go on with the DataParallel"),
        (lambda model: SimpleNamespace(model=model), "patch its model, and go on"),
    ],
    ids=["peft", "data parallel", "pipeline"],
)
def test_what_only_holds_a_model_is_told_where_it_is(wrap, told):
    model = tiny("llama")
    for call in (hfsparse.patch, hfsparse.unpatch, hfsparse.explain):
        with pytest.raises(PatchError, match=told):
            call(wrap(model))
    assert not is_patched(model)


def test_a_handle_taken_for_the_model_shows_the_right_way():
    model = tiny("llama")
    handle = hfsparse.patch(model)
    right = r"write handle = hfsparse\.patch\(model, plan\), not model = "
    with pytest.raises(TypeError, match=right):
        handle(tokens(1, 5))
    for name in ("generate", "config", "eval", "to"):
        with pytest.raises(AttributeError, match=rf"{right}.*use model\.{name}"):
            getattr(handle, name)
        assert not hasattr(handle, name)
    with pytest.raises(AttributeError, match="'Patched' object has no attribute 'stat'"):
        handle.stat  # noqa: B018
    for call in (hfsparse.patch, hfsparse.unpatch, hfsparse.explain):
        with pytest.raises(PatchError, match=rf"\(handle\.model\).*{right}"):
            call(handle)
    assert copy.copy(handle).model is model
    handle.undo()


def test_a_plan_for_another_model_is_refused_and_the_model_left_alone():
    model, other = tiny("llama"), tiny("qwen3")
    before = trace(model)
    with pytest.raises(PlanMismatch, match="plan was made for Qwen3ForCausalLM"):
        hfsparse.patch(model, full(other))
    assert trace(model) == before


def test_a_plan_for_another_rope_needs_leave():
    model = tiny("llama")
    other = copy.deepcopy(model.config)
    if hasattr(other, "rope_parameters"):
        other.rope_parameters = {**other.rope_parameters, "rope_theta": 5e5}
    else:  # 4.57
        other.rope_theta = 5e5
    plan = streaming(type(model)(other))
    with pytest.raises(PlanMismatch, match="fingerprint"):
        hfsparse.patch(model, plan)
    with hfsparse.patch(model, plan, allow={"fingerprint"}):
        forward(model, tokens(1, 9))


def test_a_ring_in_a_layer_with_its_own_window_is_refused_and_the_model_left_alone():
    model = tiny("mistral-window")
    before = trace(model)
    rings = plan_of(
        model, lambda i, w: (["s"] * 4, ["s"] * 2, ["ring"] * 2), s=("streaming", dict(recent=5))
    )
    with pytest.raises(PlanError, match=r"own window of 40 tokens.*write full"):
        hfsparse.patch(model, rings)
    assert trace(model) == before


def test_a_patch_that_fails_half_way_is_taken_back(monkeypatch):
    model = tiny("llama")
    before, logits = trace(model), forward(model, tokens(1, 9)).logits

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(model.model, "register_forward_hook", fail)
    with pytest.raises(MemoryError):
        hfsparse.patch(model, streaming(model))
    monkeypatch.undo()
    assert trace(model) == before
    assert torch.equal(forward(model, tokens(1, 9)).logits, logits)


def test_save_pretrained_while_patched_saves_the_unpatched_model(tmp_path):
    model, ids = tiny("llama"), tokens(1, 40)
    model.save_pretrained(tmp_path / "before")
    with hfsparse.patch(model, streaming(model)):
        forward(model, ids)
        model.save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()
    assert len(list((tmp_path / "patched").iterdir())) == len(list((tmp_path / "before").iterdir()))
    loaded = type(model).from_pretrained(tmp_path / "patched")
    assert not is_patched(loaded)
    assert torch.equal(forward(loaded, ids).logits, forward(model, ids).logits)


def test_a_copy_of_a_patched_model_is_patched_and_undone_by_itself():
    model, ids = tiny("llama"), tokens(1, 60)
    dense = forward(model, ids).logits
    before = trace(model)
    with hfsparse.patch(model, streaming(model)):
        sparse = generate(model, ids)
        twin = copy.deepcopy(model)
        assert generate(twin, ids).sequences.tolist() == sparse.sequences.tolist()
        hfsparse.unpatch(twin)
        assert trace(twin) == before
        assert torch.equal(forward(twin, ids).logits, dense)
        assert is_patched(model)
        assert generate(model, ids).sequences.tolist() == sparse.sequences.tolist()
    twin = copy.deepcopy(twin)
    assert torch.equal(forward(twin, ids).logits, forward(model, ids).logits)


@pytest.mark.parametrize("undo", [Patched.undo, lambda handle: hfsparse.unpatch(handle.model)])
@pytest.mark.parametrize("head", [None, LlamaForSequenceClassification])
def test_a_model_that_generates_nothing_is_undone_too(head, undo):
    causal = fresh("llama")
    model, ids = causal.model if head is None else head(causal.config).eval(), tokens(1, 50)
    before, want = trace(model), model(ids)[0]
    handle = hfsparse.patch(copy.deepcopy(model))
    handle.model(ids)
    undo(handle)
    assert trace(handle.model) == before
    assert torch.equal(handle.model(ids)[0], want)


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "LinearAttentionLayer"), reason="refused there"
)
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_a_hybrids_decoder_is_patched_by_itself(family):
    model, ids = supported(family).get_decoder(), tokens(1, 50)
    want = forward(model, ids)[0]
    with hfsparse.patch(model):
        close(forward(model, ids)[0], want)
    assert torch.equal(forward(model, ids)[0], want)


def test_a_model_around_a_patched_decoder_is_left_alone():
    model = fresh("llama")
    before = trace(model)
    handle = hfsparse.patch(model.model)
    with pytest.raises(PatchError, match="part of a patched model"):
        hfsparse.unpatch(model)
    handle.undo()
    assert trace(model) == before
