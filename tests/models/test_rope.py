"""Dynamic rope, which remembers the longest call, within and behind `forget_lengths`."""

import pytest
import torch
import transformers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from hfsparse.models.rope import forget_lengths
from tests.patcher.families import SIZES, WINDOW, rotated, tokens


def by_layer():
    """Full layers scale with the longest call; layers with a window have plain rope."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    ropes = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "sliding_attention": plain,
    }
    more = dict(
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        rope_parameters=ropes,
    )
    torch.manual_seed(0)
    sizes = {**SIZES, "max_position_embeddings": 128, "num_attention_heads": 4}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_key_value_heads=2, **more)).eval()


BUILD = {"alike": lambda: rotated("dynamic"), "by layer": by_layer}
if transformers.__version__ < "5":  # every layer has the same kind of rope, or a base of its own
    del BUILD["by layer"]


@pytest.mark.parametrize("kind", BUILD)
@torch.no_grad()
def test_lengths_are_forgotten_within_and_remembered_behind(kind):
    model, ids = BUILD[kind](), tokens(1, 150)
    alone = model(ids).logits
    model(tokens(1, 400))
    before = model(ids).logits
    assert not torch.allclose(before, alone, atol=1e-3)
    with forget_lengths(model):
        assert torch.equal(model(ids).logits, alone)
        model(tokens(1, 700))
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(KeyError):
        _read_and_fail(model)
    assert torch.equal(model(ids).logits, before)


def _read_and_fail(model) -> None:
    with forget_lengths(model):
        model(tokens(1, 700))
        raise KeyError


@pytest.mark.parametrize("rope", ["default", "yarn", "longrope"])
@torch.no_grad()
def test_other_kinds_are_left_as_they_are(rope):
    model, ids = rotated(rope), tokens(1, 150)
    before, known = model(ids).logits, {**vars(model.model.rotary_emb)}
    with forget_lengths(model):
        assert torch.equal(model(ids).logits, before)
    assert known.keys() == vars(model.model.rotary_emb).keys()
