"""What a command does before it computes: threads that torch gets, a model and its tokenizer."""

import copy
import re

import psutil
import pytest
import torch
from transformers import Qwen3Config
from typer.testing import CliRunner

import hfsparse
from hfsparse.cli import app
from hfsparse.errors import UsageError
from hfsparse.models.loading import input_ids, leave_busy_cores, load
from tests import tiny


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores, of which some are busy; tells the threads that torch is set to."""
    found = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 1, 2, 3], raising=False)

    def busy(*shares):
        monkeypatch.setattr(psutil, "cpu_percent", lambda **_: list(shares))
        leave_busy_cores()
        return found

    return busy


def test_an_idle_machine_keeps_its_threads(machine, capsys):
    assert machine(0.0, 3.0, 10.0, 5.0) == []
    assert capsys.readouterr().err == ""


def test_cores_that_others_keep_busy_are_left_to_them(machine, capsys):
    assert machine(100.0, 2.0, 97.0, 0.0) == [2]
    assert "2 of 4 threads are used" in capsys.readouterr().err


def test_one_thread_is_left_on_a_machine_that_is_full(machine):
    assert machine(100.0, 100.0, 100.0, 100.0) == [1]


def test_who_sets_a_number_of_threads_gets_it(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert machine(100.0, 100.0, 100.0, 100.0) == []


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """transformers makes an empty one of the config: texts made of its tokens never end."""
    config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="makes no tokens of a text: its files are missing"):
        load(str(tmp_path), "cpu")


@pytest.mark.parametrize("use", ["profile", "eval", "generate"])
def test_a_token_without_an_embedding_is_refused_where_it_is_used(use, tmp_path):
    small = dict(vocab_size=60, window=4096)  # of 400 tokens
    ruler = ["eval", "ruler", "--tasks", "niah_single_1"]
    model, tokenizer = tiny.llama(**small), tiny.tokenizer()
    said = "makes token [0-9]+ of this text, and LlamaForCausalLM has embeddings for 0 to 59"
    if use == "profile":
        with pytest.raises(UsageError, match=said):
            hfsparse.profile(model, tokenizer, lengths=(512,), samples=1)
        return
    folder, prompt = tiny.save(tmp_path / "model", **small), tmp_path / "prompt.txt"
    prompt.write_text("a text")
    words = {
        "generate": ["generate", folder, "--prompt-file", prompt],
        "eval": [*ruler, folder, "--lengths", 2048, "--samples", 1, "-o", tmp_path / "out"],
    }
    result = CliRunner().invoke(app, [*map(str, words[use])])
    assert result.exit_code == 1
    assert re.search(said, re.sub(r"\s+", " ", result.output)), result.output


def test_a_tokenizer_with_more_entries_than_its_texts_use_is_no_harm():
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(["<later>"])
    model = tiny.llama()
    assert len(tokenizer) > model.config.vocab_size
    assert input_ids(model, [tokenizer("a text").input_ids]).shape[0] == 1
    with pytest.raises(UsageError, match="makes token 400 of this text"):
        input_ids(model, [tokenizer("a <later> text").input_ids])
