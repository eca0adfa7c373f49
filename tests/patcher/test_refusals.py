"""What every call would refuse is refused by patch, for the reason that is true.

Models are built on the meta device: nothing here depends on weights.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, LlamaForCausalLM

import hfsparse
from hfsparse.errors import PatchError, ShapeError
from hfsparse.models.fingerprint import attention_values
from hfsparse.models.layers import layer_shapes
from hfsparse.patcher import probe
from hfsparse.patcher.resolve import resolve_layers
from hfsparse.patcher.state import is_patched
from hfsparse.plan import ModelId, Plan, PlanError
from tests.patcher.families import SIZES, WINDOW, fresh, tokens
from tests.support.models import FAMILIES, exists
from tests.support.models import tiny as supported

GQA = dict(SIZES, num_attention_heads=4, num_key_value_heads=2)
PLAIN = {name: value for name, value in GQA.items() if name != "head_dim"}
MHA = {name: value for name, value in PLAIN.items() if name != "num_key_value_heads"}
EXPERTS = dict(
    moe_intermediate_size=32, n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2
)
DORY = dict(
    n_input_layers=1, n_recurrent_layers=1, n_output_layers=1, layer_types=["full_attention"] * 3
)
STATES = ["full_attention", "linear_attention", "full_attention"]
ZAMBA = dict(
    PLAIN, num_key_value_heads=4, mamba_dt_rank=8,
    layers_block_type=["linear_attention", "hybrid", "hybrid"],
)  # fmt: skip
SMALL = dict(d_model=32, decoder_layers=2, decoder_attention_heads=2, vocab_size=100)
CASES = {  # name: class, config, what patch says
    "dots3_note": ("Dots3NoteForCausalLM", dict(num_hidden_layers=5), "an indexer of its own"),
    "jetmoe": (
        "JetMoeForCausalLM",
        {**PLAIN, **EXPERTS, "kv_channels": 16},
        "layer 0 has q and kv heads as 1 to 1, where its config says 4 to 2",
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        {**PLAIN, **EXPERTS, "sliding_window": WINDOW},
        "layer 0 attends to all tokens, where its config says a window of 40",
    ),
    "moshi": (
        "MoshiForCausalLM",
        dict(GQA, sliding_window=WINDOW, ffn_dim=64),
        "layer 0 attends to all tokens, where its config says a window of 40",
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        {**GQA, **EXPERTS, "layer_types": STATES, "block_size": 16},
        "keeps the state of its linear layers in a cache of its own",
    ),
    "dory, last loop": (
        "DoryForCausalLM",
        {**GQA, **DORY, "recurrent_kv_cache_mode": "last_loop"},
        "doesn't call attention once for each update of its cache",
    ),
    "bart": ("BartForCausalLM", SMALL, r"attention to an encoder, too \(cross-attention\)"),
    "pegasus": ("PegasusForCausalLM", SMALL, r"attention to an encoder, too"),
    "bert": ("BertForMaskedLM", dict(num_hidden_layers=2), "tokens attend to later ones too"),
    "mamba": (
        "MambaForCausalLM",
        dict(num_hidden_layers=2),
        "MambaConfig has no number of q hea|no attention layers that hfsparse knows",
    ),
}
HYBRIDS = hasattr(transformers.cache_utils, "LinearAttentionLayer")  # of linear layers
EARLIER = {  # what is true before that
    "jetmoe": "attention can't be exchanged",
    "phimoe": "attention can't be exchanged",
    "moshi": "attention can't be exchanged",
    "bert": "no attention layers that hfsparse knows",
    "minimax": "this transformers keeps the state of linear layers",
}
# Families that build masks of their own in one version and not in another.
OWN_MASKS = {
    "OPTForCausalLM": dict(MHA, ffn_dim=64, word_embed_proj_dim=64),
    "BioGptForCausalLM": MHA,
    "PersimmonForCausalLM": MHA,
    "GraniteMoeForCausalLM": {**PLAIN, **EXPERTS},
    "GraniteMoeSharedForCausalLM": {**PLAIN, **EXPERTS},
    "GPT2LMHeadModel": dict(n_embd=64, n_layer=3, n_head=4, vocab_size=100),
    "GPTBigCodeForCausalLM": dict(n_embd=64, n_layer=3, n_head=4, vocab_size=100),
}


def build(name: str, values: dict, device: str = "meta"):
    """A model of random weights, or a skip where this transformers has no such class."""
    wanted = getattr(transformers, name, None)
    if wanted is None:
        pytest.skip(f"no {name} in transformers {transformers.__version__}")
    if name == "ZambaForCausalLM" and not HYBRIDS:
        pytest.skip("its config has other values there")
    torch.manual_seed(0)
    with torch.device(device):
        return wanted(wanted.config_class(**copy.deepcopy(values))).eval()


def full_plans(model):
    """The layers' plans with every head full, as patch hands them to the probe."""
    full = Plan.full(ModelId.of(model))
    return resolve_layers(full, layer_shapes(model), full.below)


