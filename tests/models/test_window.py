"""How many tokens a model can read, by its config; what goes beyond; and calibration's lengths."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlavaConfig,
    MptConfig,
    Olmo3Config,
    OPTConfig,
    OPTForCausalLM,
)
from typer.testing import CliRunner

import hfsparse
from hfsparse.cli import app
from hfsparse.errors import UsageError
from hfsparse.models.window import calibration_lengths, context_window, limit
from tests import tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONG = dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8)


def llama(scaling=None, window=1024, **more):
    sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    return LlamaConfig(
        max_position_embeddings=window, rope_theta=1e4, rope_scaling=scaling, **sizes, **more
    )


def older(type, **values):
    """As configs of transformers 4 spell it."""
    return llama({"type": type, **values})


WINDOWS = {
    "plain": (llama(), 1024),
    "yarn": (llama(YARN), 4096),
    "yarn, written by Qwen's card": (
        older("yarn", factor=4.0, original_max_position_embeddings=1024),
        4096,
    ),
    "yarn, length extended": (llama(YARN, window=4096), 4096),
    "yarn of the length given": (llama({"rope_type": "yarn", "factor": 2.0}), 2048),
    "dynamic": (llama({"rope_type": "dynamic", "factor": 4.0}), 4096),
    "dynamic, older": (older("dynamic", factor=2.5), 2560),
    "linear": (llama({"rope_type": "linear", "factor": 8.0}), 1024),
    "llama3": (
        llama(
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        ),
        1024,
    ),
    "longrope, length extended": (
        llama({"rope_type": "longrope", **LONG, "original_max_position_embeddings": 128}),
        1024,
    ),
    "longrope, length of the training": (
        llama(dict(LONG, rope_type="longrope", factor=3, original_max_position_embeddings=1024)),
        3072,
    ),
    "layers alike but for their kind": (
        Olmo3Config(max_position_embeddings=1024, num_hidden_layers=4, rope_scaling=YARN),
        4096,
    ),
    "windows beside full layers": (
        Gemma3TextConfig(max_position_embeddings=1024, num_hidden_layers=6),
        1024,
    ),
    "a text tower": (LlavaConfig(text_config=llama(YARN)), 4096),
    "a table": (GPT2Config(n_positions=512), 512),
    "no positions": (MptConfig(), None),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_the_window_is_what_rope_scaling_reaches(name):
    config, wanted = WINDOWS[name]
    assert context_window(config) == wanted


GPT = dict(n_positions=64, n_layer=1, n_head=2, n_embd=32, vocab_size=100)
OPT = dict(max_position_embeddings=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100)
WIDE = dict(hidden_size=32, ffn_dim=32, word_embed_proj_dim=32)
TABLES = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "OPT": lambda: OPTForCausalLM(OPTConfig(**OPT, **WIDE)),
}
if transformers.__version__ >= "5":  # before, GPT-J can't be patched
    TABLES["GPT-J"] = lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=8))


@pytest.mark.parametrize("family", TABLES)
def test_nothing_lies_beyond_a_table_of_positions(family):
    model = TABLES[family]().eval()
    assert limit(model) == 64
    with pytest.raises(UsageError, match="can't go beyond its window of 64 tokens"):
        limit(model, beyond=True)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, 70, dtype=torch.long))


def test_the_window_of_a_rotated_model_is_a_limit_unless_passed():
    assert limit(tiny.llama(window=512)) == 512
    assert limit(tiny.llama(window=512), beyond=True) is None
    assert limit(tiny.llama(window=400), beyond=True) is None  # the vocabulary is no table


@pytest.mark.parametrize(
    ("device", "window", "wanted"),
    [
        ("cpu", 131072, (1024, 2048)),
        ("cpu", None, (1024, 2048)),
        ("cpu", 2048, (1024, 2048)),
        ("cpu", 1500, (750, 1500)),
        ("cpu", 1000, (512, 1000)),
        ("cpu", 512, (512,)),
        ("cpu", 300, (300,)),
        ("cpu", 256, (256,)),
        ("cuda", 131072, (4096, 16384)),
        ("cuda", None, (4096, 16384)),
        ("cuda", 8192, (1024, 4096)),
        ("cuda", 2048, (512, 2048)),
        ("cuda", 600, (512, 600)),
    ],
)
def test_calibration_lengths_follow_the_device_and_the_window(device, window, wanted):
    weight = SimpleNamespace(device=torch.device(device), is_meta=False)
    words = SimpleNamespace(parameters=lambda recurse: [weight], modules=lambda: [words])
    config = MptConfig() if window is None else llama(window=window)
    model = SimpleNamespace(config=config, get_input_embeddings=lambda: words)
    assert calibration_lengths(model) == wanted


def test_profile_takes_lengths_that_fit_where_none_are_given():
    for window, lengths in ((512, [512]), (1024, [512, 1024])):
        model = tiny.llama(window=window)
        settings = dict(samples=1, method="streaming-llm", cache_share=0.9, verify_samples=1)
        plan = hfsparse.profile(model, tiny.tokenizer(), **settings)
        assert [*plan.expected] == plan.made["verified"]["lengths"] == lengths


@pytest.fixture(scope="module", params=["yarn", "dynamic", "plain"])
def folder(request, tmp_path_factory):
    """A model trained on 512 tokens; what was scaled reads 2,048, as the config of 4.x says."""
    made = tiny.save(tmp_path_factory.mktemp("models") / request.param)
    config = json.loads((made / "config.json").read_text())
    config.pop("rope_parameters", None)
    scaling = {"type": request.param, "factor": 4.0, "original_max_position_embeddings": 512}
    if request.param == "dynamic":
        scaling.pop("original_max_position_embeddings")
    if request.param != "plain":
        config["rope_scaling"] = scaling
    (made / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    return made


COMMANDS = {
    "bench": ["bench", "MODEL", "--lengths", "1024", "--repeat", "1"],
    "profile": ["profile", "MODEL", "-o", "OUT", "--lengths", "1024", "--samples", "1",
                "--method", "streaming-llm", "--no-verify"],
    "generate": ["generate", "MODEL", "--prompt-file", "PROMPT", "--max-new-tokens", "1"],
    "eval": ["eval", "ppl", "MODEL", "--lengths", "1024", "--samples", "1", "-o", "OUT"],
    "custom": ["eval", "custom", "MODEL", "--data", "ROWS", "-o", "OUT", "--max-new-tokens", "1"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_go_as_far_as_the_window_or_beyond_it_when_told(folder, command, tmp_path):
    text = "all the clocks struck thirteen. " * 40
    (tmp_path / "prompt").write_text(text)
    (tmp_path / "rows").write_text(json.dumps({"prompt": text, "answers": ["1"]}))
    paths = dict(MODEL=folder, OUT=tmp_path / "out", PROMPT=tmp_path / "prompt")
    paths["ROWS"] = tmp_path / "rows"
    words = [str(paths.get(word, word)) for word in COMMANDS[command]]
    result = CliRunner().invoke(app, words)
    if folder.name == "plain":
        assert result.exit_code == 1
        assert "window" in result.stderr.splitlines()[-1]
        assert "512" in result.stderr.splitlines()[-1]
        result = CliRunner().invoke(app, [*words, "--beyond-window"])
    assert result.exit_code == 0, result.output


def test_what_has_nothing_beyond_its_window_is_refused_by_profile():
    model = TABLES["GPT-2"]().eval()
    settings = dict(lengths=(256,), samples=1, method="streaming-llm", verify=False)
    with pytest.raises(UsageError, match="window is 64 tokens"):
        hfsparse.profile(model, tiny.tokenizer(), **settings)
    with pytest.raises(UsageError, match="can't go beyond its window of 64 tokens"):
        hfsparse.profile(model, tiny.tokenizer(), beyond_window=True, **settings)
