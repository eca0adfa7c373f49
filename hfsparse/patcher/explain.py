"""What each layer of a patched model does, and by which kernel."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from transformers import PreTrainedModel

from hfsparse import kernels
from hfsparse.lists import FULL
from hfsparse.patcher.generation import CHUNK, LONG, why_in_one_call
from hfsparse.patcher.state import State, state_of
from hfsparse.runtime.layer_plan import LayerPlan


def explain(model: PreTrainedModel) -> str:
    """What runs where in a patched model and why, in words."""
    state = state_of(model)
    plan = state.plan
    kinds = {
        "full heads, prompt": (kernels.PREFILL, False),
        "patterned heads, prompt": (kernels.PREFILL, True),
        "full and ring heads, new tokens": (kernels.DECODE, False),
        "selected pages, new tokens": (kernels.DECODE, True),
    }
    lines = [f"plan {plan.hash()[:19]} for {plan.model.class_name}, {plan.model.layers} layers"]
    made = plan.made.get("model")
    if made != _weights_name(model):
        lines.append(f"not verified on these weights (plan made on {made or 'unnamed weights'})")
    head_dim = plan.model.head_dim
    need = kernels.Need(model.device, model.dtype, head_dim, head_dim)
    lines.append(
        f"below {state.layers[0].below} tokens in the row a head is computed or kept in full"
    )
    skip = plan.skip is not None
    for what, (table, lists) in kinds.items():
        skips = skip and table is kernels.PREFILL
        asked = need._replace(lists=lists or skips, skip=skips)
        chosen = kernels.pick(table, asked)
        better = table[: table.index(chosen)]
        why = [f"not {kernel.name}: {kernel.why_not(asked)}" for kernel in better]
        lines.append(f"{what}: {chosen.name}" + "".join(f" ({reason})" for reason in why))
    plain = kernels.pick(kernels.PREFILL, need._replace(lists=True, logits=True, skip=skip)).name
    fused = kernels.pick(kernels.PREFILL, need._replace(lists=True)).fused
    past = "behind a past, " if fused else ""
    lines.append(f"full heads {past}past a sliding window, softcap, sink logits: {plain}")
    lines += _by_layer(state, need)
    why = why_in_one_call(model.config)
    long = f"in chunks of {CHUNK:,}" if why is None else f"in one call ({why})"
    lines.append(f"prompts of more than {LONG:,} tokens in generate: {long}")
    lines.append(f"new tokens, as a CUDA graph: {state.graphs}")
    windowed = [layer.index for layer in state.layers if layer.window is not None]
    if windowed:
        lines.append(
            f"layers {windowed} keep the model's own sliding window, as a ring; behind a past, "
            "heads that choose by content read all of it"
        )
    return "\n".join(lines)


def _by_layer(state: State, need: kernels.Need) -> Iterator[str]:
    """For each run of layers alike: how many heads of which kind, and the kernel that serves them.

    Prompts above every `below` and every kernel's own threshold.
    """

    def told(layer: LayerPlan) -> str:
        skip = layer.skip is not None
        listed = kernels.pick(kernels.PREFILL, need._replace(lists=True, skip=skip)).name
        asked = need._replace(lists=skip or layer.window is not None, skip=skip)
        whole = kernels.pick(kernels.PREFILL, asked).name
        paged = kernels.pick(kernels.DECODE, need._replace(lists=True)).name
        plain = kernels.pick(kernels.DECODE, need).name
        full = sum(pattern is None for pattern in layer.prefill)
        kinds = Counter(
            "selected" if g.selector or g.reuses else "full" if g.band == FULL else "ring"
            for g in layer.groups
            for _ in g.heads
        )
        prompt = (full, "full", whole), (len(layer.prefill) - full, "patterned", listed)
        tokens = [(n, kind, paged if kind == "selected" else plain) for kind, n in kinds.items()]
        parts = (
            " + ".join(f"{n} {kind} by {kernel}" for n, kind, kernel in found if n)
            for found in (prompt, tokens)
        )
        return "prompt {}; new tokens {}".format(*parts)

    for words, alike in groupby(state.layers, told):
        first, *rest = [layer.index for layer in alike]
        span = f"layers {first} to {rest[-1]}" if rest else f"layer {first}"
        yield f"{span}: {words}"


def _weights_name(model: PreTrainedModel) -> str:
    return os.path.basename(os.path.normpath(model.config._name_or_path or "")) or ""
