"""Ways of calling a patched model: right, or refused in a sentence, and the model as it was."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import hfsparse
from hfsparse.errors import PatchError
from hfsparse.runtime.cache import layer as cache_layer
from hfsparse.runtime.cache.ring import SLACK, Ring
from tests.patcher.families import (
    SIZES,
    fresh,
    full,
    left_padded,
    mixed,
    streaming,
    tiny,
    tokens,
)
from tests.patcher.runs import close, continue_with, far, forward, generate, same_generation
from tests.patcher.test_generation import checkpointing
from tests.patcher.test_saved import same_bits
from tests.patcher.test_undo import trace

PACKED = torch.cat([torch.arange(25), torch.arange(35)])[None]


def rings(cache) -> list[Ring]:
    return [s for layer in cache.layers for s in layer.stores if isinstance(s, Ring)]


# -- what a call costs the host --------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts them, but those that fill new buffers with NaN in tests."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) != "fill_":
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("plan", [full, partial(streaming, below=(9999,) * 3)])
def test_dense_prompts_dispatch_few_operators_more_than_the_stock_model(plan):
    """In no layer more: no lists, grids or counts, and no more copies than the stock cache."""
    model, ids = fresh("llama").eval(), tokens(1, 128)
    model.set_attn_implementation("sdpa")

    def counted(cached: bool) -> int:
        forward(model, ids, use_cache=cached)
        with Operators() as found:
            forward(model, ids, use_cache=cached)
        return found.seen.total()

    stock = counted(False), counted(True)
    with hfsparse.patch(model, plan(model)):
        assert counted(False) <= stock[0] + 3
        assert counted(True) <= stock[1] + 3


def calls_of(run) -> int:
    """Calls of functions of hfsparse, in what runs; comprehensions are calls in some Pythons."""
    ours, seen = str(Path(hfsparse.__file__).parent), 0

    def note(frame, event, given):
        nonlocal seen
        code = frame.f_code
        named = code.co_filename.startswith(ours) and not code.co_name.startswith("<")
        seen += event == "call" and named

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen


@pytest.mark.parametrize("plan", [full, partial(streaming, below=(9999,) * 3)])
def test_a_layer_of_a_short_prompt_makes_few_calls_of_python(plan):
    """Such a prompt's time is the host's."""
    found, ids = [], tokens(1, 128)
    for layers in (2, 6):
        model = fresh("llama", num_hidden_layers=layers)
        with hfsparse.patch(model, plan(model)), torch.inference_mode():
            forward(model, ids)
            found.append(calls_of(partial(forward, model, ids)))
    assert 0 < found[1] - found[0] <= 4 * 17


@pytest.mark.parametrize("length", [100, 128])
@pytest.mark.parametrize("plan", [full, partial(mixed, below=(9999,) * 3)])
def test_the_step_behind_a_prompt_that_waits_lays_each_store_out_once(plan, length):
    """Also where the prompt is a whole number of pages."""
    model = fresh("llama")
    with hfsparse.patch(model, plan(model)):
        for _ in range(2):  # the first time makes what all caches share
            cache = forward(model, tokens(1, length)).past_key_values
            with Operators() as first:
                forward(model, tokens(1, 1), None, cache)
        with Operators() as next_one:
            forward(model, tokens(1, 1), None, cache)
    stores = [store for layer in cache.layers for store in layer.stores]
    more = Counter(first.seen)
    more.subtract(next_one.seen)
    assert more["empty"] + more["zeros"] == sum(len(store.tensors()) for store in stores)
    if plan is full:  # a buffer of keys and one of values, their slots, the copies, and a table
        assert more.total() <= 7 * len(stores)


LATER = {  # new tokens of the next call, and what is done to the cache before
    "a step": (1, lambda cache: None),
    "a chunk": (20, lambda cache: None),
    "a crop": (1, lambda cache: cache.crop(-3)),
    "other rows": (1, lambda cache: cache.batch_select_indices(torch.tensor([0, 0]))),
    "a copy": (1, lambda cache: copy.deepcopy(cache)),
}


@pytest.mark.parametrize("below", [0, 60, 9999])
@pytest.mark.parametrize("what", LATER)
def test_a_prompt_that_waits_is_stored_as_one_that_does_not(what, below, monkeypatch):
    """Bit by bit, however it goes on; rows lie on both sides of `below`, and one passes it. The
    longer one is a whole number of pages."""
    model, found, (new, change) = fresh("llama"), [], LATER[what]
    for short in (cache_layer.SHORT, 0):
        monkeypatch.setattr(cache_layer, "SHORT", short)
        ids, mask = left_padded(64, pads=(0, 6))
        with hfsparse.patch(model, mixed(model, below=(below,) * 3)) as handle:
            cache = forward(model, ids, mask).past_key_values
            seen = [handle.stats().kv_bytes]
            cache = change(cache) or cache
            mask = mask[:, : cache.get_seq_length()]
            mask = mask[:1].expand(2, -1) if what == "other rows" else mask
            for n in (new, 1, 1, 1):
                mask = continue_with(ids, mask, n)
                seen.append(forward(model, tokens(2, n, seed=n), mask, cache).logits)
            found.append([*seen, *handle.stats().layers, *(x.state() for x in cache.layers)])
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


# -- a cache where the model itself keeps one -----------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"use_cache": True}, {"use_cache": False}])
@pytest.mark.parametrize("how", ["eval", "train", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_packed_rows_are_the_stock_models_or_refused(family, how, more):
    """Whether transformers looks for packs hangs on whether the model makes a cache."""
    model, ids = fresh(family).train(how != "eval"), tokens(1, 60)
    if how == "checkpointing":
        checkpointing(model, True)
    want = model(ids, position_ids=PACKED, **more)
    alone = [model(part, **more).logits for part in ids.split([25, 35], 1)]
    apart = (torch.cat(alone, 1) - want.logits).abs().max() < 1e-3
    with hfsparse.patch(model):
        if apart:
            with pytest.raises(PatchError, match="packed sequences"):
                model(ids, position_ids=PACKED, **more)
        else:
            got = model(ids, position_ids=PACKED, **more)
            close(got.logits.detach(), want.logits.detach())
    assert apart or (how != "checkpointing" and more.get("use_cache") is not False)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("how", ["eval", "train"])
@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"return_dict": False}], ids=str)
def test_a_call_returns_a_cache_where_the_stock_model_does(family, how, more):
    model, ids = fresh(family).train(how == "train"), tokens(2, 30)
    want = model(ids, **more)
    with hfsparse.patch(model) as handle:
        got = model(ids, **more)
        assert type(got) is type(want)
        parts = [
            [type(x) for x in (out.values() if isinstance(out, dict) else out)]
            for out in (got, want)
        ]
        assert parts[0] == parts[1]
        cached = any(issubclass(kind, DynamicCache) for kind in parts[0])
        assert cached == bool(handle.stats().kv_bytes)
    model.config.use_cache = False
    with hfsparse.patch(model):
        assert model(ids).past_key_values is None


def test_a_model_that_copies_its_cache_for_loops_is_refused_in_training():
    """Dory copies layers of the cache that it makes; whose a copy is can't be told afterwards."""
    if not hasattr(transformers, "DoryForCausalLM"):
        pytest.skip("this transformers has no Dory")
    shape = dict(num_attention_heads=4, num_key_value_heads=2, n_recurrent_loops=2)
    parts = dict(n_input_layers=1, n_recurrent_layers=1, n_output_layers=1)
    kinds = dict(layer_types=["full_attention"] * 3)
    model = transformers.DoryForCausalLM(
        transformers.DoryConfig(**SIZES, **shape, **parts, **kinds)
    )
    model, ids = model.train(), tokens(1, 30)
    want = model(ids).logits.detach()
    with hfsparse.patch(model):
        with pytest.raises(PatchError, match=r"loops over layers.*pass use_cache=False"):
            model(ids)
        close(model(ids, use_cache=False).logits.detach(), want)


