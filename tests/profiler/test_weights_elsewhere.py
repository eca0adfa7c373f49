"""Weights that lie elsewhere or are quantised: told apart, profiled, or refused in a sentence."""

import hashlib
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from typer.testing import CliRunner

import hfsparse
from hfsparse.cli import app
from hfsparse.errors import UsageError
from hfsparse.models.loading import input_device
from hfsparse.models.weights import weights_mark
from hfsparse.profiler.methods import duo
from tests import tiny

SETTINGS = dict(lengths=(512,), samples=1, prefill_density=0.9, cache_share=0.9, decode_share=0.9)
CPU = torch.device("cpu")


def on_cpu(model, folder):
    cpu_offload(model, execution_device=CPU)


def on_disk(model, folder):
    disk_offload(model, folder, execution_device=CPU)


def in_part(model, folder):
    places = {"model.layers.1": "disk", "lm_head": "disk"}
    here = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm")
    where = {**dict.fromkeys(here, "cpu"), **places}
    dispatch_model(model, where, main_device="cpu", offload_dir=folder)


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize = torch.ao.quantization.quantize_dynamic
        return quantize(model, {torch.nn.Linear}, dtype=torch.qint8)


def torchao(model, config="Int8WeightOnlyConfig"):
    made = pytest.importorskip("torchao.quantization")
    made.quantize_(model, getattr(made, config)())
    return model


def by_activations(model):
    return torchao(model, "Int8DynamicActivationInt8WeightConfig")


def quanto(model):
    made = pytest.importorskip("optimum.quanto")
    made.quantize(model, weights=made.qint8)
    made.freeze(model)
    return model


offloaded = pytest.mark.parametrize("offload", [on_cpu, on_disk, in_part])
quantised = pytest.mark.parametrize("quantise", [dynamic, torchao, by_activations, quanto])


# ---- the mark


def test_the_mark_of_plain_weights_is_that_of_earlier_versions():
    model, seen = tiny.llama(), hashlib.sha256()
    for name, tensor in model.state_dict().items():
        few = tensor.flatten()[:: max(1, tensor.numel() // 64)]
        seen.update(name.encode() + few.numpy().tobytes())
    assert weights_mark(model) == seen.hexdigest()[:16]


@offloaded
def test_weights_that_accelerate_keeps_are_read_from_where_they_lie(offload, tmp_path):
    model = tiny.llama()
    offload(model, tmp_path)
    assert any(weight.is_meta for weight in model.parameters())
    assert weights_mark(model) == weights_mark(tiny.llama())
    assert input_device(model) == CPU


@quantised
def test_quantised_weights_are_told_apart(quantise):
    one, same, other, plain = (tiny.llama() for _ in range(4))
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    marks = [weights_mark(quantise(model)) for model in (one, same, other)]
    assert marks[0] == marks[1] != marks[2]
    assert weights_mark(plain) not in marks
    assert "not read" not in marks[0]


def test_weights_quantised_alike_for_other_activations_are_told_apart():
    assert weights_mark(torchao(tiny.llama())) != weights_mark(by_activations(tiny.llama()))


def test_weights_that_cannot_be_read_are_counted_and_count_by_their_shape():
    with torch.device("meta"):
        nowhere, wider = (tiny.llama(intermediate_size=n) for n in (64, 128))
    total = len(nowhere.state_dict())
    assert weights_mark(nowhere).endswith(f", {total} of {total} weights not read")
    assert weights_mark(nowhere) != weights_mark(wider)
    part = tiny.llama()
    part.lm_head.to("meta")
    assert weights_mark(part).endswith(f", 1 of {total} weights not read")
    with torch.no_grad():
        part.model.norm.weight[0] += 1
    assert weights_mark(part)[:16] != weights_mark(tiny.llama())[:16]


# ---- profile


@pytest.mark.parametrize(
    ("offload", "method"),
    [(on_cpu, "balanced"), (on_disk, "moa"), (in_part, "balanced"), (in_part, "duo")],
)
def test_an_offloaded_model_gets_the_plan_of_the_same_model_in_memory(
    offload, method, tmp_path, monkeypatch
):
    monkeypatch.setattr(duo, "STEPS", 2)
    model = tiny.llama()
    offload(model, tmp_path)
    settings = dict(SETTINGS, method=method, verify=method == "balanced", verify_samples=1)
    plan, wanted = (
        hfsparse.profile(each, tiny.tokenizer(), **settings) for each in (model, tiny.llama())
    )
    assert plan.layers == wanted.layers
    assert plan.made.get("verified", {}).get("told") == wanted.made.get("verified", {}).get("told")


@pytest.mark.parametrize("quantise", [torchao, quanto])
def test_weights_that_let_gradients_through_are_profiled(quantise):
    plan = hfsparse.profile(quantise(tiny.llama()), tiny.tokenizer(), **SETTINGS, verify_samples=1)
    assert "verified" in plan.made


@pytest.mark.parametrize("quantise", [dynamic, by_activations])
@pytest.mark.parametrize("method", ["balanced", "minference", "moa", "duo"])
def test_weights_that_let_no_gradient_through_are_refused_in_a_sentence(quantise, method):
    model = quantise(tiny.llama())
    with pytest.raises(UsageError, match=r"let no gradient through.*or use method streaming-llm"):
        hfsparse.profile(model, tiny.tokenizer(), **SETTINGS, method=method, verify=False)
    assert not hfsparse.patcher.state.is_patched(model)


@pytest.mark.parametrize("quantise", [dynamic, by_activations])
def test_methods_without_gradients_profile_any_weights(quantise):
    model = quantise(tiny.llama())
    settings = dict(SETTINGS, verify_samples=1)
    for more in (dict(method="streaming-llm"), dict(method="duo", proxy="copy", verify=False)):
        hfsparse.profile(model, tiny.tokenizer(), **{**settings, **more})


# ---- eval


def test_a_quantised_checkpoint_is_evaluated(tmp_path):
    from transformers import LlamaForCausalLM, TorchAoConfig

    made = pytest.importorskip("torchao.quantization")
    base = tiny.save(tmp_path / "base")
    how = TorchAoConfig(made.Int8WeightOnlyConfig())
    model = LlamaForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantised")
    tiny.tokenizer(chat=True).save_pretrained(tmp_path / "quantised")
    words = ["eval", "ppl", tmp_path / "quantised", "--lengths", "256", "--samples", "1"]
    result = CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
