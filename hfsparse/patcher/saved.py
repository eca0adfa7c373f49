"""Caches in folders: what was read once is gone on from later, in another process too.

A folder holds `cache.json`, which says whose cache it is and what the host knows of each layer, and
a safetensors file for each layer that keeps any. Stores say themselves what is kept of them
(`Store.state`), and take it back (`Store.load`).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hfsparse import reading
from hfsparse.errors import CacheError, UsageError
from hfsparse.models.loading import device_of, pick_device
from hfsparse.models.names import text_decoder
from hfsparse.models.weights import weights_mark
from hfsparse.patcher.adopt import adopt, check_whole
from hfsparse.patcher.state import State
from hfsparse.plan import ModelId
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.cache.stateful import linear_state, load_linear_state
from hfsparse.version import __version__
from hfsparse.writing import whole_folder

FORMAT = 1
NAME = "cache.json"
AGAIN = "or read the prompt again and save its cache"
REMEDIES = {  # what must be the same where a cache is loaded; what to do where it isn't
    "plan": "patch the model with that plan",
    "fingerprint": "load that model",
    "dtype": "load the model in that dtype",
    "weights": "load the model with those weights",
    "heads": "load it on that rank of as many, patched alike",
}


def save(
    state: State,
    cache: Cache,
    folder: str | os.PathLike,
    tokens: Tensor | None = None,
    overwrite: bool = False,
) -> None:
    """Write a cache of this patch into a folder, as `Patched.save` says."""
    first = _check_cache(state, cache)
    target = _free(folder, overwrite)
    content = {
        "format": FORMAT,
        "versions": {"hfsparse": __version__, "transformers": transformers.__version__},
        **_identity(state),
        "columns": first.seen,
        "rows": first.rows,
        "tokens": None if tokens is None else _digest(tokens, first.rows, first.seen),
    }
    try:
        with whole_folder(target) as draft:
            content["layers"] = [_write(draft, at, x) for at, x in enumerate(cache.layers)]
            whole = {**content, "sha256": _hash(content)}
            (draft / NAME).write_text(json.dumps(whole), "utf-8")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"can't write into {folder}: {reading.why(error)}") from error


def load(
    state: State,
    folder: str | os.PathLike,
    tokens: Tensor | None = None,
    device: str | torch.device | None = None,
) -> DynamicCache:
    """The cache that a folder holds, as `Patched.load` says."""
    path = reading.local(folder)
    content = _read(path)
    own = _identity(state)
    for name, remedy in REMEDIES.items():
        if content[name] != own[name]:
            raise CacheError(
                f"{folder} was saved with {name} {content[name]}, and here it is {own[name]}: "
                f"{remedy}, {AGAIN}"
            )
    if tokens is not None and content["tokens"] is None:
        raise CacheError(
            f"{folder} was saved without its tokens, so none can be compared with it: leave tokens "
            "out, or save it with them"
        )
    if tokens is not None and content["tokens"] != _digest(
        tokens, content["rows"], content["columns"]
    ):
        raise CacheError(
            f"{folder} was read from other tokens than these begin with: give the prompt that it "
            f"was saved from, {AGAIN}"
        )
    place = None if device is None else pick_device(str(device))
    decoder, cache = text_decoder(state.model), DynamicCache()
    adopt(cache, decoder)
    plans = {layer.index: layer for layer in state.layers}
    modules = {getattr(m, "layer_idx", None): m for m in decoder.modules()}
    with torch.inference_mode(False):  # buffers are written in any mode
        for at, part in enumerate(content["layers"]):
            if part is None:
                continue
            index = part["index"]
            found = _read_layer(path, part, place or device_of(modules.get(index, decoder)))
            if index not in plans:
                load_linear_state(cache.layers[at], found)
                continue
            # A model that loops over layers has copies of some behind the others.
            cache.layers[at : at + 1] = [layer := plans[index].new_cache()]
            layer.load(found)
    del cache.layers[len(content["layers"]) :]
    return cache


def _check_cache(state: State, cache: Any) -> CacheLayer:
    """The first layer that is ours of a cache that can be saved; else a CacheError."""
    layers = getattr(cache, "layers", ())
    ours = [layer for layer in layers if isinstance(layer, CacheLayer)]
    if not isinstance(cache, Cache) or not ours or not all(x.is_initialized for x in ours):
        raise CacheError(
            f"this {type(cache).__name__} holds nothing that hfsparse could save: give the cache "
            "that a call of the patched model returned (past_key_values)"
        )
    if any(layer.owner != state.owner for layer in ours):
        raise CacheError(
            "this cache was filled under another patch: save it by that patch's handle, before undo"
        )
    check_whole(ours)
    for at, layer in enumerate(layers):
        if isinstance(layer, CacheLayer) or hasattr(layer, "conv_states"):
            continue
        if any(isinstance(x, Tensor) for x in getattr(layer, "__dict__", {}).values()):
            raise CacheError(
                f"layer {at} keeps its keys in a {type(layer).__name__}, which can't be saved: "
                "read the prompt with a new cache"
            )
    kinds = {type(store) for layer in ours for store in layer.stores}
    if silent := [kind.__name__ for kind in kinds if "state" not in vars(kind)]:
        raise CacheError(
            f"keys in a {silent[0]} can't be saved yet: use a plan that keeps none so, or read "
            "the prompt again where it is asked"
        )
    return ours[0]


def _identity(state: State) -> dict[str, str]:
    """Whose cache it is: of what must be the same where it is loaded."""
    decoder, plan = text_decoder(state.model), state.plan.hash()
    return {
        "plan": plan if state.exact is None else f"{plan}, exact",  # which keeps everything
        "fingerprint": ModelId.of(state.model).fingerprint,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "weights": weights_mark(decoder),
        "heads": state.whose or "all",
    }


def _digest(tokens: Tensor, rows: list[int], columns: int) -> str:
    """Hash of the tokens `[B, columns or more]` that a cache holds, padding left out."""
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"tokens are of type {type(tokens).__name__}: give ids, [B, S]") from error
    if ids.ndim != 2 or len(ids) != len(rows) or ids.shape[1] < columns or ids.is_floating_point():
        raise UsageError(
            f"tokens are {[*ids.shape]} of {ids.dtype}, and the cache holds {len(rows)} rows of "
            f"{columns} columns: give the ids that were read, padding included, or longer ones"
        )
    ids = ids[:, :columns].cpu().numpy().astype(np.dtype("<i8"))
    seen = hashlib.sha256(json.dumps(rows).encode())
    for row, n in zip(ids, rows, strict=True):
        seen.update(row[columns - n :].tobytes())
    return "sha256:" + seen.hexdigest()


def _free(folder: str | os.PathLike, overwrite: bool) -> Path:
    """Where a folder may be written; UsageError where something else lies there."""
    path = Path(os.path.realpath(reading.local(folder)))
    saved = (path / NAME).is_file()
    if saved and not overwrite:
        raise UsageError(f"{folder} holds a saved cache: give another folder, or overwrite=True")
    if os.path.lexists(path) and not saved and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{folder} is there and is no saved cache: give another folder")
    return path


def _write(folder: Path, at: int, layer: Any) -> dict[str, Any] | None:
    """Write the tensors of a cache's layer; what `cache.json` says of it, None: it keeps none."""
    ours = isinstance(layer, CacheLayer)
    tensors: dict[str, Tensor] = {}
    held = layer.state() if ours else linear_state(layer) if hasattr(layer, "conv_states") else {}
    told = _take_out(held, tensors)
    if not tensors:
        return None
    file = folder / f"layer-{at:03}.safetensors"
    save_file(tensors, file)
    index = layer.index if ours else at
    return {"index": index, "file": file.name, **_mark(file), "state": told}


