"""Load a model and its tokenizer for a command line, with one clear sentence when that fails."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from hfsparse.errors import UsageError, first_line
from hfsparse.models.classes import class_of, is_half
from hfsparse.reading import local

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Packages that transformers imports where they are installed; they warn of what a user can't mend.
CHATTY = ("torchao", "torch.utils._pytree")
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "tekken.json")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def load(
    model: str, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode on `device`, and its tokenizer; `model` is a folder or a hub name.

    `auto` is the GPU if there is one, and float32 on a CPU, bfloat16 elsewhere.
    """
    place, here = find(model)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    target = pick_device(device)
    if target.type == "cpu":
        leave_busy_cores()
    options = {"dtype": pick_dtype(dtype, target)}
    parts = (
        ("the configuration", AutoConfig, {}),
        ("the tokenizer", AutoTokenizer, {}),
        ("the weights", AutoModelForCausalLM, options),
    )
    loaded = {}
    for what, loader, extra in parts:
        if loader is AutoModelForCausalLM:
            _note_half(loaded["the configuration"])
        try:
            loaded[what] = loader.from_pretrained(place, local_files_only=here, **extra)
        except Exception as problem:  # transformers raises OSError, ValueError, KeyError, and more
            if loader is AutoTokenizer and here and not _has_tokenizer(place):
                raise _without_tokenizer(model) from problem
            raise not_loaded(what, model, here, problem) from problem
        if loader is AutoTokenizer and not loaded[what]("a text").input_ids:
            raise _without_tokenizer(model)
    return loaded["the weights"].to(target).eval(), loaded["the tokenizer"]


def _has_tokenizer(folder: str) -> bool:
    """Whether a folder has a file of any tokenizer: of none, a version of transformers makes an
    empty one, another asks for a package that would read it."""
    return any(any(Path(folder).glob(name)) for name in TOKENIZER_FILES)


def _without_tokenizer(model: str) -> UsageError:
    return UsageError(
        f"the tokenizer of {model} makes no tokens of a text: its files are missing there; save "
        "the model's tokenizer beside it (tokenizer.save_pretrained)"
    )


def _note_half(config: PretrainedConfig) -> None:
    """Say that a model's text half is loaded, before transformers reports the other's weights."""
    kind = class_of(config)
    if kind is not None and is_half(kind, config):
        print(
            f"note: the text half of this model is loaded, {kind.__name__}: transformers may "
            "report the weights of the other half as unexpected, or not used",
            file=sys.stderr,
        )


def load_config(model: str) -> PretrainedConfig:
    """The configuration of a model; `model` is a folder or a hub name."""
    place, here = find(model)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, local_files_only=here)
    except Exception as problem:  # transformers raises OSError, ValueError, KeyError, and more
        raise not_loaded("the configuration", model, here, problem) from problem


def hush() -> None:
    """Keep CHATTY packages silent, of all but errors; before transformers is imported."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def leave_busy_cores() -> None:
    """Have torch use no more threads than there are idle cores, unless OMP_NUM_THREADS is set.

    Threads of one operation wait for one another: where other work keeps a core busy, each of
    thousands of small operations would wait until that core is free for a moment.
    """
    import psutil
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    busy = psutil.cpu_percent(interval=0.3, percpu=True)
    cores = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    idle = round(sum(1 - busy[core] / 100 for core in cores or range(len(busy))))
    if idle < threads:
        torch.set_num_threads(max(1, idle))
        print(
            f"note: other work keeps cores busy: {max(1, idle)} of {threads} threads are used "
            "(OMP_NUM_THREADS sets another number)",
            file=sys.stderr,
        )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config, without weights: on torch's meta device; UsageError if not built.

    It is of the class that `load` gives.
    """
    import torch
    import transformers

    named = class_of(config)
    if named is not None and is_half(named, config):
        config = config.get_text_config(decoder=True)
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return (named or transformers.AutoModelForCausalLM.from_config)(config)
    except Exception as problem:  # whatever a config can do to transformers
        name = type(config).__name__
        raise UsageError(f"can't build the model of {name}: {first_line(problem)}") from problem
    finally:
        transformers.logging.set_verbosity(said)


def find(model: str) -> tuple[str, bool]:
    """What transformers loads `model` from, and whether that is a folder here, not the hub.

    UsageError where it can be neither.
    """
    path = local(model)
    try:
        found, whole = path.is_dir(), (path / "config.json").is_file()
        file = not found and path.exists()
    except (OSError, ValueError) as problem:
        raise UsageError(f"can't look for the model {model}: {first_line(problem)}") from problem
    if found:
        if not whole:
            raise UsageError(f"{model} has no config.json: give the folder of a Hugging Face model")
        return str(path), True
    if file:
        raise UsageError(f"{model} is a file: give the folder of a Hugging Face model")
    if not HUB_NAME.fullmatch(model):
        raise UsageError(f"no such model folder: {model}")
    return model, False


def not_loaded(what: str, model: str, here: bool, problem: Exception) -> UsageError:
    """The sentence for a part of `model` that transformers can't load."""
    sentence = f"cannot load {what} of {model}: {first_line(problem)}"
    if not here:
        sentence += f" (there is no folder {model} here, so it was asked of the Hugging Face hub)"
    return UsageError(sentence)


def pick_device(name: str) -> torch.device:
    """The device of a name, `auto` too; UsageError for one that can't be used."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as problem:  # RuntimeError, AssertionError: each back end has its own
        raise UsageError(f"device {name} can't be used: {first_line(problem)}") from problem
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name, `auto` too; UsageError for one that is not among DTYPES."""
    import torch

    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name}: give one of {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where tokens go in: to the embeddings, or to where accelerate brings these when called."""
    return device_of(model.get_input_embeddings())


def input_ids(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of tokens as `[B, S]`, where they go in; UsageError for one without an embedding."""
    import torch

    check_ids(model, chain.from_iterable(rows))
    return torch.tensor(rows, device=input_device(model))


def check_ids(model: PreTrainedModel, ids: Iterable[int]) -> None:
    """Raise UsageError for tokens that a model has no embedding for: on a GPU, looking one up ends
    the process's work there. A tokenizer may have more entries than a text uses."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    largest = max(ids, default=0)
    if known is not None and largest >= known:
        raise UsageError(
            f"the tokenizer makes token {largest} of this text, and {type(model).__name__} has "
            f"embeddings for 0 to {known - 1}: give the tokenizer that the model was saved with, "
            "or the model that was trained with the added tokens"
        )


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module runs: where its weights lie, or where accelerate brings these when called."""
    import torch

    for part in module.modules():
        if lie := [w.device for w in part.parameters(recurse=False) if not w.is_meta]:
            return lie[0]
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if (place := getattr(each, "execution_device", None)) is not None:
                return torch.device(place)
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """As plans call it under `measured`."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
