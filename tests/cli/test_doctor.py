"""`hfsparse doctor`: what is missing, broken or refused is a line; MODEL decides the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from typer.testing import CliRunner

import hfsparse
from hfsparse import kernels
from hfsparse.cli import app, doctor
from hfsparse.errors import PatchError
from hfsparse.kernels import Kernel
from hfsparse.models.loading import skeleton
from tests import tiny


def run(*words):
    """(exit code, what was printed)."""
    result = CliRunner().invoke(app, ["doctor", *map(str, words)])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.stdout


def line(name: str, printed: str) -> str:
    """The facts of one name."""
    found = [row for row in printed.splitlines() if row.startswith(f"{name} ")]
    assert found, f"no line {name} in\n{printed}"
    return "\n".join(found)


def config_only(folder: Path, config) -> Path:
    """A model folder without weights."""
    config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


# ---- what it prints


def test_it_prints_versions_machine_and_kernels():
    code, printed = run()
    assert code == 0
    assert torch.__version__ in line("torch", printed)
    assert transformers.__version__ in line("transformers", printed)
    assert str(torch.get_num_threads()) in line("threads", printed)
    assert "reference (PyTorch): runs" in line("prefill", printed)
    assert "reference (PyTorch): runs" in line("decode", printed)
    assert "mistral" in line("families", printed)
    assert "\x1b" not in printed


def test_json_is_the_same_report():
    code, printed = run("--json")
    assert code == 0
    assert json.loads(printed) == doctor.report()


def test_packages_that_are_not_installed_are_named(monkeypatch):
    def version(name):
        if name in ("triton", "flash-attn-4"):
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(doctor.metadata, "version", version)
    _, printed = run()
    for name in ("triton", "flash-attn-4"):
        assert line(name, printed).split(maxsplit=1)[1] == "not installed"
    assert "1.2.3" in line("accelerate", printed)


@pytest.mark.parametrize("missing", [["transformers"], ["torch", "transformers", "triton"]])
def test_without_torch_or_transformers_it_still_reports(missing, tmp_path):
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n"
        f"sys.argv = ['hfsparse', 'doctor', {str(tmp_path)!r}]\n"
        "from hfsparse.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1  # of a model that can't be judged
    assert done.stderr == ""
    for name in ("threads", "cuda", "prefill") if len(missing) == 1 else ("cuda", "kernels"):
        assert ("ModuleNotFoundError" in line(name, done.stdout)) == (len(missing) > 1)
    assert "can't be patched" in line("model", done.stdout)


def test_the_environment_is_shown(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # kernels would stay interpreted
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, printed = run()
    assert line("OMP_NUM_THREADS", printed).endswith(" 1")
    assert line("TRITON_INTERPRET", printed).endswith("not set")
    assert line("CUDA_VISIBLE_DEVICES", printed).endswith("not set")


# ---- transformers


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("4.57.6", "tested"),
        ("5.24.0", "tested"),
        ("5.3.1", "untested, between 5.0.0 and 5.17.0, which are"),
        ("5.24.0.dev0", "untested, between 5.17.0 and 5.24.0, which are"),
        ("5.25.0", "newer than the newest tested, 5.24.0"),
        ("4.57.1", "older than the oldest tested, 4.57.6"),
        ("4.56.2", "unsupported: install 4.57 to 5.x"),
        ("6.0.0", "unsupported: install 4.57 to 5.x"),
    ],
)
def test_how_a_transformers_stands_to_the_tested_ones(version, words):
    assert doctor.standing(version) == words


def test_no_transformers_at_all_is_a_word(monkeypatch):
    monkeypatch.setattr(doctor, "versions", lambda: {"transformers": None})
    assert doctor.standing() == "not installed"


def test_the_supported_range_is_that_of_the_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    first, end = doctor.SUPPORTED
    assert f"transformers>={first},<{end}" in project["dependencies"]


def test_the_families_are_those_of_the_support_table():
    support = pytest.importorskip("tests.support.models")
    tested = [support.tiny(family).config.model_type for family in support.FAMILIES]
    assert list(doctor.FAMILIES) == list(dict.fromkeys(tested)), (
        "pytest tests/support -k FAMILY --write-support writes hfsparse/cli/families.txt anew"
    )


# ---- kernels and devices


def test_every_kernel_of_the_tables_is_there_and_says_why_not(monkeypatch):
    lame = Kernel("lame", None, lambda need: "needs a leg")
    half = Kernel("half", None, lambda need: None if need.lists else "lists only")
    tables = kernels.TABLES._replace(
        prefill=(lame, *kernels.PREFILL), decode=(half, *kernels.DECODE)
    )
    monkeypatch.setattr(kernels, "TABLES", tables)
    _, printed = run()
    assert "lame: does not run (needs a leg)" in line("prefill", printed)
    assert "half: runs lists, lists with softcap or sinks (lists only)" in line("decode", printed)
    for name, table in tables._asdict().items():
        for kernel in table:
            assert f"{kernel.name}: " in line(name, printed)


def test_cuda_devices_are_named(monkeypatch):
    props = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: props)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    _, printed = run()
    one = "Some GPU, 80.0 GiB, capability 9.0, driver unknown, CUDA 13.0"
    assert [row.split(maxsplit=1)[1] for row in line("cuda", printed).splitlines()] == [one, one]


def test_no_cuda_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in line("cuda", run()[1])

    def init():
        raise RuntimeError("Found no NVIDIA driver on your system.\nInstall one.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert line("cuda", run()[1]).endswith("no device: Found no NVIDIA driver on your system.")


# ---- a model


def test_a_model_that_can_be_patched(tmp_path):
    code, printed = run(config_only(tmp_path, tiny.llama().config))
    assert code == 0
    assert f"{tmp_path} (tested in every way of use: docs/support.md)" in line("model", printed)
    shape = "LlamaForCausalLM, 2 layers, 4 q heads and 2 kv heads of 16, sha256:"
    assert shape in line("model", printed)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("Gemma", "accepted and right"),
        ("Bamba", "refused in a sentence: it has no attention layers that hfsparse knows; right"),
        ("T5", "not asked: no causal or image-text family of transformers "),
    ],
)
def test_what_the_census_says_of_a_family_is_told(family, says, tmp_path):
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=2)
    told = line("model", run(config_only(tmp_path, config))[1])
    assert f"{tmp_path} (census, docs/families.md: {says}" in told


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("T5ForConditionalGeneration", "it is an encoder-decoder"),
        ("", "Unrecognized configuration class"),  # T5 again, its class not named
    ],
)
def test_a_model_that_is_refused(name, why, tmp_path):
    kind = getattr(transformers, name or "T5ForConditionalGeneration").config_class
    config = kind(num_hidden_layers=2, architectures=[name] if name else None)
    code, printed = run(config_only(tmp_path, config))
    assert code == 1
    assert "can't be patched" in line("model", printed)
    assert why in line("model", printed)
    assert run(tmp_path, "--json")[0] == 1


def test_a_refusal_is_in_the_words_of_patch(tmp_path):
    """A window in the config that the model's code ignores: only a look at the code tells."""
    config = transformers.PhimoeConfig(
        num_hidden_layers=2, sliding_window=40, architectures=["PhimoeForCausalLM"]
    )
    code, printed = run(config_only(tmp_path, config))
    assert code == 1
    with pytest.raises(PatchError) as told:
        hfsparse.patch(skeleton(config))
    assert str(told.value) in line("model", printed)


def test_a_model_that_is_not_there_or_broken_is_a_line(tmp_path):
    code, printed = run(tmp_path / "absent")
    assert code == 1
    assert "no such model folder" in line("model", printed)
    (tmp_path / "config.json").write_text("{")
    code, printed = run(tmp_path)
    assert code == 1
    assert "cannot load the configuration" in line("model", printed)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    assert run(tmp_path)[0] == 1
    assert torch.__version__ in printed
