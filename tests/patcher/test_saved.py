"""Caches saved into folders: what goes on from one goes on bit for bit as from the cache itself."""

from __future__ import annotations

import copy
import shutil
from functools import partial

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import hfsparse
from hfsparse.errors import CacheError, UsageError
from hfsparse.models.sharding import Shard
from hfsparse.patcher import saved
from hfsparse.runtime.cache import host
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.cache.packed import PackedStore
from hfsparse.runtime.cache.ring import Ring
from hfsparse.runtime.cache.store import Store
from tests import hybrids, latents
from tests.patcher.families import (
    SIZES,
    choosing,
    evicting,
    fresh,
    full,
    growing,
    hosted,
    left_padded,
    mixed,
    packing,
    rotated,
    streaming,
    tiny,
    tokens,
)
from tests.patcher.runs import continue_with, forward, generate
from tests.selectors.plans import labelled, segmented
from tests.support.models import exists
from tests.support.models import tiny as supported


def dory():
    """Its middle layer runs twice a call, each time with a cache of its own."""
    torch.manual_seed(0)
    shape = dict(num_attention_heads=4, num_key_value_heads=2, n_recurrent_loops=2)
    parts = dict(n_input_layers=1, n_recurrent_layers=1, n_output_layers=1)
    kinds = ["full_attention"] * 3
    config = transformers.DoryConfig(**{**SIZES, **shape, **parts}, layer_types=kinds)
    return transformers.DoryForCausalLM(config).eval()


CASES = {  # what is kept: model, plan
    "everything": (partial(tiny, "qwen2"), full),
    "rings": (partial(tiny, "llama"), growing),
    "windows": (partial(tiny, "gemma3"), mixed),
    "evictions": (partial(tiny, "qwen3"), evicting),
    "4 bits": (partial(tiny, "qwen3"), partial(packing, every=True)),
    "fp8": (partial(tiny, "llama"), partial(packing, bits="fp8", below=(0, 0, 186), every=True)),
    "host memory": (partial(tiny, "llama"), partial(hosted, unit=16)),
    "host memory, 8 bits": (partial(tiny, "qwen3"), partial(hosted, bits=8)),
    "host memory, 4 bits": (partial(tiny, "qwen2"), partial(hosted, bits=4, bound=16)),
    "choices": (partial(tiny, "llama"), choosing),
    "labels": (partial(tiny, "qwen2"), labelled),
    "segments": (partial(tiny, "llama"), segmented),
    "latents": (latents.tiny, mixed),
    "shared keys": (partial(supported, "gemma4_shared"), streaming),
    "loops": (dory, streaming),
    "recurrent states": (partial(hybrids.hybrid, "qwen3_5"), hybrids.rings_and_pages),
    "states beside keys": (partial(hybrids.hybrid, "falcon_h1"), hybrids.rings_and_pages),
    "convolutions": (partial(hybrids.hybrid, "lfm2"), hybrids.rings_and_pages),
}
THERE = {  # of the cases that not every transformers has
    "latents": lambda: latents.exists("deepseek_v3"),
    "shared keys": lambda: exists("gemma4_shared"),
    "loops": lambda: hasattr(transformers, "DoryForCausalLM"),
    "recurrent states": lambda: hybrids.known("qwen3_5"),
    "states beside keys": lambda: hybrids.known("falcon_h1"),
    "convolutions": lambda: hybrids.known("lfm2"),
}


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """A host without a GPU stands for both memories."""
    monkeypatch.setattr(host, "why_not", lambda device: None)


def case(name: str):
    """Its model and plan."""
    if not THERE.get(name, bool)() and name in THERE:
        pytest.skip("not in this transformers")
    make, plan = CASES[name]
    model = make()
    return model, plan(model)


def same_bits(got, want) -> bool:
    """Whether two states are of the same numbers, NaN included."""
    if isinstance(want, Tensor):
        alike = got.dtype == want.dtype and got.shape == want.shape
        both = (t.contiguous().view(torch.uint8) for t in (got, want))
        return alike and torch.equal(*both)
    if isinstance(want, dict):
        return {*got} == {*want} and all(same_bits(got[x], want[x]) for x in want)
    if isinstance(want, list):
        return len(got) == len(want) and all(map(same_bits, got, want))
    return got == want


