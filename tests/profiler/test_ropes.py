"""What is measured of each kind of rope, norm, bias and projection, against the stock model.

A row is a tiny model whose config differs in one of these. The stock model, eager and in one call,
tells keys, values, attention weights and gradients; the profiler must have seen the same.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.lists import Grid, default_block
from hfsparse.models.layers import layer_shapes
from hfsparse.models.rope import forget_lengths
from hfsparse.models.window import context_window
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.profiler.measure import exact
from hfsparse.profiler.measure.capture import KEYS, SURE, Seen, capture
from hfsparse.profiler.measure.effects import Candidates, measure_layer
from hfsparse.profiler.methods.one_pass import short_sighted_plan
from tests import tiny
from tests.helpers import close
from tests.patcher.families import SIZES as USUAL
from tests.patcher.oracle import CACHE, oracle, whole_cache

VERSION = Version(transformers.__version__)
L, ORIGINAL, WINDOW = 300, 128, 40  # tokens: of a text, in training, of windowed layers
SETTINGS = dict(
    lengths=(512,), samples=1, verify=False, prefill_density=0.7, cache_share=0.8, decode_share=0.8
)
FEW = 60  # tokens of a vocabulary so small that margins are within SURE
STREAM, BLOCKS = Streaming(4, 60), BlockTopK(0.3, 2)
CANDIDATES = Candidates({"stream": STREAM, "blocks": BLOCKS}, {"near": STREAM}, {})
SIZES = dict(
    vocab_size=400, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=1024, initializer_range=0.25,
)  # fmt: skip
WINDOWED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])


def scaled(kind: str, **values) -> dict:
    """Config values of a model that was trained on ORIGINAL tokens, and its scaling."""
    return dict(rope_theta=10000.0, rope_scaling={"rope_type": kind, "type": kind, **values})


def long(dims: int) -> dict:
    """Factors of longrope for so many dims of a head."""
    half = dims // 2
    return dict(
        short_factor=[1.0 + i / half for i in range(half)],
        long_factor=[4.0 + i for i in range(half)],
    )


TRAINED = dict(original_max_position_embeddings=ORIGINAL)
YARN = scaled("yarn", factor=4.0, **TRAINED)
LONG = dict(TRAINED, max_position_embeddings=512)
EACH = dict(num_key_value_heads=4)  # kv heads: one for each q head
GPT = dict(n_embd=64, n_layer=2, n_head=4, n_inner=64, n_positions=1024)


@dataclass(frozen=True)
class Row:
    """A model: prefix of its class, what its config sets, and what its projection is called."""

    prefix: str
    more: dict
    projection: str = "o_proj"
    since: str = "4.57"  # the first transformers in which it can be built, patched and profiled

    @property
    def model(self) -> type | None:
        """Its class, where this transformers has one that can be profiled."""
        names = f"{self.prefix}ForCausalLM", f"{self.prefix}LMHeadModel"
        known = [getattr(transformers, name, None) for name in names]
        return next(filter(None, known), None) if Version(self.since) <= VERSION else None


ROWS = {
    # kinds of rope
    "default": Row("Llama", {}),
    "linear": Row("Llama", scaled("linear", factor=2.0)),
    "llama3": Row(
        "Llama", scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **TRAINED)
    ),
    "yarn": Row("Llama", dict(YARN, max_position_embeddings=ORIGINAL)),
    "longrope": Row("Llama", scaled("longrope", factor=4.0, **long(16)) | LONG),
    "dynamic": Row("Llama", dict(scaled("dynamic", factor=4.0), max_position_embeddings=ORIGINAL)),
    # by layer
    "local and global bases": Row("Gemma3", dict(WINDOWED, query_pre_attn_scalar=20)),
    "yarn in full layers": Row("Olmo3", WINDOWED | YARN | dict(max_position_embeddings=512)),
    "layers without rope": Row("SmolLM3", dict(no_rope_layers=[1, 0])),
    "full layers without rope": Row("Cohere2", dict(WINDOWED, logit_scale=0.25)),
    "other heads in windowed layers": Row(
        "Gemma4",
        dict(
            WINDOWED, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True,
            num_kv_shared_layers=0, hidden_size_per_layer_input=0, vocab_size_per_layer_input=400,
        ),
    ),
    # part of a head, pairs of dims side by side, fused projections
    "partial, fused, longrope": Row(
        "Phi3",
        LONG
        | dict(rope_theta=10000.0, rope_scaling={"type": "longrope", **long(8)})
        | dict(partial_rotary_factor=0.5, sliding_window=None),
    ),
    "interleaved and partial": Row("Glm4", {}),
    "interleaved": Row("Cohere", dict(logit_scale=0.25, use_qk_norm=True)),
    "partial, norms by head": Row(
        "StableLm", dict(qk_layernorm=True, use_qkv_bias=True), since="5"
    ),
    "partial, norms plus one": Row("Nemotron", dict(initializer_range=0.12), since="5"),
    "fused by head": Row("GPTNeoX", EACH | dict(rotary_pct=0.25), "dense", "5"),
    "fused for tensor parallelism": Row(
        "CodeGen", GPT | EACH | dict(rotary_dim=8), "out_proj", "5.24"
    ),
    # norms, biases, sinks, scales
    "norms": Row("Qwen3", {}),
    "norms over all heads": Row("Olmo2", {}),
    "biases": Row("Qwen2", {}),
    "biases everywhere": Row("Llama", dict(attention_bias=True)),
    "sinks": Row(
        "GptOss",
        WINDOWED
        | YARN
        | dict(num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512),
    ),
    "soft caps": Row("Gemma2", dict(WINDOWED, query_pre_attn_scalar=16)),
    "scaled logits": Row("Granite", dict(attention_multiplier=0.3, logits_scaling=8.0)),
    # no rope
    "a table of positions": Row("GPT2", GPT | EACH, "c_proj", "5"),
    "one kv head": Row("GPTBigCode", dict(GPT, num_key_value_heads=1), "c_proj", "5"),
}  # fmt: skip
ROWS = {name: row for name, row in ROWS.items() if row.model}


def build(name: str, **more):
    """The row's model; what is usually 0 or 1 is random."""
    torch.manual_seed(0)
    kind = ROWS[name].model
    model = kind(kind.config_class(**{**USUAL, **SIZES, **ROWS[name].more, **more}))
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.3 * torch.randn_like(weight)
    return model.eval()


