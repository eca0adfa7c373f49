"""What each layer of a patched model does, and by which kernel."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby

from transformers import PreTrainedModel

from hfsparse.evictions import EVICTIONS
from hfsparse.kernels import Kernel, Need, Tables, pick
from hfsparse.lists import FULL
from hfsparse.lists.packed import said
from hfsparse.models.layers import layer_shapes
from hfsparse.patcher import batching
from hfsparse.patcher.exact import MOST
from hfsparse.patcher.generation import CHUNK, LONG, why_in_one_call
from hfsparse.patcher.state import State, state_of
from hfsparse.plan import Plan
from hfsparse.plan.kept import KEPT
from hfsparse.plan.words import series
from hfsparse.runtime import call
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.layer_plan import LayerPlan


def explain(model: PreTrainedModel) -> str:
    """What runs where in a patched model and why, in words."""
    state, tables = state_of(model), call.tables()
    plan = state.plan
    lines = [f"plan {plan.hash()[:19]} for {plan.model.class_name}, {plan.model.layers} layers"]
    layers = state.layers
    if state.exact is not None:
        layers = [layer.draft for layer in layers]
        lines.append(
            f"exact: prompts read every key, steps of this plan draft up to {MOST} tokens, and a "
            "step that reads every key verifies them; the cache keeps all. What follows: of drafts"
        )
    made = plan.made.get("model")
    if _weights_name(model) not in (made, plan.verified.get("model")):
        lines.append(f"not verified on these weights (plan made on {made or 'unnamed weights'})")
    if state.shard.ranks > 1:
        lines.append(f"tensor parallel: {state.shard}, which is what is told here")
    if (context := state.context) is not None:
        lines.append(
            f"context parallel: {context}, which is what is told here; rings are whole on each "
            "rank, steps are merged by their LSE and choose pages of each rank's own tokens"
        )
    need, step = _needs(model)
    step = step._replace(lse=context is not None)
    listed = need._replace(lists=True)
    below = ", ".join(f"{part} {n}" for part, n in asdict(state.layers[0].below).items())
    lines.append(f"rows of fewer tokens are computed, read and kept in full: {below}")
    lines += _extended(plan, tables, need, step)
    skip = plan.skip is not None
    prefill, decode = tables.prefill, tables.decode
    patterned = listed._replace(skip=skip)
    lines.append(f"full heads, prompt: {_describe(prefill, patterned if skip else need)}")
    if any(pattern is not None for layer in state.layers for pattern in layer.prefill):
        lines.append(f"patterned heads, prompt: {_describe(prefill, patterned)}")
    reads = {_kind(group, "ring") for layer in state.layers for group in layer.groups}
    rings = step._replace(bands=True, lse=False)
    if "ring" in reads and pick(decode, rings) is pick(decode, step):
        lines.append(f"full and ring heads, new tokens: {_describe(decode, step)}")
    else:
        lines.append(f"full heads, new tokens: {_describe(decode, step)}")
        if "ring" in reads:
            lines.append(f"ring heads, new tokens: {_describe(decode, rings)}")
    if "selected" in reads:
        lines.append(f"selected pages, new tokens: {_describe(decode, step._replace(lists=True))}")
    if any(layer.packs for layer in state.layers):
        packed = step._replace(packed=True, lists=True)
        lines.append(f"layers with keys in fewer bits, new tokens: {_describe(decode, packed)}")
        lines.append(f"new tokens there: stored by {_describe(tables.append, packed)}")
    if any(layer.hosts for layer in state.layers):
        hosted = step._replace(hosted=True, lists=True)
        lines.append(f"layers with keys in host memory, new tokens: {_describe(decode, hosted)}")
        lines.append(f"pages there: fetched by {_describe(tables.fetch, step)}")
    plain = pick(prefill, patterned._replace(logits=True)).name
    past = "behind a past, " if pick(prefill, listed).fused else ""
    lines.append(f"full heads {past}past a sliding window, softcap, sink logits: {plain}")
    lines += _by_pattern(plan, tables, need, step)
    lines.append(f"new tokens: stored by {_describe(tables.append, step)}")
    lines.append(f"kept pairs, prompt: counted by {_describe(tables.count, need)}")
    lines += _by_layer(layers, tables, need, step)
    why = why_in_one_call(model.config, plan)
    if context is not None:
        why = "context parallel"
    long = f"in chunks of {CHUNK:,}" if why is None else f"in one call ({why})"
    lines.append(f"prompts of more than {LONG:,} tokens in generate: {long}")
    lines.append(f"new tokens, as a CUDA graph: {state.graphs}")
    lines.append(f"the next one's, before generate has the token: {state.ahead}")
    if hasattr(type(model), "init_continuous_batching"):
        lines.append(f"generate_batch: {_batched(state)}")
    if state.exact is not None:
        lines.append(f"drafts, as a CUDA graph: {state.exact.graphs}")
    windowed = [layer.index for layer in state.layers if layer.sliding_window is not None]
    if chunked := [layer.index for layer in state.layers if layer.chunked]:
        lines.append(f"layers {chunked} attend in the model's own chunks, and keep one, as a ring")
    if windowed:
        lines.append(
            f"layers {windowed} keep the model's own sliding window, as a ring; behind a past, "
            "heads that choose by content read all of it"
        )
    if read := {each.index: each.producer.index for each in state.layers if each.producer}:
        readers, producers = (series(found) for found in (read, dict.fromkeys(read.values())))
        lines.append(f"layers {readers} read the keys of layers {producers}, and keep none")
    return "\n".join(lines)


def _batched(state: State) -> str:
    """Whether requests can be batched continuously, and what that saves."""
    if (why := batching.why_not(state)) is not None:
        return f"no ({why})"
    rings = any(group.band != FULL for layer in state.layers for group in layer.groups)
    none = ", so that rings save none of its memory" if rings else ""
    return f"steps read the same of transformers' paged cache, which keeps every key{none}"


def _needs(model: PreTrainedModel) -> tuple[Need, Need]:
    """What prompts ask of kernels, and what steps do: latents are expanded for prompts alone."""
    shapes = layer_shapes(model)
    shape = next((each for each in shapes if each.free), shapes[0])
    held, where = (shape.head_dim, shape.value_dim), (model.device, model.dtype)
    return Need(*where, *shape.read), Need(*where, *held, latents=shape.rank > 0)


def _describe(table: tuple[Kernel, ...], need: Need) -> str:
    """The kernel that serves a need, and why those before it in the table can't."""
    chosen = pick(table, need)
    better: dict[str | None, str] = {}  # by reason: what holds for several is said of the first
    for kernel in table[: table.index(chosen)]:
        better.setdefault(kernel.why_not(need), kernel.name)
    return chosen.name + "".join(f" (not {name}: {why})" for why, name in better.items())