def plain(x) -> dict:
    """What an object has, tensors and other objects by their kind; room that is left is its own."""
    kinds = (bool, int, float, str, list, tuple)
    held = {name: v for name, v in vars(x).items() if name not in ("reserve", "sizes", "_stores")}
    return {name: v if isinstance(v, kinds) else type(v) for name, v in held.items()}


def whole(cache, loaded) -> None:
    """Nothing that a layer or a store has was left behind."""
    assert len(loaded.layers) == len(cache.layers)
    for ours, wanted in zip(loaded.layers, cache.layers, strict=True):
        assert type(ours) is type(wanted)
        if not isinstance(wanted, CacheLayer):
            continue
        assert same_bits(ours.state(), wanted.state())
        assert plain(ours) == plain(wanted)
        for store, other in zip(ours.stores, wanted.stores, strict=True):
            assert type(store) is type(other)
            assert plain(store) == plain(other)


def cropped(cache, drop: int) -> str:
    """What taking back so many tokens says."""
    try:
        cache.crop(-drop)
    except (CacheError, RuntimeError) as refusal:
        return str(refusal)
    return "done"


@pytest.mark.parametrize("name", CASES)
def test_what_goes_on_from_a_folder_goes_on_as_from_the_cache(name, tmp_path):
    """A padded prompt, a chunk, a question and an answer for which buffers grow; crops; copies."""
    model, plan = case(name)
    ids, mask = left_padded(length := 310 if name == "segments" else 180)
    asked, long = tokens(3, length + 5), continue_with(ids, mask, 5)
    asked[:, :length] = ids
    with hfsparse.patch(model, plan) as handle:
        cache = forward(model, ids[:, :-5], mask[:, :-5]).past_key_values
        forward(model, ids[:, -5:], mask, cache)
        for layer in cache.layers if name == "rings" else ():
            layer.keep(50)  # for drafts
        handle.save(cache, tmp_path / "saved", tokens=ids)
        loaded = handle.load(tmp_path / "saved", tokens=asked)
        whole(cache, loaded)
        runs = copy.deepcopy(loaded), copy.deepcopy(cache)
        told, other = (cropped(each, 3) for each in runs)
        assert told == other
        if told == "done":
            got, want = (forward(model, ids[:, :1], mask[:, :-2], each).logits for each in runs)
            assert torch.equal(got, want)
        got, want = (generate(model, asked, long, cache=x, new=9) for x in (loaded, cache))
    assert got.sequences.tolist() == want.sequences.tolist()
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))


def kinds(of: type = Store) -> set[type]:
    return {of, *(kind for each in of.__subclasses__() for kind in kinds(each))}


def test_every_kind_of_store_is_saved_here():
    """A new kind that says what is kept of it needs a case above; one that doesn't is refused."""
    held = set()
    for name in CASES:
        if name in THERE and not THERE[name]():
            continue
        with hfsparse.patch(*case(name)) as handle:
            layers = [each.new_cache() for each in handle._own_state().layers]
        held |= {type(store) for layer in layers for store in layer.stores}
    saying = {kind for kind in kinds() if "state" in vars(kind)}
    assert held == saying - {Store, PackedStore, host.HostStore}


def test_a_store_that_does_not_say_what_is_kept_of_it_is_refused(tmp_path):
    class Other(Ring):
        pass

    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)) as handle:
        cache = filled(model)
        next(s for s in cache.layers[1].stores if type(s) is Ring).__class__ = Other
        with pytest.raises(CacheError, match="keys in a Other can't be saved yet: use a plan"):
            handle.save(cache, tmp_path / "saved")
    assert not [*tmp_path.iterdir()]