def tokens(length: int = L) -> Tensor:
    return torch.randint(2, FEW, (1, length), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Stock:
    """The unpatched model's reading of a text: by layer, and its logits."""

    keys: list[Tensor]  # [1, Hkv, L, D]
    values: list[Tensor]
    weights: list[Tensor]  # [Hq, L, L]
    flat: list[Tensor]  # [1, L, Hq * Dv], what the projection reads
    projection: list[Tensor]  # [Hq * Dv, hidden]
    logits: Tensor

    def out(self, at: int) -> Tensor:
        """[1, Hq, L, Dv]"""
        return self._by_head(self.flat[at].detach(), at)

    def grad(self, at: int, ids: Tensor, keys: Tensor) -> Tensor:
        """Gradient [1, Hq, L, Dv] of the mean margin at `keys`, by a layer's `out`."""
        margin = margins(self.logits, ids)[keys].mean()
        (found,) = torch.autograd.grad(margin, self.flat[at], retain_graph=True)
        return self._by_head(found, at)

    def _by_head(self, flat: Tensor, at: int) -> Tensor:
        return flat.unflatten(2, (len(self.weights[at]), -1)).transpose(1, 2)


def margins(logits: Tensor, ids: Tensor) -> Tensor:
    """Log of p / (1 - p) of each next token, plainly."""
    p = torch.softmax(logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])[:, 0]
    return torch.log(p) - torch.log1p(-p)


def read(model, projection: str, ids: Tensor) -> Stock:
    """What a copy of the model, eager and with a cache that keeps all, makes of a text."""
    plain, found = deepcopy(model), {}
    plain.set_attn_implementation("eager")
    plain.requires_grad_(True)
    for module in plain.get_decoder().modules():
        if hasattr(module, projection) and hasattr(module, "layer_idx"):
            at = module.layer_idx
            getattr(module, projection).register_forward_pre_hook(
                lambda linear, args, at=at: found.update({at: (args[0], linear)})
            )
    said = plain(ids, output_attentions=True, **whole_cache())
    held = said[CACHE].layers
    flat, linears = zip(*(found[at] for at in range(len(held))), strict=True)
    is_linear = isinstance(linears[0], torch.nn.Linear)  # GPT-2's Conv1D lies the other way
    return Stock(
        [layer.keys.detach() for layer in held],
        [layer.values.detach() for layer in held],
        [weights[0].detach() for weights in said.attentions],
        [*flat],
        [(each.weight.T if is_linear else each.weight).detach() for each in linears],
        said.logits,
    )


@dataclass(frozen=True)
class Case:
    """One row: the stock model's reading of a text, and what the profiler saw of it."""

    model: transformers.PreTrainedModel
    ids: Tensor
    stock: Stock
    seen: dict[int, Seen]  # by free layer
    found: dict[int, dict[str, np.ndarray]]  # what `measure_layer` answered


