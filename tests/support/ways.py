"""Ways of using a model. Each runs the same way patched and as the oracle, and compares.

`way(model, plan)` returns on success, raises on any difference. `StockCannot`: transformers itself,
unpatched, can't do this with this model. Where a cache is filled, copied, cropped or reordered, or
gradients flow, a way is tried with a plan that drops nothing, too; elsewhere the plan that drops
much has each kernel of the other, and is tried alone.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache, pipeline
from transformers.generation.streamers import BaseStreamer

import hfsparse
from hfsparse.errors import CacheError
from tests.patcher.families import full, left_padded, mixed, tokens
from tests.patcher.oracle import CACHE, oracle, whole_cache
from tests.patcher.runs import close, continue_with, far, forward, generate, same_generation
from tests.support.models import IMAGE, VISUAL
from tests.support.words import tokenizer

WAYS: dict[str, Callable] = {}
BOTH = (full, mixed)
LENGTH, NEW = 260, 4  # five pages: quest drops some


COMPILED = ("llama", "gemma3_text", "gpt_oss", "llava")  # ten seconds each


class StockCannot(Exception):
    """Transformers itself raises."""


class NotRun(Exception):
    """This way means nothing for this model, or would teach nothing new."""


def way(name: str, plans: tuple[Callable, ...] = (mixed,)):
    def note(function):
        function.plans = plans
        WAYS[name] = function
        return function

    return note


def both(model, plan, run, prompt=0):
    """(patched result, oracle's result): `run(model, cache arguments)` under each."""
    try:
        with oracle(model, plan, prompt):
            want = run(model, whole_cache(model))
    except AssertionError:
        raise
    except Exception as error:
        raise StockCannot(f"{type(error).__name__}: {error}") from error
    with hfsparse.patch(model, plan):
        return run(model, {}), want


def compare(model, plan, **more) -> None:
    """Generation from left-padded prompts: the same tokens and logits."""
    ids, mask = left_padded(LENGTH)
    same_generation(*both(model, plan, lambda m, c: generate(m, ids, mask, new=NEW, **c, **more)))


def own_cache(model) -> dict:
    return {CACHE: DynamicCache(config=model.config.get_text_config())}


@way("forward", BOTH)
def _(model, plan):
    ids, mask = left_padded(LENGTH)
    dense = forward(model, ids, mask).logits
    got, want = both(model, plan, lambda m, c: forward(m, ids, mask, **c).logits)
    close(got, want, mask)
    (close if plan == full(model) else far)(got, dense, mask)


@way("without cache")
def _(model, plan):
    ids, mask = left_padded(LENGTH)
    same_generation(*both(model, plan, lambda m, c: generate(m, ids, mask, new=2, use_cache=False)))


@way("greedy", BOTH)
def _(model, plan):
    compare(model, plan)


@way("sampling, num_return_sequences")
def _(model, plan):
    compare(model, plan, do_sample=True, num_return_sequences=2)


@way("beams", BOTH)
def _(model, plan):
    compare(model, plan, num_beams=2)


@way("guidance")
def _(model, plan):
    ids = tokens(1, LENGTH)
    same_generation(
        *both(model, plan, lambda m, c: generate(m, ids, new=NEW, guidance_scale=1.5, **c))
    )


@way("inputs_embeds")
def _(model, plan):
    ids, mask = left_padded(LENGTH)
    embeds = model.get_input_embeddings()(ids).detach()

    def run(m, c):
        return m.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **c
        )

    got, want = both(model, plan, run)
    assert got.tolist() == want.tolist()


@way("second turn", BOTH)
def _(model, plan):
    """9 new tokens on the filled cache are decoded, 40 are a chunk."""
    ids, mask = left_padded(LENGTH)

    def talk(m, c):
        turns = [generate(m, ids, mask, new=2, **c)]
        for new in (9, 40):
            said = torch.cat([turns[-1].sequences, tokens(3, new)], 1)
            whole = continue_with(ids, mask, said.shape[1] - ids.shape[1])
            turns.append(generate(m, said, whole, cache=turns[-1].past_key_values, new=2))
        return turns

    for got, want in zip(*both(model, plan, talk), strict=True):
        same_generation(got, want)


@way("chunks", BOTH)
def _(model, plan):
    """With a cache of one's own: transformers 5.0 makes none."""
    ids, mask = left_padded(LENGTH)
    run = partial(generate, ids=ids, mask=mask, new=NEW, prefill_chunk_size=65)
    same_generation(*both(model, plan, lambda m, c: run(m, **(c or own_cache(m))), LENGTH))


