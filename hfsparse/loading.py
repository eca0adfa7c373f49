"""Load a model and its tokenizer for a command line, with one clear sentence when that fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


class UsageError(ValueError):
    """What the user gave can't be used. Command lines print it as one line, `error: …`."""


def load(
    model: str, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode on `device`, and its tokenizer; `model` is a folder or a hub name.

    `auto` is the GPU if there is one, and float32 on a CPU, bfloat16 elsewhere.
    """
    local = _check_folder(model)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    target = _device(device)
    options = {"dtype": _dtype(dtype, target)}
    parts = (
        ("the configuration", AutoConfig, {}),
        ("the tokenizer", AutoTokenizer, {}),
        ("the weights", AutoModelForCausalLM, options),
    )
    loaded = {}
    for what, loader, extra in parts:
        try:
            loaded[what] = loader.from_pretrained(model, local_files_only=local, **extra)
        except Exception as problem:  # transformers raises OSError, ValueError, KeyError, and more
            raise UsageError(f"cannot load {what} of {model}: {_first_line(problem)}") from problem
    return loaded["the weights"].to(target).eval(), loaded["the tokenizer"]


def _check_folder(model: str) -> bool:
    """Whether `model` is a folder here, not a hub name; raises when it can be neither."""
    try:
        path = Path(model).expanduser()
        found, whole = path.is_dir(), (path / "config.json").is_file()
    except (OSError, RuntimeError) as problem:
        raise UsageError(f"can't look for the model {model}: {_first_line(problem)}") from problem
    if found:
        if not whole:
            raise UsageError(f"{model} has no config.json: give the folder of a Hugging Face model")
        return True
    if path.exists():
        raise UsageError(f"{model} is a file: give the folder of a Hugging Face model")
    if model.startswith((".", "/", "~")) or len(path.parts) > 2:
        raise UsageError(f"no such model folder: {model}")
    return False


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as problem:  # RuntimeError, AssertionError: each back end has its own
        raise UsageError(f"device {name} can't be used: {_first_line(problem)}") from problem
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name}: give one of {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def device_name(device: torch.device) -> str:
    """As plans call it under `measured`."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
