"""Offline calibration: look at how each head attends, and write a plan.

    plan = hfsparse.profile(model, tokenizer, out="plan.yaml", lengths=(2048,))

capture (one dense forward a prompt) → measure (what candidates keep and lose) → allocate (one
choice a head under the budgets). Each prompt's measurements are kept beside `out` until the plan
is written, so that a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

import hfsparse
from hfsparse.cache import SLACK
from hfsparse.fingerprint import linear_layers, weights_mark, windows
from hfsparse.loading import UsageError
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.profiler import measure, minference
from hfsparse.profiler.allocate import Budget, Infeasible, allocate
from hfsparse.profiler.capture import capture
from hfsparse.profiler.prompts import Prompt, samples

METHODS = {"minference": minference}


def profile(
    model: PreTrainedModel,
    tokenizer,
    *,
    out: str | Path | None = None,
    lengths: tuple[int, ...] = (1024, 2048),
    samples: int = 4,
    prefill_density: float = 0.4,
    cache_share: float = 0.8,
    decode_share: float = 0.25,
    seed: int = 0,
    data: str | Path | None = None,
    method: str = "minference",
    progress: bool = False,
) -> Plan:
    """Measure `model` on calibration prompts and return its plan, saved to `out` if given.

    Budgets are shares of dense attention, met at the longest of `lengths` (tokens): query-key
    pairs of a prompt, bytes of cache, keys read by a decode step. `samples` prompts a length, made
    offline or taken from `data` (JSONL with "text" or "prompt"). Raises UsageError for what can't
    be done.
    """
    _check(model, lengths, samples, method)
    check_shares(
        prefill_density=prefill_density, cache_share=cache_share, decode_share=decode_share
    )
    budget = Budget(prefill_density, cache_share, decode_share)
    start, lengths = time.time(), tuple(sorted(set(lengths)))
    candidates = METHODS[method].candidates(lengths[-1])
    prompts = [p for n in lengths for p in prompts_of(tokenizer, n, samples, seed, data)]
    parts = _Parts(out, _settings(model, candidates, prompts))
    found: dict[int, list[dict[str, np.ndarray]]] = {n: [] for n in lengths}
    for index, prompt in _progress(prompts, progress):
        found[prompt.ids.shape[1]].append(
            parts.get(index, lambda p=prompt: _measure(model, p, candidates))
        )
    means = {n: _mean(each) for n, each in found.items()}
    plan = _plan(model, method, candidates, means, budget)
    plan.made = {
        "version": hfsparse.__version__,
        "method": method,
        "recipe": None,
        "model": Path(model.config._name_or_path or "unnamed").name,
        "seed": seed,
        "samples": samples,
        "seconds": round(time.time() - start, 1),
        "peak_gib": round(_peak_bytes(model) / 2**30, 2),
    }
    plan.validate()
    if out is not None:
        plan.save(out)
        parts.remove()
    return plan


prompts_of = samples  # `profile` has an argument of that name


def check_shares(**shares: float) -> None:
    """Raise UsageError for a budget that is no share."""
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise UsageError(f"{name} is {share}: give more than 0 and at most 1")


def _check(model: PreTrainedModel, lengths: tuple[int, ...], samples: int, method: str) -> None:
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "max_position_embeddings", None) or max(lengths, default=0)
    problems = [
        (not lengths, "no lengths given: name at least one, in tokens"),
        (model.training, "the model is in training mode: call model.eval() first"),
        (samples < 1, f"samples is {samples}: give 1 or more"),
        (method not in METHODS, f"no method {method}: there is {', '.join(METHODS)}"),
        (any(n < 256 for n in lengths), f"lengths {lengths}: give 256 tokens or more"),
        (
            any(n > window for n in lengths),
            f"lengths {lengths}: the model's window is {window} tokens",
        ),
    ]
    for wrong, sentence in problems:
        if wrong:
            raise UsageError(sentence)
    if linear_layers(model):
        raise UsageError(
            f"this {type(model).__name__} has layers without attention, which the profiler can't "
            "measure yet: write a plan by hand, with full in those layers, and hfsparse.patch it"
        )
    if not _free(model).any():
        raise UsageError(
            f"every layer of this {type(model).__name__} has a sliding window of its own: there is "
            "nothing to make sparse. hfsparse.patch(model) runs it without a plan"
        )


def _measure(model: PreTrainedModel, prompt: Prompt, candidates: Any) -> dict[str, np.ndarray]:
    """Arrays `[layers, candidates, heads]` of one prompt."""
    short_sighted = _short_sighted(model, candidates)
    look = partial(measure.layer, candidates=candidates)
    layers = capture(model, prompt.ids, short_sighted, look)
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def _short_sighted(model: PreTrainedModel, candidates: Any) -> Plan:
    """Every head a ring, the smallest, in layers that have no window of their own."""
    this = ModelId.of(model)
    name, ring = min(candidates.rings.items(), key=lambda item: item[1].recent)
    kv = this.kv_heads
    short = Layer((name,) * this.q_heads, (name,) * kv, ("ring",) * kv)
    free = _free(model)
    layers = [short if f else full for f, full in zip(free, Plan.full(this).layers, strict=True)]
    return Plan(this, {name: ring}, tuple(layers))


def _free(model: PreTrainedModel) -> np.ndarray:
    """Layers without a window of their own, whose heads may be sparse."""
    return np.array([window is None for window in windows(model)])


def _mean(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.mean([each[name] for each in found], axis=0) for name in found[0]}


def _plan(model, method: str, candidates, means: dict[int, dict], budget: Budget) -> Plan:
    """Allocate on the mean over lengths of errors, with the costs of the longest."""
    longest = max(means)
    costs = ("pattern_pairs", "ring_pairs", "page_share")
    merged = _mean(list(means.values())) | {name: means[longest][name] for name in costs}
    free = _free(model)
    kept_and_read = _ring_shares(candidates, longest)
    options = METHODS[method].options(
        {name: t[free] for name, t in merged.items()}, candidates, *kept_and_read
    )
    try:
        chosen = iter(allocate(options, budget))
    except Infeasible as error:
        raise UsageError(f"{error}. Give larger budgets, or longer --lengths") from None
    this = ModelId.of(model)
    full = Plan.full(this).layers[0]
    choices = tuple(next(chosen) if sparse else full for sparse in free)
    used = {word for c in choices for word in (*c.prefill, *c.cache, *c.decode)}
    known = {**candidates.patterns, **candidates.rings, **candidates.selectors}
    patterns = {name: pattern for name, pattern in known.items() if name in used}
    floor = min(means) // 2  # shorter rows were not looked at
    expected = {n: _expected(choices, candidates, found, n) for n, found in means.items()}
    return Plan(this, patterns, choices, Below(floor, floor, floor), expected)


def _ring_shares(candidates, length: int) -> tuple[list[float], list[float]]:
    """Shares of a row of `length` tokens that each ring keeps, and that a decode step reads."""
    sizes = [ring.sink + ring.recent for ring in candidates.rings.values()]
    return [min(1.0, (n + SLACK) / length) for n in sizes], [min(1.0, n / length) for n in sizes]


def _expected(choices: tuple[Layer, ...], candidates, found: dict, length: int) -> dict[str, float]:
    """Mean densities, shares and recall of a choice at one length, as measured."""
    patterns, rings, pages = (
        {name: i for i, name in enumerate(t)}
        for t in (candidates.patterns, candidates.rings, candidates.selectors)
    )
    kept, read = _ring_shares(candidates, length)
    rows: dict[str, list[float]] = {
        name: []
        for name in ("pair_density", "block_density", "cache_share", "decode_share", "recall")
    }
    for layer, choice in enumerate(choices):
        group = len(choice.prefill) // len(choice.cache)
        for h, word in enumerate(choice.prefill):
            if word in rings:
                table, i, at = "ring", rings[word], h // group
            elif word in patterns:
                table, i, at = "pattern", patterns[word], h
            values = [1.0] * 3
            if word != "full":
                values = [
                    found[f"{table}_{x}"][layer, i, at] for x in ("pairs", "blocks", "recall")
                ]
            for name, value in zip(
                ("pair_density", "block_density", "recall"), values, strict=True
            ):
                rows[name].append(float(value))
        for g, (cache, decode) in enumerate(zip(choice.cache, choice.decode, strict=True)):
            rows["cache_share"].append(1.0 if cache == "full" else kept[rings[cache]])
            share = 1.0 if decode == "full" else read[rings[cache]] if decode == "ring" else None
            if share is None:
                share = float(found["page_share"][layer, pages[decode], g])
            rows["decode_share"].append(share)
    return {name: round(float(np.mean(values)), 4) for name, values in rows.items()}


class _Parts:
    """Measurements of the prompts done so far, in a folder beside the plan, for one setting."""

    def __init__(self, out: str | Path | None, settings: str):
        self.folder = None if out is None else Path(f"{out}.parts")
        if self.folder is None:
            return
        mark = self.folder / "settings.json"
        if mark.is_file() and mark.read_text() == settings:
            return
        self.remove()
        self.folder.mkdir(parents=True)
        mark.write_text(settings)

    def get(self, index: int, compute) -> dict[str, np.ndarray]:
        if self.folder is None:
            return compute()
        file = self.folder / f"{index}.npz"
        if not self._whole(file):
            draft = file.with_suffix(".draft.npz")
            np.savez(draft, **compute())
            draft.replace(file)
        with np.load(file) as saved:
            return dict(saved)

    def _whole(self, file: Path) -> bool:
        """Whether an earlier run wrote this file and it can be read."""
        try:
            with file.open("rb") as opened, np.load(opened) as saved:
                return bool(dict(saved))
        except (OSError, ValueError, EOFError, BadZipFile):
            return False

    def remove(self) -> None:
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)


def _settings(model: PreTrainedModel, candidates, prompts: list[Prompt]) -> str:
    """What measurements depend on: config, weights, candidates, prompts, versions."""
    seen = hashlib.sha256()
    for prompt in prompts:
        seen.update(prompt.ids.cpu().numpy().tobytes())
    settings = {
        "versions": [hfsparse.__version__, torch.__version__, transformers.__version__],
        "model": [ModelId.of(model).fingerprint, weights_mark(model), str(model.dtype)],
        "seen": seen.hexdigest(),
    }
    return json.dumps(settings | {"candidates": repr(candidates)}, sort_keys=True)


def _progress(prompts: list[Prompt], show: bool) -> Iterator[tuple[int, Prompt]]:
    if not show:
        yield from enumerate(prompts)
        return
    from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("profile", total=len(prompts))
        for index, prompt in enumerate(prompts):
            bar.update(task, description=f"{prompt.name}, {prompt.ids.shape[1]} tokens")
            yield index, prompt
            bar.advance(task)


def _peak_bytes(model: PreTrainedModel) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
