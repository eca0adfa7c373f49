"""Tiny hybrids of each family whose linear layers keep their states in transformers' cache, and a
recorded step of one as a list of operators.

`Traced` stands in for a CUDA graph where there is none: a step becomes the operators that it ran,
over the very tensors that it ran them on. A replay runs these alone, none of the model's Python, so
that a state that lies elsewhere than it lay then is neither read nor written.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hfsparse
from hfsparse.models.layers import layer_shapes
from hfsparse.models.names import find_cache
from hfsparse.plan import Plan
from hfsparse.runtime import graphs
from hfsparse.runtime.call import running
from hfsparse.runtime.decode import Step
from hfsparse.runtime.graphs import parts, products, recording
from hfsparse.runtime.graphs.states import States
from tests import frozen
from tests.patcher import families, runs

KINDS = ["linear_attention", "full_attention", "linear_attention"]
GATED = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, layer_types=KINDS,
)  # fmt: skip
MAMBA = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_chunk_size=16)
CONV = ["conv", "full_attention", "conv"]
HYBRIDS = {  # name: prefix of the classes, more than SIZES and heads
    "qwen3_5": ("Qwen3_5", GATED),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        dict(
            **GATED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
    ),
    "qwen3_next": ("Qwen3Next", dict(GATED, num_experts=0)),
    "granite": ("GraniteMoeHybrid", dict(MAMBA, layer_types=KINDS, num_local_experts=0)),
    "bamba": ("Bamba", dict(MAMBA, attn_layer_indices=[1])),
    "jamba": ("Jamba", dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1)),
    "lfm2": ("Lfm2", dict(layer_types=CONV)),
    "lfm3": ("Lfm3", dict(layer_types=CONV)),
    "olmo_hybrid": ("OlmoHybrid", GATED),
    "falcon_h1": ("FalconH1", dict(MAMBA, mamba_d_ssm=128)),
    "zamba2": (
        "Zamba2",
        dict(
            layers_block_type=["hybrid", "linear_attention", "hybrid"], n_mamba_heads=4,
            mamba_d_state=16, chunk_size=16,
        ),
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        dict(block_types=["recurrent", "attention"], attention_window_size=8, lru_width=64),
    ),
}  # fmt: skip


def known(family: str) -> bool:
    """Whether this transformers has the family, says which of its layers are linear, and has a
    place in its cache for their states."""
    in_cache = hasattr(transformers.cache_utils, "LinearAttentionLayer")
    there = in_cache and hasattr(transformers, f"{HYBRIDS[family][0]}ForCausalLM")
    return there and any(layer.has_state for layer in layer_shapes(_config(family)))


def hybrid(family: str, kv_heads: int = 2):
    """A family's tiny model, with the weights of one seed."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{HYBRIDS[family][0]}ForCausalLM")
    model = kind(_config(family, kv_heads)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def _config(family: str, kv_heads: int = 2):
    prefix, more = HYBRIDS[family]
    heads = dict(num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads)
    kind = getattr(transformers, f"{prefix}ForCausalLM").config_class
    return kind(**{**families.SIZES, **heads, **more})


def rings_and_pages(model) -> Plan:
    """In each layer that attends to all, the last kv head is a ring and the others choose pages."""
    (Hq, Hkv), shapes = families.heads(model), layer_shapes(model)
    ring, group = Hkv - 1, Hq // Hkv

    def layer(index, windowed):
        if not shapes[index].free:
            return ["full"] * Hq, ["full"] * Hkv, ["full"] * Hkv
        cache = ["full"] * ring + ["s"]
        return ["full"] * (Hq - group) + ["s"] * group, cache, ["quest"] * ring + ["ring"]

    return families.plan_of(model, layer, s=families.STREAM, quest=families.QUEST)


SERVED: list = []  # the attention of the step that runs


@torch.library.custom_op("hfsparse_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, index: int) -> Tensor:
    return SERVED[-1](index, q, k, v)


class Traced(frozen.Frozen):
    """Its operators are what is replayed."""

    def __init__(self, call, given, lengths, key, serving, weights):
        super().__init__(call, given, lengths, key, serving, weights)
        self.inputs = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
        self.length, self.logits = torch.tensor(lengths.rows), {}
        states = States(find_cache(given))
        before = states.copies()
        with self.attending():
            self.operators = make_fx(self.step)(*self.inputs.values())
        states.restore(before)  # a recording runs nothing

    def step(self, *inputs: Tensor) -> Tensor:
        tensors = dict(zip(self.inputs, inputs, strict=True))
        output = self.call(**recording.hide_cache({**self.given, **tensors}))
        self.kind, self.rest = type(output), {**output, "last_hidden_state": None}
        return output.last_hidden_state

    @contextmanager
    def attending(self):
        """Attention is one operator, which reads the host as it was and the device as it is."""
        where = Step.recorded(self.lengths, self.length)
        with recording.record_step(where, self.serving):
            call = running()
            serve = call.recorded

            def one(index, q, k, v, logits):
                self.logits[index] = logits
                return torch.ops.hfsparse_tests.attend(q, k, v, index)

            call.recorded = one
            SERVED.append(lambda index, q, k, v: serve(index, q, k, v, self.logits[index]))
            try:
                yield
            finally:
                SERVED.pop()

    def replay(self, given, rows, ended=None):
        recording.write_lengths(self.length, rows, ended)
        for name, held in self.inputs.items():
            held.copy_(given[name])
        with self.attending():
            made = self.operators(*self.inputs.values())
        return recording.show_cache(self.kind(**{**self.rest, "last_hidden_state": made}), given)


class Forgetful(Traced):
    """A replay that leaves one state as it was, and says the right thing."""

    def replay(self, given, rows, ended=None):
        state = States(find_cache(given)).held[0][2]
        was = state.clone()
        output = super().replay(given, rows, ended)
        state.copy_(was)
        return output


class Kept(frozen.Frozen):
    """Its Python is what is replayed, over the tensors that it was recorded with."""

    def __init__(self, call, given, lengths, key, serving, weights):
        super().__init__(call, given, lengths, key, serving, weights)
        self.inputs = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}

    def replay(self, given, rows, ended=None):
        for name, held in self.inputs.items():
            held.copy_(given[name])
        return super().replay({**given, **self.inputs}, rows, ended)


@contextmanager
def patched(model, plan, kind: type | None, fuse: bool = False):
    """The graphs of a patched model: of a kind, or None where no step is replayed."""
    with ExitStack() as stack:
        stack.enter_context(frozen.plain_prompts())
        stack.enter_context(patch.object(products, "BACKEND", "aot_eager"))
        if fuse:  # compilations of wrappers that all models share count, whichever made them
            torch._dynamo.reset()
        most = {"recompile_limit": model.config.num_hidden_layers}  # each once, for all caches
        stack.enter_context(patch.dict(parts.LIMITS, most))
        if kind is not None:
            stack.enter_context(frozen.frozen())
            stack.enter_context(patch.object(graphs, "Graph", kind))
        stack.enter_context(hfsparse.patch(model, plan(model), fuse=fuse))
        yield model.get_decoder()._hfsparse.graphs


class Talk:
    """A conversation in single tokens behind a prompt, over a cache of its own."""

    def __init__(self, model, pads=(3,), length: int = 20, seed: int = 0):
        self.model, self.cache, self.logits = model, transformers.DynamicCache(), []
        self.ids, self.mask = families.left_padded(length, pads, seed)
        runs.forward(model, self.ids, self.mask, self.cache)

    def say(self, steps: int, tokens: int = 1) -> None:
        """Steps of so many tokens each."""
        for at in range(steps):
            self.mask = runs.continue_with(self.ids, self.mask, tokens)
            new = self.ids[:, -1 - at :][:, :1].repeat(1, tokens)
            self.logits.append(runs.forward(self.model, new, self.mask, self.cache).logits)

    def left(self) -> Tensor:
        """What was said, and the states behind it, in one row."""
        return torch.cat([t.float().flatten() for t in (*self.logits, *self.states.copies())])

    @property
    def states(self) -> States:
        return States(self.cache)


def compare(family: str, scene, kind: type = Traced, fuse: bool = False) -> SimpleNamespace:
    """A scene, eager and replayed: whether it gave the same, and what the replaying graphs say."""
    found = []
    for each in (None, kind):
        model = hybrid(family, kv_heads=1)
        with patched(model, families.full, each, fuse) as held:
            found.append(torch.cat([talk.left() for talk in scene(model, each is not None)]))
            said = str(held)
    return SimpleNamespace(same=torch.equal(*found), graphs=said, recorded=frozen.Frozen.recorded)


def alone(model, replayed: bool, steps: int = 7) -> list[Talk]:
    """Its states stay where they lay when the first step was replayed."""
    talk = Talk(model)
    talk.say(1)
    before = talk.states.places()
    talk.say(steps - 1)
    assert talk.states.places() == before
    return [talk]


def replacing(model, replayed: bool) -> list[Talk]:
    """Linear layers that put a new tensor in the place of each state."""

    def replace(self, recurrent_states, state_idx=0, **kwargs):
        self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    layer = transformers.cache_utils.LinearAttentionLayer
    with patch.object(layer, "update_recurrent_state", replace):
        talk = Talk(model)
        talk.say(7)
    return [talk]


def two_in_turns(model, replayed: bool) -> list[Talk]:
    """Two caches take turns by the token; one has a second turn of several tokens meanwhile."""
    talks = [Talk(model), Talk(model, length=24, seed=1)]
    for at in range(12):
        talks[0].say(1)
        if at == 6:
            talks[1].say(1, tokens=5)
        if at < 6 or at > 7:
            talks[1].say(1)
    return talks


def waiting(model, replayed: bool) -> list[Talk]:
    """The host waits behind the first layers of each step: no step can be recorded."""
    norm = model.model.layers[-1].ffn_norm

    class Waiting(type(norm)):
        def forward(self, x):
            return super().forward(x) * float((x.sum() * 0).item() + 1)

    norm.__class__ = Waiting
    return alone(model, replayed, 5)


def holed(model, replayed: bool) -> list[Talk]:
    """A mask with a hole, which the eager conversation never sees, is refused."""
    talk = Talk(model)
    talk.say(6)
    if replayed:
        mask = runs.continue_with(talk.ids, talk.mask, 1)
        mask[0, 12] = 0
        with pytest.raises(ValueError, match="has holes"):
            runs.forward(model, talk.ids[:, :1], mask, talk.cache)
    talk.say(2)
    return [talk]


def recording_its_past(model, replayed: bool) -> list[Talk]:
    """From the sixth step on the cache keeps what may be taken back; then some is."""
    talk = Talk(model)
    talk.say(5)
    talk.cache.activate_past_recording()
    talk.say(2)
    talk.cache.crop(-1)
    talk.mask = talk.mask[:, :-1]
    talk.say(1)
    return [talk]
