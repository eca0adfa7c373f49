"""Models and calls that hfsparse can't follow get an error, never an answer."""

from __future__ import annotations

import pytest
import torch

import hfsparse
from hfsparse.errors import CacheError, PatchError
from hfsparse.models.names import CACHES
from hfsparse.runtime.attend import attend
from tests.patcher.families import fresh, full, mixed, tiny, tokens
from tests.patcher.runs import forward, generate


def test_attention_called_twice_for_one_cache_update_is_refused():
    model = fresh("llama")
    attention = model.model.layers[1].self_attn
    once = attention.forward

    def twice(*args, **kwargs):
        out = once(*args, **kwargs)
        without = {k: v for k, v in kwargs.items() if k not in CACHES}  # as DiffLlama's second half
        once(*args, **without)
        return out

    attention.forward = twice
    with hfsparse.patch(model, full(model)), pytest.raises(CacheError, match="twice"):
        forward(model, tokens(1, 20))


def test_other_heads_than_the_config_says_are_refused():
    model = fresh("llama")
    with hfsparse.patch(model, full(model)) as handle:
        module = model.model.layers[0].self_attn
        query, key = torch.randn(1, 6, 5, 16), torch.randn(1, 2, 5, 16)
        with pytest.raises(PatchError, match="6 q and 2 kv heads, its config says 4 and 2"):
            attend(module, query, key, key, None)
        assert handle.stats() is not None


def test_packed_sequences_are_refused():
    model = tiny("llama")
    ends = torch.tensor([0, 10, 20], dtype=torch.int32)
    more = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=10, max_length_k=10)
    with hfsparse.patch(model, full(model)), pytest.raises(PatchError, match="one sequence a row"):
        forward(model, tokens(1, 20), **more)


def test_a_cache_filled_in_inference_mode_goes_on_outside_it():
    model = tiny("llama")
    plan, ids = mixed(model), tokens(1, 300)
    with hfsparse.patch(model, plan):
        whole = generate(model, ids, new=8).sequences
        with torch.inference_mode():
            first = generate(model, ids[:, :290], new=1)
        second = torch.cat([ids, whole[:, 300:301]], 1)
        with torch.no_grad():
            again = generate(model, second, cache=first.past_key_values, new=3)
    assert again.sequences.shape[1] == 304