@cache
def case(name: str) -> Case:
    model, ids, seen, found = build(name, vocab_size=FEW), tokens(), {}, {}
    stock = read(model, ROWS[name].projection, ids)

    def look(each: Seen) -> dict[str, np.ndarray]:
        seen[each.layer], found[each.layer] = each, measure_layer(each, CANDIDATES)
        return {}

    capture(model, ids, short_sighted_plan(model, CANDIDATES), look)
    free = [at for at, shape in enumerate(layer_shapes(model)) if shape.free]
    assert seen.keys() >= {*free}
    return Case(model, ids, stock, {at: seen[at] for at in free}, {at: found[at] for at in free})


def near(found: np.ndarray, terms: Tensor, rtol: float = 1e-4) -> None:
    """A sum of signed terms `[heads, n]` may nearly cancel: compared against their sizes."""
    sizes = terms.abs().sum(1).max()
    np.testing.assert_allclose(found, terms.sum(1).abs(), rtol=0, atol=float(rtol * sizes))


@pytest.mark.parametrize("name", ROWS)
def test_queries_keys_and_values_are_the_stock_models(name):
    it, every = case(name), torch.arange(L)
    for at, seen in it.seen.items():
        assert close(seen.k, it.stock.keys[at])
        assert close(seen.v, it.stock.values[at])
        assert close(seen.out, it.stock.out(at))
        for head, weights in enumerate(it.stock.weights[at]):
            assert close(exact.attention(seen, every, head), weights)
        assert float(it.stock.weights[at][:, L // 2 :].amax(-1).mean()) > 0.02  # not a mere mean


@pytest.mark.parametrize("name", ROWS)
def test_key_tokens_are_those_of_the_stock_models_own_logits(name):
    it = case(name)
    plain = deepcopy(it.model)
    with torch.no_grad(), oracle(plain, short_sighted_plan(it.model, CANDIDATES)):
        short = margins(plain(it.ids, **whole_cache()).logits, it.ids)
    dense = margins(it.stock.logits.detach(), it.ids)
    lost = dense.clamp(-SURE, SURE) - short.clamp(-SURE, SURE)
    edge = lost.sort(descending=True).values[KEYS - 1]
    assert edge > 0.01  # there is something to get wrong
    for seen in it.seen.values():
        kept = torch.isin(torch.arange(len(lost)), seen.keys)
        assert kept.sum() == KEYS
        assert lost[kept].min() > edge - 1e-4
        assert lost[~kept].max() < edge + 1e-4


@pytest.mark.parametrize("name", ROWS)
def test_gradients_are_those_of_the_stock_models_own_logits(name):
    it = case(name)
    for at, seen in it.seen.items():
        plain = it.stock.grad(at, it.ids, seen.keys)
        assert float(plain.norm()) > 1e-4
        assert (seen.grad - plain).norm() < 1e-3 * plain.norm()


@pytest.mark.parametrize("name", ROWS)
def test_what_a_head_keeps_and_loses_is_told_by_the_stock_models_weights(name):
    it = case(name)
    for at, seen in it.seen.items():
        v = it.stock.values[at][0].double()
        weights, out = it.stock.weights[at].double(), it.stock.out(at)[0].double()
        heads, groups = len(weights), len(v)
        v = v.repeat_interleave(heads // groups, 0)
        grad = it.stock.grad(at, it.ids, seen.keys)[0].double()
        proj = it.stock.projection[at].double().unflatten(0, (heads, -1))
        size = torch.einsum("hrd,hdo->ro", out, proj).norm(dim=-1)  # [L]
        rows, weight = exact.sample_rows(L, seen.keys)
        bare = 1 - weights.sum(-1) if name == "sinks" else 0.0  # what sink logits take
        query, key = torch.arange(L)[:, None], torch.arange(L)
        near_keys = (key <= query) & ((key < 4) | (query - key < 60))
        grid = Grid.causal(1, L, default_block(L))
        chosen = BLOCKS.lists(seen.q, seen.k, grid, seen.logits.scale).mask()[0]
        for i, mask in enumerate((near_keys.expand(heads, -1, -1), chosen)):
            kept = (weights * mask).sum(-1) + bare  # [Hq, L]
            change = (weights * mask) @ v / kept[..., None] - out
            effect = (grad * change).sum(-1)
            found = it.found[at]
            near(found["pattern_recall"][i], kept[:, rows] / len(rows), 1e-5)
            near(found["pattern_effect"][i], effect[:, rows] * weight, 1e-3)
            moved = torch.einsum("hrd,hdo->hro", change[:, seen.keys], proj).norm(dim=-1)
            near(found["pattern_error"][i], moved / size[seen.keys] / KEYS, 1e-3)
            assert kept[:, rows].mean() < 0.98  # something is lost
            if i == 0:
                near(found["ring_effect"][0], effect.view(groups, -1), 1e-3)


@pytest.mark.parametrize("name", ROWS)
def test_a_profile_makes_a_plan_that_generates(name):
    model = build(name)
    plan = hfsparse.profile(model, tiny.tokenizer(), **SETTINGS)
    assert any(word != "full" for layer in plan.layers for word in layer.prefill)
    ids, how = tokens(), GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None)
    plain = build(name)
    with torch.no_grad(), oracle(plain, plan):
        want = plain.generate(ids, generation_config=how, **whole_cache())
        logits = plain(ids, **whole_cache()).logits
    with torch.no_grad(), hfsparse.patch(model, plan):
        assert torch.equal(model.generate(ids, generation_config=how), want)
        assert close(model(ids).logits, logits)


# ---- beyond the window


def scale_dynamic(length: int) -> Tensor:
    """Bases grow with the call, as of NTK-aware scaling by a factor of 4."""
    grown = 10000.0 * (4 * length / ORIGINAL - 3) ** (16 / 14)
    return grown ** (torch.arange(0, 16, 2) / 16)


BASES = 10000.0 ** (torch.arange(0, 16, 2) / 16)
LONGER = math.sqrt(1 + math.log(4) / math.log(ORIGINAL))  # longrope makes logits larger
ANGLES = {  # row, tokens: what positions are divided by [8], and the size of sines
    ("default", L): (BASES, 1.0),
    ("linear", L): (2 * BASES, 1.0),
    ("dynamic", ORIGINAL): (BASES, 1.0),
    ("dynamic", 4 * ORIGINAL): (scale_dynamic(4 * ORIGINAL), 1.0),
    ("dynamic", 5 * ORIGINAL): (scale_dynamic(5 * ORIGINAL), 1.0),
    ("longrope", ORIGINAL): (BASES * torch.tensor(long(16)["short_factor"]), LONGER),
    ("longrope", ORIGINAL + 1): (BASES * torch.tensor(long(16)["long_factor"]), LONGER),
    ("longrope", 5 * ORIGINAL): (BASES * torch.tensor(long(16)["long_factor"]), LONGER),
}


@pytest.mark.parametrize(("name", "length"), ANGLES)
def test_keys_are_rotated_as_the_length_of_the_text_says(name, length):
    model, ids, seen = build(name, vocab_size=FEW), tokens(length), []
    with torch.no_grad():
        model(tokens(3 * L))  # whatever was read before
    with forget_lengths(model):
        capture(model, ids, short_sighted_plan(model, CANDIDATES), lambda s: seen.append(s) or {})
    first = model.model.layers[0]
    with torch.no_grad():
        plain = first.self_attn.k_proj(first.input_layernorm(model.model.embed_tokens(ids)))
    low, high = plain.unflatten(2, (2, 16)).transpose(1, 2).double().split(8, 3)
    divisors, size = ANGLES[name, length]
    angle = torch.arange(length)[:, None].double() / divisors
    cos, sin = size * angle.cos(), size * angle.sin()
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], 3)
    assert (seen[-1].k - turned).norm() < 1e-4 * turned.norm()