def _by_pattern(plan: Plan, tables: Tables, need: Need, step: Need) -> Iterator[str]:
    """For each pattern that a head of the plan has: who chooses what it reads."""
    prompt, cache, decode = (
        {word for layer in plan.layers for word in getattr(layer, part)}
        for part in ("prefill", "cache", "decode")
    )
    for name, pattern in plan.patterns.items():
        told = f"{name} ({pattern.kind})"
        if name in prompt:
            by = _describe(tables.estimate, need._replace(chooser=pattern))
            yield f"{told}, prompt: blocks chosen by {by}"
        elif name in cache and pattern.kind in EVICTIONS:
            yield f"{told}, cache: keys to keep chosen by PyTorch"
        elif name in cache and pattern.kind in KEPT:
            where = [] if pattern.bits == 16 else [f"in {said(pattern.bits)}"]
            if pattern.host:
                where += [f"in host memory, {pattern.hot:g} of each row on the GPU"]
            yield ", ".join((f"{told}, cache: every key", *where))
        elif name in decode and hasattr(pattern, "pages"):
            by = _describe(tables.select, step._replace(chooser=pattern))
            yield f"{told}, new tokens: pages chosen by {by}"
        elif name in decode:
            yield f"{told}, new tokens: pages chosen by an earlier layer"


def _by_layer(layers: Sequence[LayerPlan], tables: Tables, need: Need, step: Need) -> Iterator[str]:
    """For each run of layers alike: how many heads of which kind, and the kernel that serves them.

    Prompts above every `below` and every kernel's own threshold.
    """
    prefill, decode = tables.prefill, tables.decode

    def describe(layer: LayerPlan) -> str:
        skip, lse = layer.skip is not None, any(getattr(p, "means", False) for p in layer.prefill)
        listed = pick(prefill, need._replace(lists=True, skip=skip, lse=lse)).name
        new = step._replace(packed=layer.packs, hosted=layer.hosts)
        new = new._replace(lse=layer.means or new.lse)
        asked = need._replace(lists=skip or layer.sliding_window is not None, skip=skip)
        whole = pick(prefill, asked).name
        reads = {
            "selected": pick(decode, new._replace(lists=True)).name,
            "recent": pick(decode, new._replace(lists=True)).name,
            "ring": (bands := pick(decode, new._replace(bands=True, lse=layer.means)).name),
            "windowed": bands,
            "kept": pick(decode, new).name,
            "full": pick(decode, new).name,
        }
        full = sum(pattern is None for pattern in layer.prefill)
        dropping = "ring" if layer.window is None else "windowed"
        kinds = Counter((_kind(g, dropping), _kept(g)) for g in layer.groups for _ in g.heads)
        prompt = (full, "full", whole), (len(layer.prefill) - full, "patterned", listed)
        tokens = [(n, kind + kept, reads[kind]) for (kind, kept), n in kinds.items()]
        parts = (
            " + ".join(f"{n} {kind} by {kernel}" for n, kind, kernel in found if n)
            for found in (prompt, tokens)
        )
        return "prompt {}; new tokens {}".format(*parts)

    for words, alike in groupby(layers, describe):
        found = [layer.index for layer in alike]
        first, last = found[0], found[-1]
        span = ", ".join(map(str, found))  # layers without attention lie between
        span = f"{first} to {last}" if found == [*range(first, last + 1)] and found[1:] else span
        yield f"layer{'s' if found[1:] else ''} {span}: {words}"


def _kind(group: Group, ring: str) -> str:
    """How steps read a group's keys, in a word; `ring` where that is a band."""
    if group.eviction is not None:
        return "kept"
    if group.reads != FULL:
        return "recent"
    if group.chosen:
        return "selected"
    return "full" if group.band == FULL else ring


def _kept(group: Group) -> str:
    """How a group's keys are kept, where that is not as they came."""
    bits = "" if group.bits == 16 else f" in {said(group.bits)}"
    return bits + (" in host memory" if group.hot else "")


def _extended(plan: Plan, tables: Tables, need: Need, step: Need) -> Iterator[str]:
    """How rows are read that are too long for the model."""
    if (rule := plan.extend) is None:
        return
    kernels = (
        _describe(table, each._replace(lists=True, lse=True))
        for table, each in ((tables.prefill, need), (tables.decode, step))
    )
    yield (
        f"rows of more than {rule.reach + 1:,} tokens, {rule.trained:,} trained: {rule.kind}, "
        f"{rule.size:,} keys at a time; prompt: {next(kernels)}; new tokens: {next(kernels)}"
    )


def _weights_name(model: PreTrainedModel) -> str:
    return os.path.basename(os.path.normpath(model.config._name_or_path or "")) or ""