# -- drafts ---------------------------------------------------------------------------------------


# Plans that read the same in a draft's chunk as in single steps, with rings or windows.
rings_of = pytest.mark.parametrize(
    ("family", "plan"), [("llama", streaming), ("mistral-window", full)]
)

FIRST_OF_5 = transformers.__version__ == "5.0.0"


@pytest.mark.xfail(
    FIRST_OF_5,
    raises=TypeError,
    strict=True,
    reason="transformers 5.0.0 itself calls get_candidates without is_first_iteration there",
)
@rings_of
def test_drafts_by_the_models_first_layers(family, plan):
    model, ids = fresh(family), tokens(1, 80)
    before = trace(model)
    with hfsparse.patch(model, plan(model)):
        want = generate(model, ids, eos_token_id=1).sequences
        got = generate(model, ids, eos_token_id=1, assistant_early_exit=2).sequences
        assert got.tolist() == want.tolist()
        assert model.config.num_hidden_layers == 3
    left = trace(model)
    assert {**left, "generation": before["generation"]} == before  # 4.57 notes the last call's


@rings_of
def test_a_long_prompt_lookup_takes_back_more_than_a_rings_usual_slack(family, plan):
    """Most of the draft is wrong: the prompt repeats itself, the model does not."""
    model, ids = fresh(family), tokens(1, 60).repeat(1, 4)
    more = dict(new=70, eos_token_id=1)
    with hfsparse.patch(model, plan(model)):
        want = generate(model, ids, **more)
        got = generate(model, ids, prompt_lookup_num_tokens=50, **more)
        assert max(ring.slack for ring in rings(got.past_key_values)) > SLACK
        assert {ring.slack for ring in rings(want.past_key_values)} == {SLACK}
    kept = got.sequences[:, : want.sequences.shape[1]]
    assert kept.tolist() == want.sequences.tolist()