def _read(path: Path) -> dict[str, Any]:
    """What `cache.json` says, and every file is as it says; else an Error."""
    try:
        content = reading.parse(reading.text(path / NAME))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"can't read {NAME} in {path}: {reading.why(error)}. Give a folder that handle.save "
            "has written"
        ) from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _hash(content):
        raise CacheError(f"{path / NAME} was changed since it was saved: {AGAIN[3:]}")
    if content["format"] != FORMAT:
        raise CacheError(
            f"{path} has format {content['format']} of hfsparse {content['versions']['hfsparse']}, "
            f"this one reads format {FORMAT}: load it with that version, {AGAIN}"
        )
    for part in filter(None, content["layers"]):
        try:
            found = _mark(path / part["file"])
        except OSError as error:
            raise UsageError(
                f"can't read {part['file']} in {path}: {reading.why(error)}"
            ) from error
        if any(part[name] != value for name, value in found.items()):
            raise CacheError(
                f"{path / part['file']} was cut short or changed since it was saved: {AGAIN[3:]}"
            )
    return content


def _mark(file: Path) -> dict[str, Any]:
    """A safetensors file's length, and the hash of its header: what lies where."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        begin = opened.read(8)
        begin += opened.read(min(int.from_bytes(begin, "little"), size))
    return {"bytes": size, "header": hashlib.sha256(begin).hexdigest()}


def _read_layer(path: Path, part: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A layer's state, with its tensors in memory of their own."""
    try:
        tensors = load_file(path / part["file"])
    except (OSError, SafetensorError) as error:
        raise UsageError(f"can't read {part['file']} in {path}: {reading.why(error)}") from error
    return _put_back(part["state"], {name: t.to(device, copy=True) for name, t in tensors.items()})


def _take_out(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A state as JSON holds it: each tensor goes into `tensors`, and leaves its name."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: _take_out(x, tensors, f"{name}.{key}") for key, x in value.items()}
    if isinstance(value, list):
        return [_take_out(x, tensors, f"{name}.{at}") for at, x in enumerate(value)]
    return value


def _put_back(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_take_out` was given."""
    if isinstance(value, dict):
        if {*value} == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _put_back(x, tensors) for key, x in value.items()}
    return [_put_back(x, tensors) for x in value] if isinstance(value, list) else value


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
