"""SmolLM2-135M on the GPU: the plan that drops nothing changes nothing, others run.

HFSPARSE_SMOLLM2 names its folder (`make model` builds .cache/smollm2); else they are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import hfsparse
from hfsparse.models.loading import load
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.selectors import SELECTORS
from tests.gpu.common import BF16, DEVICE, SINGLE

FOLDER = os.environ.get("HFSPARSE_SMOLLM2", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="HFSPARSE_SMOLLM2 names no folder")
LENGTH = 2048
# Rounding of 30 layers; in bfloat16 the logits of two kernels differ by about a hundredth.
CLOSE = {"float32": 1e-4, "bfloat16": 0.04}


@pytest.fixture(scope="module", params=CLOSE)
def real(request):
    """Model, a prompt of its own kind of text, and how close two kernels come."""
    model, tokenizer = load(FOLDER, "cuda", request.param)
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8") * 4
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :LENGTH].to(DEVICE)
    assert ids.shape[1] == LENGTH
    assert model.dtype == {"float32": SINGLE, "bfloat16": BF16}[request.param]
    return model, ids, CLOSE[request.param]


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def plan_of(model, word: str, kept: str, decode: str) -> Plan:
    """Two heads of three by `word`, their cache kept so; every third kv head is full."""
    this = ModelId.of(model)
    group = this.q_heads // this.kv_heads
    ours = [g % 3 < 2 for g in range(this.kv_heads)]
    layer = Layer(
        tuple(word if ours[h // group] else "full" for h in range(this.q_heads)),
        tuple(kept if own else "full" for own in ours),
        tuple(decode if own else "full" for own in ours),
    )
    patterns = {
        "stream": PATTERNS["streaming"](sink=64, recent=256),
        "blocks": PATTERNS["block_topk"](share=0.3, min_blocks=2),
        "vs": PATTERNS["vertical_slash"](columns=200, diagonals=200),
        "quest": SELECTORS["quest"](share=0.3, min_pages=4),
    }
    used = {name: patterns[name] for name in (word, kept, decode) if name in patterns}
    return Plan(this, used, (layer,) * this.layers)


def test_the_plan_that_drops_nothing_gives_the_dense_logits(real):
    model, ids, close = real
    dense = logits(model, ids)
    with hfsparse.patch(model) as handle:
        ours = logits(model, ids)
        assert handle.stats().pair_density == 1
    assert (ours - dense).norm() < close * dense.norm()
    assert (ours.argmax(-1) == dense.argmax(-1)).float().mean() > 0.95


def test_a_prompt_read_in_two_steps_gives_the_dense_logits(real):
    """The second goes through Triton's decode kernel, over a cache."""
    model, ids, close = real
    dense = logits(model, ids)[:, -5:]
    with torch.no_grad(), hfsparse.patch(model):
        first = model(ids[:, :-5], use_cache=True)
        ours = model(ids[:, -5:], past_key_values=first.past_key_values).logits.float()
    assert (ours - dense).norm() < close * dense.norm()


@pytest.mark.parametrize(
    ("word", "kept", "decode"),
    [("stream", "stream", "ring"), ("blocks", "full", "quest"), ("vs", "full", "quest")],
)
def test_plans_run_and_drop_what_they_say(real, word, kept, decode):
    model, ids, _ = real
    dense = logits(model, ids)[:, -1]
    with hfsparse.patch(model, plan_of(model, word, kept, decode)) as handle:
        ours = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        stats = handle.stats()
    scores = torch.stack(ours.logits, 1).float()
    assert torch.isfinite(scores).all()
    assert 0.3 < stats.pair_density < 0.9
    assert 0.3 < stats.decode_share < 0.9
    assert (stats.cache_share < 0.7) == (kept == "stream")
    likeness = torch.nn.functional.cosine_similarity(scores[:, 0], dense, dim=-1)
    assert likeness.min() > 0.8  # the same text, seen through fewer keys