@pytest.mark.parametrize("name", CASES)
def test_patch_refuses_in_true_words(name):
    kind, values, says = CASES[name]
    model = build(kind, values)
    if not HYBRIDS:
        says += f"|{EARLIER.get(name, says)}"
    before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    with pytest.raises(PatchError, match=says) as told:
        hfsparse.patch(model)
    assert "tensor parallel" not in str(told.value)
    assert str(told.value).startswith(f"{kind} can't be patched: ")
    known = ("sliding windows", "chunks", "hybrids", "latents", "(docs/families.md)")
    tail = str(told.value).partition(". Supported: ")[2]
    assert all(words in tail for words in known), tail
    assert not is_patched(model)
    after = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert after == before


@pytest.mark.parametrize("name", OWN_MASKS)
def test_what_is_accepted_runs(name):
    model, ids = build(name, OWN_MASKS[name], "cpu"), tokens(1, 20)
    with torch.no_grad():
        stock = model(ids).logits
    try:
        handle = hfsparse.patch(model)
    except PatchError as told:
        assert "it builds attention masks of its own, of 4 dimensions" in str(told)  # noqa: PT017
        return
    with handle, torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_runs_supported_families_to_their_end(family):
    """Experts, linear layers and image classes too: code that stopped it would tell nothing."""
    if not exists(family):
        pytest.skip(f"not in transformers {transformers.__version__}")
    if family in ("qwen3_next", "lfm2", "falcon_h1", "zamba2") and not HYBRIDS:
        pytest.skip("refused before it is probed")
    model = supported(family)
    decoder = model.get_decoder()
    with probe._without_data():
        probe._run(type(decoder), copy.deepcopy(decoder.config), full_plans(model))


def test_a_model_is_left_as_it_was(monkeypatch):
    """Weights, random states, mode, hooks and counters; nothing of it is called."""
    model, calls = fresh("llama"), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = {name: vars(module).keys() for name, module in model.named_modules()}
    monkeypatch.setattr(probe, "found", {})
    model.train()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with torch.inference_mode():
        handle = hfsparse.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    handle.undo()
    assert not calls
    assert model.training
    assert {name: vars(module).keys() for name, module in model.named_modules()} == held
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_a_config_is_probed_once_and_another_again(monkeypatch):
    runs, run = [], probe._run
    monkeypatch.setattr(probe, "_run", lambda *args: runs.append(1) or run(*args))
    monkeypatch.setattr(probe, "found", {})
    model = fresh("llama")
    for _ in range(3):
        hfsparse.patch(model).undo()
    assert len(runs) == 1
    hfsparse.patch(fresh("mistral-window")).undo()
    assert len(runs) == 2