@pytest.mark.parametrize("patched", ["model", "helper", "both"])
@pytest.mark.parametrize(("schedule", "shift"), [("constant", 0.02), ("heuristic", 0.0)])
@rings_of
def test_an_assistant_may_draft_any_number_of_tokens(family, plan, schedule, shift, patched):
    """All of them wrong, and taken back; or all right, and ever more of them."""
    if FIRST_OF_5 and plan is full and patched == "helper":
        pytest.skip("transformers 5.0.0 itself takes nothing back of a stock window")
    wrong = shift > 0 or (plan is streaming and patched != "both")
    model, ids = fresh(family), tokens(1, 100)
    helper = copy.deepcopy(model)
    helper.get_output_embeddings().weight.data += shift
    helper.generation_config.num_assistant_tokens = 60
    helper.generation_config.num_assistant_tokens_schedule = schedule
    helper.generation_config.assistant_confidence_threshold = 0
    for one in {"model": [model], "helper": [helper], "both": [model, helper]}[patched]:
        hfsparse.patch(one, plan(one))

    def soon(said, scores):
        return torch.tensor([wrong and said.shape[1] > 103])

    more = dict(new=100, eos_token_id=1, stopping_criteria=[soon])
    want = generate(model, ids, **more).sequences
    got = generate(model, ids, assistant_model=helper, **more).sequences
    assert got[:, : want.shape[1]].tolist() == want.tolist()


# -- models that share, are copied, or are held by others -----------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_made_of_one_config_are_patched_apart(order):
    first = fresh("llama")
    second = type(first)(first.config).eval()
    models, ids = (first, second), tokens(1, 80)
    dense, before = [forward(m, ids).logits for m in models], [trace(m) for m in models]
    handles = [hfsparse.patch(first, streaming(first))]
    far(forward(first, ids).logits, dense[0])
    assert torch.equal(forward(second, ids).logits, dense[1])
    assert trace(second) == before[1]
    handles.append(hfsparse.patch(second, mixed(second)))
    for undone in order:
        handles[undone].undo()
        assert torch.equal(forward(models[undone], ids).logits, dense[undone])
        generate(models[1 - undone], ids, new=3)
    assert [trace(m) for m in models] == before
    assert first.config is second.config


def test_what_is_set_in_the_config_while_patched_stays():
    model = fresh("llama")
    config = model.config
    with hfsparse.patch(model):
        model.config.use_cache = False
        model.config.some_new_key = 3
        assert forward(model, tokens(1, 9)).past_key_values is None
    assert model.config is config
    assert (config.use_cache, config.some_new_key) == (False, 3)
    assert config._attn_implementation == "sdpa"


def test_a_model_made_of_a_patched_models_config_works_after_undo():
    model = fresh("llama")
    with hfsparse.patch(model):
        other = type(model)(model.config).eval()
        with pytest.raises(PatchError, match="without a plan: choose another"):
            forward(other, tokens(1, 9))
    forward(other, tokens(1, 9))


def test_the_parts_of_a_composite_config_stay_parts_of_it():
    from tests.support.models import tiny as build

    model = build("llava")
    before = trace(model)
    text = model.get_decoder().config
    with hfsparse.patch(model):
        own = model.get_decoder().config
        assert own is not text
        if model.config.get_text_config() is not text:
            assert model.config.get_text_config() is own
        model.set_attn_implementation("eager")
        with pytest.raises(PatchError, match="set to eager under an hfsparse patch"):
            forward(model, tokens(1, 9))
    assert model.get_decoder().config is text
    assert trace(model) == before


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_patched_model_that_was_pickled_is_patched_and_undone_by_itself(save):
    model, (ids, mask) = fresh("llama"), left_padded(90)
    dense, before, file = forward(model, ids, mask).logits, trace(model), io.BytesIO()
    with hfsparse.patch(model, mixed(model)) as handle:
        want = generate(model, ids, mask)
        (torch.save if save == "torch" else pickle.dump)(model, file)
        told = handle.explain()
    file.seek(0)
    loaded = torch.load(file, weights_only=False) if save == "torch" else pickle.load(file)
    same_generation(generate(loaded, ids, mask), want)
    assert hfsparse.explain(loaded) == told
    with pytest.raises(PatchError, match="is patched already"):
        hfsparse.patch(loaded)
    hfsparse.unpatch(loaded)
    assert trace(loaded) == before
    assert torch.equal(forward(loaded, ids, mask).logits, dense)