def filled(model):
    return forward(model, tokens(2, 90)).past_key_values


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a cache of `streaming` on the tiny Llama, saved with its tokens."""
    folder, model = tmp_path_factory.mktemp("kept") / "saved", tiny("llama")
    with hfsparse.patch(model, streaming(model)) as handle:
        handle.save(filled(model), folder, tokens=tokens(2, 90))
    return folder


def tuned():
    model = fresh("llama")
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    return model


@pytest.mark.parametrize(
    ("make", "plan", "named"),
    [
        (partial(tiny, "llama"), mixed, "plan sha256"),
        (partial(tiny, "llama"), full, "plan sha256"),
        (partial(rotated, "linear"), None, "fingerprint sha256"),
        (lambda: fresh("llama").bfloat16(), streaming, "dtype float32, and here it is bfloat16"),
        (tuned, streaming, "weights "),
    ],
    ids=["another plan", "no plan", "another rope", "another dtype", "other weights"],
)
def test_another_plan_or_model_is_refused(kept, make, plan, named):
    model = make()
    if plan is None:  # made for the Llama, and allowed
        plan = partial(streaming, tiny("llama"))
        given = hfsparse.patch(model, plan(), allow={"fingerprint"})
    else:
        given = hfsparse.patch(model, plan(model))
    with (
        given as handle,
        pytest.raises(CacheError, match=f"saved with {named}.*or read the prompt"),
    ):
        handle.load(kept)


def test_a_rank_of_several_takes_no_other_heads(kept, monkeypatch):
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)) as handle:
        monkeypatch.setattr(handle._patch, "shard", Shard(1, 2))
        with pytest.raises(CacheError, match="heads all, and here it is rank 1 of 2"):
            handle.load(kept)


def test_tokens_are_compared(kept, tmp_path):
    model, ids = tiny("llama"), tokens(2, 90)
    with hfsparse.patch(model, streaming(model)) as handle:
        assert handle.load(kept).get_seq_length() == 90
        handle.load(kept, tokens=torch.cat([ids, ids], 1))
        other = ids.clone()
        other[1, 80] += 1
        with pytest.raises(CacheError, match="read from other tokens than these begin with"):
            handle.load(kept, tokens=other)
        with pytest.raises(UsageError, match="tokens are of type str: give ids"):
            handle.load(kept, tokens="a text")
        with pytest.raises(UsageError, match="tokens are of type str: give ids"):
            handle.load(kept, tokens="a text")
        for wrong in (ids[:, :89], ids[:1], ids[0], ids.float()):
            with pytest.raises(UsageError, match="the cache holds 2 rows of 90 columns: give"):
                handle.load(kept, tokens=wrong)
        handle.save(filled(model), tmp_path / "bare")
        with pytest.raises(CacheError, match="saved without its tokens"):
            handle.load(tmp_path / "bare", tokens=ids)


def shorten(file):
    file.write_bytes(file.read_bytes()[:-1])


def change(at: int, file):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "error", "match"),
    [
        ("layer-001.safetensors", shorten, CacheError, "was cut short or changed"),
        ("layer-001.safetensors", partial(change, 3), CacheError, "was cut short or changed"),
        ("layer-001.safetensors", partial(change, 40), CacheError, "was cut short or changed"),
        ("layer-001.safetensors", lambda file: file.unlink(), UsageError, "can't read layer-001"),
        ("cache.json", shorten, UsageError, "can't read cache.json .* handle.save"),
        ("cache.json", lambda f: f.write_text('{"format": 1}'), CacheError, "was changed since"),
        (
            "cache.json",
            lambda f: f.write_text(f.read_text().replace('"seen": 90', '"seen": 91', 1)),
            CacheError,
            "was changed since",
        ),
        ("cache.json", lambda file: file.unlink(), UsageError, "can't read cache.json"),
    ],
)
def test_what_was_damaged_is_refused(kept, tmp_path, name, damage, error, match):
    shutil.copytree(kept, folder := tmp_path / "copy")
    damage(folder / name)
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)) as handle, pytest.raises(error, match=match):
        handle.load(folder)


def test_another_format_is_refused(kept, tmp_path, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(saved, "FORMAT", 2)
    told = r"format 1 of hfsparse .*, this one reads format 2"
    with hfsparse.patch(model, streaming(model)) as handle, pytest.raises(CacheError, match=told):
        handle.load(kept)


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    model, folder = tiny("llama"), tmp_path / "saved"
    with hfsparse.patch(model, streaming(model)) as handle:
        cache = filled(model)
        folder.mkdir()  # an empty one is as good as none
        handle.save(cache, folder)
        with pytest.raises(UsageError, match=r"holds a saved cache.*overwrite=True"):
            handle.save(cache, folder)
        forward(model, tokens(2, 1), cache=cache)
        save_file, calls = saved.save_file, iter(range(9))

        def full_disk(tensors, file):
            save_file(tensors, file)
            if next(calls) == 1:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(saved, "save_file", full_disk)
            for at in (folder, tmp_path / "new"):
                calls = iter(range(9))
                with pytest.raises(UsageError, match=r"can't write into .*: No space left"):
                    handle.save(cache, at, overwrite=True)
        assert [*tmp_path.iterdir()] == [folder]
        assert handle.load(folder).get_seq_length() == 90
        handle.save(cache, folder, overwrite=True)
        assert [*tmp_path.iterdir()] == [folder]
        assert handle.load(folder).get_seq_length() == 91
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("words")
        for mine in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
            with pytest.raises(UsageError, match="is there and is no saved cache"):
                handle.save(cache, mine, overwrite=True)
        with pytest.raises(UsageError, match=r"can't write into .*: No such file"):
            handle.save(cache, tmp_path / "none" / "saved")


def test_what_this_patch_did_not_fill_is_not_saved(tmp_path):
    model = tiny("llama")
    stock = filled(model)
    with hfsparse.patch(model, streaming(model)) as handle:
        former = filled(model)
        for cache in (stock, DynamicCache(), None, former.layers[0]):
            with pytest.raises(CacheError, match="holds nothing that hfsparse could save: give"):
                handle.save(cache, tmp_path / "saved")
        broken = filled(model)
        broken.layers[-1].seen += 1
        with pytest.raises(CacheError, match="this cache is broken"):
            handle.save(broken, tmp_path / "saved")
        broken.layers[1] = stock.layers[1]
        broken.layers[-1].seen -= 1
        with pytest.raises(CacheError, match="layer 1 keeps its keys in a DynamicLayer"):
            handle.save(broken, tmp_path / "saved")
    told = "filled under another patch: save it by"
    with hfsparse.patch(model, streaming(model)) as other, pytest.raises(CacheError, match=told):
        other.save(former, tmp_path / "saved")
    assert not [*tmp_path.iterdir()]


def test_each_layer_is_loaded_where_the_models_layer_runs(kept, monkeypatch):
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)) as handle:
        there = handle.load(kept, device="meta").layers
        assert {t.device.type for x in there for s in x.stores for t in s.tensors()} == {"meta"}
        with pytest.raises(UsageError, match="device nowhere can't be used"):
            handle.load(kept, device="nowhere")
        second = [*model.model.layers[1].modules()]
        meta, cpu = torch.device("meta"), torch.device("cpu")
        monkeypatch.setattr(saved, "device_of", lambda m: meta if m in second else cpu)
        found = [layer.stores[0].k.device.type for layer in handle.load(kept).layers]
        assert found == ["cpu", "meta", "cpu"]


@pytest.mark.parametrize("plan", [partial(packing, every=True), evicting])
def test_in_bfloat16_too(plan, tmp_path):
    model, ids = fresh("llama").bfloat16(), tokens(1, 150)
    with hfsparse.patch(model, plan(model)) as handle, torch.inference_mode():
        cache = forward(model, ids).past_key_values
        handle.save(cache, tmp_path / "saved")
        loaded = handle.load(tmp_path / "saved")
        whole(cache, loaded)
    with hfsparse.patch(model, plan(model)) as handle:  # another patch of the same plan
        loaded = handle.load(tmp_path / "saved")
        got = generate(model, torch.cat([ids, ids[:, :5]], 1), cache=loaded, new=8)
        cache = forward(model, ids).past_key_values
        want = generate(model, torch.cat([ids, ids[:, :5]], 1), cache=cache, new=8)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