def test_models_patched_in_two_threads_leave_logging_as_it_was(monkeypatch):
    """None takes for the user's what another's probe silences for the whole process."""
    log, said = logging.getLogger(FakeTensor.__module__), transformers.logging.get_verbosity()
    run, begun, models = probe._run, threading.Barrier(2), [fresh("llama"), fresh("qwen3")]

    def meet(*args):
        with contextlib.suppress(threading.BrokenBarrierError):
            begun.wait(timeout=1)  # both are silent, unless one waits for the other
        return run(*args)

    monkeypatch.setattr(probe, "_run", meet)
    monkeypatch.setattr(probe, "found", {})
    with ThreadPoolExecutor(2) as pool:
        handles = list(pool.map(hfsparse.patch, models))
    try:
        assert (log.disabled, transformers.logging.get_verbosity()) == (False, said)
    finally:
        log.disabled = False
        transformers.logging.set_verbosity(said)
    for handle in handles:
        handle.undo()


def test_code_that_wants_data_is_left_to_its_calls(monkeypatch):
    """A decoder that the probe can't run is patched all the same, and works."""
    model, ids, own = fresh("llama"), tokens(1, 20), transformers.LlamaModel.forward
    wanted = []

    def forward(self, *args, **kwargs):
        if isinstance(self.embed_tokens.weight, FakeTensor):
            wanted.append(1)
            raise RuntimeError("no data")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    monkeypatch.setattr(probe, "found", {})
    stock = model(ids).logits
    with hfsparse.patch(model):
        torch.testing.assert_close(model(ids).logits, stock, rtol=0, atol=1e-5)
    assert wanted


def test_a_layer_without_our_attention_is_noticed():
    """The last layer calls a function of its own: no later update of the cache would show it."""

    class Own(transformers.LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            last = self.layers[-1].self_attn
            last.forward = lambda hidden_states, **kwargs: self.plain(last, hidden_states, **kwargs)

        @staticmethod
        def plain(attention, hidden_states, **kwargs):
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            if cache is not None:
                shape = (*hidden_states.shape[:2], -1, attention.head_dim)
                keys = attention.k_proj(hidden_states).view(shape).transpose(1, 2)
                cache.update(keys, keys, attention.layer_idx)
            return hidden_states, None

    model = LlamaForCausalLM(LlamaConfig(**GQA))
    model.model = Own(model.config)
    with pytest.raises(PatchError, match="doesn't call attention once for each update"):
        hfsparse.patch(model)


def test_a_module_that_several_layers_call_is_refused():
    model = build("ZambaForCausalLM", ZAMBA)
    layers = model.model.layers
    layers[2].shared_transf = layers[1].shared_transf
    with pytest.raises(PatchError, match=r"attention layers are \[1\], its config says \[1, 2\]"):
        hfsparse.patch(model)


def test_a_module_that_is_told_another_layer_than_its_place_is_refused(monkeypatch):
    model = build("ZambaForCausalLM", ZAMBA)
    attention = type(model.model.layers[1].shared_transf.self_attn)
    forward = attention.forward

    def turned(self, hidden_states, layer_idx, **kwargs):
        return forward(self, hidden_states, 3 - layer_idx, **kwargs)

    monkeypatch.setattr(attention, "forward", turned)
    monkeypatch.setattr(probe, "found", {})
    with pytest.raises(PatchError, match="of layer 1 keeps its keys in layer 2 of the cache"):
        hfsparse.patch(model)


@pytest.mark.parametrize("name", ["mamba"])
def test_a_config_without_one_shape_is_one_kind_of_error(name):
    kind, values, says = CASES[name]
    config = build(kind, values).config
    for read in (
        layer_shapes,
        lambda config: attention_values(config.get_text_config(decoder=True)),
    ):
        with pytest.raises(ShapeError, match=says):
            read(config)
    with pytest.raises(PlanError, match=says):
        ModelId.of(config)


def test_a_config_that_holds_anything_is_one_kind_of_error():
    model = fresh("llama")
    vars(model.config)["no_rope_layers"] = 3  # a list by layer
    with pytest.raises(PlanError, match="not a model that a plan can describe"):
        ModelId.of(model)
    with pytest.raises(PatchError, match="gives no one shape for all layers"):
        hfsparse.patch(model)