def test_a_pickled_model_runs_where_nothing_was_patched(tmp_path):
    model, ids = fresh("llama"), tokens(1, 60)
    with hfsparse.patch(model, streaming(model)):
        torch.save(model, tmp_path / "model.pt")
        want = generate(model, ids).sequences.tolist()
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
        f"ids = torch.tensor({ids.tolist()});"
        "print(model.generate(ids, max_new_tokens=12, do_sample=False).tolist())"
    )
    run = [sys.executable, "-c", code, tmp_path / "model.pt"]
    assert subprocess.run(run, capture_output=True, check=True, text=True).stdout.strip() == str(
        want
    )


def test_a_plan_that_is_edited_after_patch_changes_nothing():
    model, ids = tiny("llama"), tokens(1, 200)
    plan = mixed(model)
    with hfsparse.patch(model, plan) as handle:
        told, want = handle.explain(), forward(model, ids).logits
        plan.layers, plan.patterns = full(model).layers[:1], {}
        plan.made["model"] = "another"
        assert handle.explain() == told
        assert torch.equal(forward(model, ids).logits, want)
        assert handle.stats().kv_bytes > 0


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model])
def test_copies_for_data_parallel_are_refused(part):
    model = fresh("llama")
    with hfsparse.patch(model):
        replica = part(model)._replicate_for_data_parallel()
        with pytest.raises(PatchError, match=r"DataParallel runs copies.*one process a GPU"):
            replica(tokens(1, 9))
        forward(model, tokens(1, 9))


def test_a_second_static_cache_by_name():
    model, ids = tiny("llama"), tokens(2, 60)
    with hfsparse.patch(model, streaming(model)):
        want = generate(model, ids)
        turns = [generate(model, ids, cache_implementation="static") for _ in range(3)]
        for got in turns:
            same_generation(got, want)
        assert len({id(got.past_key_values) for got in turns}) == 3


# -- what is put around or on top of a patch ------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def gradients(model, call) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    ids = tokens(2, 120)
    call(ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_distributed_data_parallel_trains_as_the_model_alone(one_process):
    model = fresh("llama")
    with hfsparse.patch(model, mixed(model)):
        want = gradients(model, model)
        close(gradients(model, torch.nn.parallel.DistributedDataParallel(model)), want)


@pytest.mark.parametrize("first", ["patch", "shard"])
def test_fsdp_trains_as_the_model_alone(one_process, first):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, other = fresh("llama"), fresh("llama")
    with hfsparse.patch(other, mixed(other)):
        want = gradients(other, other)
    mesh = init_device_mesh("cpu", (1,))
    plan = mixed(model)
    if first == "patch":
        hfsparse.patch(model, plan)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if first == "shard":
        hfsparse.patch(model, plan, allow={"fingerprint"})
    model.zero_grad(set_to_none=True)
    ids = tokens(2, 120)
    model(ids, labels=ids).loss.backward()
    got = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    close(got, want)


def test_weights_moved_and_cast_under_a_patch():
    model, ids = fresh("llama"), tokens(1, 120)
    with hfsparse.patch(model, mixed(model)):
        want = generate(model, ids).sequences.tolist()
        model.to(torch.bfloat16)
        assert forward(model, ids).logits.dtype == torch.bfloat16
        generate(model, ids)
        model.float()
        assert len(generate(model, ids).sequences[0]) == len(want[0])


def test_hooks_of_accelerate_put_on_a_patched_model_and_taken_off():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, ids = fresh("llama"), tokens(1, 120)
    dense = forward(model, ids).logits
    for parts in (["model"], ["model.layers.0.self_attn", "model.layers.0"], [""]):
        handle = hfsparse.patch(model, mixed(model))
        want = generate(model, ids)
        for part in parts:
            add_hook_to_module(model.get_submodule(part), ModelHook())
        same_generation(generate(model, ids), want)
        handle.undo()
        assert torch.equal(forward(model, ids).logits, dense)
        for part in parts:
            remove_hook_from_module(model.get_submodule(part))
        assert torch.equal(forward(model, ids).logits, dense)
