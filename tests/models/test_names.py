"""What each version of transformers calls a decoder's arguments is asked in one place."""

import ast
import inspect

import pytest
import torch

from hfsparse.models.names import CACHES, cache_name, find_cache, text_decoder
from tests import tiny
from tests.support import models
from tests.test_layers import TEXTS


def test_the_cache_is_found_by_the_name_that_forward_takes():
    model = tiny.llama()
    for each in (model, model.get_decoder()):
        assert cache_name(each) in CACHES
        assert cache_name(each) in inspect.signature(type(each).forward).parameters
    assert [find_cache({name: 7, "input_ids": 1}) for name in CACHES] == [7, 7]
    assert find_cache({**dict.fromkeys(CACHES), "input_ids": 1}) is None


def test_a_patched_decoder_takes_its_cache_by_the_same_name():
    import hfsparse

    model = tiny.llama()
    name = cache_name(model.get_decoder())
    with hfsparse.patch(model):
        assert cache_name(model.get_decoder()) == name


def test_no_other_module_spells_these_names():
    """kvpress takes its cache by the name that its own versions of transformers have."""
    spelled = {
        module
        for module, text in TEXTS.items()
        for node in ast.walk(text)
        if isinstance(node, ast.Constant) and node.value == CACHES[1]
    }
    assert spelled == {"hfsparse.models.names", "hfsparse_eval.arms.kvpress"}


@pytest.mark.parametrize("family", ["llama", "gemma3_vl", "llama4"])
def test_a_text_decoder_answers_hidden_states(family):
    decoder = text_decoder(models.tiny(family))
    assert decoder(torch.tensor([[2, 3]])).last_hidden_state.shape == (1, 2, 64)
    assert text_decoder(decoder) is decoder