@way("own DynamicCache", BOTH)
def _(model, plan):
    ids, mask = left_padded(LENGTH)
    run = partial(generate, ids=ids, mask=mask, new=NEW)
    got, want = both(model, plan, lambda m, c: run(m, **(c or own_cache(m))))
    same_generation(got, want)
    assert got.past_key_values.get_seq_length() == LENGTH + NEW - 1


@way("StaticCache", BOTH)
def _(model, plan):
    ids, mask = left_padded(LENGTH)

    def run(m, c):
        made = StaticCache(config=m.config.get_text_config(), max_cache_len=300)
        return generate(m, ids, mask, new=NEW, **(c or {CACHE: made}))

    got, want = both(model, plan, run)
    same_generation(got, want)
    with hfsparse.patch(model, plan):
        by_name = generate(model, ids, mask, new=NEW, cache_implementation="static")
    same_generation(by_name, want)


@way("prompt lookup", BOTH)
def _(model, plan):
    """Repeating prompts: candidates are found, and taken back where they are wrong."""
    ids = tokens(1, LENGTH // 4).repeat(1, 4)
    run = partial(generate, ids=ids, new=12, prompt_lookup_num_tokens=4, eos_token_id=1)
    got, want = both(model, plan, lambda m, c: run(m, **c))
    assert got.sequences.tolist() == want.sequences.tolist()


@way("assistant", BOTH)
def _(model, plan):
    """A helper with other weights: most of what it proposes is taken back."""
    helper = copy.deepcopy(model)
    helper.get_output_embeddings().weight.data += 0.02
    ids = tokens(1, LENGTH)
    got, want = both(model, plan, lambda m, c: generate(m, ids, new=8, assistant_model=helper, **c))
    assert got.sequences.tolist() == want.sequences.tolist()


@way("streamer")
def _(model, plan):
    class Collect(BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    ids = tokens(1, LENGTH)

    def run(m, c):
        heard = Collect()
        out = generate(m, ids, new=NEW, streamer=heard, **c).sequences
        assert heard.seen == [*out[0].tolist(), "end"]
        return out.tolist()

    got, want = both(model, plan, run)
    assert got == want


@way("pipeline")
def _(model, plan):
    words = tokenizer()
    prompts = [words.decode(row[row != 0]) for row in left_padded(LENGTH)[0]]
    settings = dict(max_new_tokens=NEW, do_sample=False, batch_size=3, return_full_text=False)

    def run(m, c):
        return pipeline("text-generation", model=m, tokenizer=words)(prompts, **settings, **c)

    got, want = both(model, plan, run)
    assert got == want


@way("four threads")
def _(model, plan):
    prompts = [tokens(1, LENGTH + 7 * n, seed=n) for n in range(4)]

    def run(m, c):
        return [generate(m, ids, new=2).sequences.tolist() for ids in prompts]

    with hfsparse.patch(model, plan):
        want = run(model, {})
        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(generate, model, ids, new=2) for ids in prompts]
            got = [thread.result().sequences.tolist() for thread in threads]
    assert got == want


@way("copied prefix", BOTH)
def _(model, plan):
    ids, mask = left_padded(LENGTH)

    def run(m, c):
        prefix = forward(m, ids, mask, **c).past_key_values
        out = []
        for new in (1, 40, 1):
            whole = continue_with(ids, mask, new)
            end = tokens(3, new, seed=new)
            out.append(forward(m, end, whole, cache=copy.deepcopy(prefix)).logits)
        return out

    got, want = both(model, plan, run)
    for ours, truth in zip(got, want, strict=True):
        close(ours, truth)
    assert torch.equal(got[0], got[2])


@way("output_attentions")
def _(model, plan):
    """Warned: the weights are None, all else holds."""
    ids = tokens(1, LENGTH)
    with warnings.catch_warnings(record=True) as heard, hfsparse.patch(model, plan):
        warnings.simplefilter("always")
        want = forward(model, ids).logits
        assert not any("output_attentions" in str(w.message) for w in heard)
        out = forward(model, ids, output_attentions=True, output_hidden_states=True)
    assert any("hfsparse computes no attention weights" in str(w.message) for w in heard)
    assert torch.equal(out.logits, want)
    assert all(weights is None for weights in out.attentions or ())
    assert len(out.hidden_states) > 3


@way("gradients", BOTH)
def _(model, plan):
    embeds = model.get_input_embeddings()(tokens(2, LENGTH)).detach()

    def run(m, c):
        given = embeds.clone().requires_grad_()
        for module in m.modules():  # Qwen-VL keeps those of its last call, of another batch
            if "rope_deltas" in vars(module):
                module.rope_deltas = None
        m(inputs_embeds=given, use_cache=False).logits.square().mean().backward()
        m.zero_grad(set_to_none=True)
        return given.grad

    got, want = both(model, plan, run)
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


@way("torch.compile")
def _(model, plan):
    if model.config.model_type not in COMPILED:
        raise NotRun
    ids, mask = left_padded(LENGTH)
    try:
        compile_patched(model, plan, ids, mask)
    except Exception:
        compile_unpatched(model, ids, mask)
        raise
    finally:
        torch.compiler.reset()


def compile_patched(model, plan, ids, mask) -> None:
    """A prompt and a token compiled give what they give uncompiled."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), hfsparse.patch(model, plan):
        want = model(ids, attention_mask=mask, position_ids=places)
        torch.compiler.reset()
        fast = torch.compile(model.forward, backend="eager")
        got = fast(ids, attention_mask=mask, position_ids=places)
        close(got.logits, want.logits, mask)
        more = dict(attention_mask=continue_with(ids, mask, 1), position_ids=places[:, -1:] + 1)
        want = model(ids[:, -1:], **{CACHE: want.past_key_values}, **more).logits
        got = fast(ids[:, -1:], **{CACHE: got.past_key_values}, **more).logits
        close(got, want)


def compile_unpatched(model, ids, mask) -> None:
    """StockCannot where that fails."""
    torch.compiler.reset()
    try:
        with torch.no_grad():
            torch.compile(model.forward, backend="eager")(ids, attention_mask=mask)
    except Exception as error:
        raise StockCannot(f"{type(error).__name__}: {error}") from error


@way("save_pretrained")
def _(model, plan, tmp_path=None):
    ids = tokens(1, LENGTH)
    dense = forward(model, ids).logits
    model.save_pretrained(tmp_path / "before")
    with hfsparse.patch(model, plan):
        model.save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "patched").glob("*.json"):
        text = file.read_text()
        assert "hfsparse" not in text
        assert json.loads(text) == json.loads((tmp_path / "before" / file.name).read_text())
    loaded = type(model).from_pretrained(tmp_path / "patched", attn_implementation="eager")
    assert torch.equal(forward(loaded.eval(), ids).logits, dense)


@way("copied model")
def _(model, plan):
    """A deep copy of a patched model is patched, and both are undone apart."""
    ids, mask = left_padded(LENGTH)
    dense = forward(model, ids, mask).logits
    with hfsparse.patch(model, plan):
        want = generate(model, ids, mask, new=NEW)
        twin = copy.deepcopy(model)
        same_generation(generate(twin, ids, mask, new=NEW), want)
    same_generation(generate(twin, ids, mask, new=NEW), want)
    hfsparse.unpatch(twin)
    for undone in (model, twin):
        assert torch.equal(forward(undone, ids, mask).logits, dense)


@way("undo", BOTH)
def _(model, plan):
    """Bit-equal logits, and a cache of the patch refused."""
    ids, mask = left_padded(LENGTH)
    dense = forward(model, ids, mask).logits
    with hfsparse.patch(model, plan):
        cache = generate(model, ids, mask, new=NEW).past_key_values
    assert torch.equal(forward(model, ids, mask).logits, dense)
    with pytest.raises(CacheError, match="no longer on the model"):
        forward(model, ids[:, :1], continue_with(ids, mask, NEW), cache=cache)


@way("images", BOTH)
def _(model, plan):
    """An image among the text (vision-language models)."""
    kind = next((name for name in VISUAL if model.config.model_type in (name, name[:-3])), None)
    if kind is None:
        raise NotRun
    torch.manual_seed(0)
    ids, mask = left_padded(LENGTH)
    ids[ids == IMAGE] = 50
    ids[:, 40:44] = IMAGE
    more = {"pixel_values": torch.randn(3, 3, 16, 16)}
    if kind == "qwen2_5_vl":
        more = {
            "pixel_values": torch.randn(48, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
        }
    if kind == "gemma3_vl":
        more["token_type_ids"] = (ids == IMAGE).long()
    same_generation(*both(model, plan, lambda m, c: generate(m, ids, mask, new=NEW, **c, **more)))