@pytest.mark.parametrize("name", ["yarn", "longrope", "dynamic", "partial, fused, longrope"])
def test_scaled_rope_is_profiled_up_to_its_scaled_window_and_beyond_it_when_told(name):
    model, settings = build(name), dict(SETTINGS, lengths=(576,))
    assert context_window(model.config) == 4 * ORIGINAL
    with pytest.raises(UsageError, match="the model's window is 512 tokens"):
        hfsparse.profile(model, tiny.tokenizer(), **settings)
    plan = hfsparse.profile(model, tiny.tokenizer(), beyond_window=True, **settings)
    assert [*plan.expected] == [576]
    ids, plain = tokens(576), build(name)
    with torch.no_grad(), oracle(plain, plan):
        logits = plain(ids, **whole_cache()).logits
    with torch.no_grad(), hfsparse.patch(model, plan):
        assert close(model(ids).logits, logits)


def test_a_profile_is_the_same_whatever_was_read_before_and_leaves_no_trace():
    fresh, used, ids = build("dynamic"), build("dynamic"), tokens()
    with torch.no_grad():
        alone = used(ids).logits
        used(tokens(900))
        before = used(ids).logits
    assert not close(before, alone)  # the longest call is remembered
    plans = [hfsparse.profile(m, tiny.tokenizer(), **SETTINGS) for m in (fresh, used)]
    assert plans[0].hash() == plans[1].hash()
    assert plans[0].expected == plans[1].expected
    with torch.no_grad():
        assert torch.equal(used(ids).logits, before)
        assert torch.equal(fresh(ids).logits, alone)
