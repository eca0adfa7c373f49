"""Make a model follow a plan, and give it back exactly as it was.

    with hfsparse.patch(model, "plan.yaml") as handle:
        model.generate(**inputs)
        print(handle.stats())

Nothing in transformers is replaced: one attention and one mask function are registered under a
name of ours, the model is switched to it, and a hook on the text decoder puts our layers into the
cache. All state lies on the model, so `unpatch(model)` needs no handle.
"""

from __future__ import annotations

import copy
import functools
import os
import uuid
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    cache_utils,
)
from transformers.cache_utils import Cache

from hfsparse import kernels, probe
from hfsparse.attention import NAME, Counts, LayerPlan, PatchError, attention, mask_start
from hfsparse.cache import SLACK, CacheError, Group, Held, Layer
from hfsparse.call import enter, leave
from hfsparse.fingerprint import (
    LINEAR,
    ShapeError,
    attention_values,
    by_layer,
    text_config,
    windows,
)
from hfsparse.graphs import Graphs, new_tokens, parameters
from hfsparse.lists import FULL, Band, HeadIndex
from hfsparse.loading import device_name
from hfsparse.plan import Below, ModelId, Plan
from hfsparse.selectors.reuse import Reuse
from hfsparse.stats import LayerStats, Stats, Work

CACHES = ("cache", "past_key_values")  # what forward calls it: from 5.24 on, before
# `generate` reads prompts of more than LONG tokens in chunks, unless it is told of which size, and
# where chunks give what one call gives.
LONG, CHUNK = 1 << 17, 1 << 15
ROPES = ("default", "linear", "llama3", "yarn")  # turn by the position alone, not a call's length
# Before it had this, `generate` numbered the tokens of chunks by columns, padding or not.
NUMBERED = hasattr(GenerationMixin, "_prepare_position_ids_for_generation")
MISTAKEN = (
    "this is the handle of a patch, not the model (handle.model), which is changed in place: write "
    "handle = hfsparse.patch(model, plan), not model = hfsparse.patch(model, plan)"
)
VIRTUAL = (
    "Prefix tuning (peft) brings virtual tokens in a cache of its own, which hfsparse can't "
    "follow: run it on the unpatched model (handle.undo())"
)
SERVING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


# Not in `patch`: a pickled model that was patched may be loaded where none has been.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_start)


@dataclass
class OwnConfig:
    """The copy of a config that a model has while it is patched: others may share the original."""

    original: Any
    copy: Any
    modules: list[Any]  # that had the original
    before: dict[str, Any]  # the copy's attributes when it was made

    def give_back(self) -> None:
        """Put the original back, with what was changed in the copy meanwhile."""
        name = "_attn_implementation_internal"
        setattr(self.copy, name, getattr(self.original, name))
        for name, value in vars(self.copy).items():
            if name not in self.before or value is not self.before[name]:
                vars(self.original)[name] = value
        for module in self.modules:
            if module.config is self.copy:
                module.config = self.original


@dataclass
class State:
    """What a patch leaves on the text decoder (as `_hfsparse`)."""

    owner: str
    model: PreTrainedModel  # that was patched: it holds the decoder, or is it
    plan: Plan
    layers: list[LayerPlan]  # of the layers that have attention
    configs: list[OwnConfig]
    graphs: Graphs
    hooks: list[Any] = field(default_factory=list)
    # Of the last call that had a cache: what each layer's takes, and columns seen.
    held: list[Held] = field(default_factory=list)
    seen: int = 0


class Patched:
    """A patched model's handle and context manager; leaving the context undoes the patch."""

    def __init__(self, model: PreTrainedModel, state: State):
        self.model = model
        self._patch = state

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *error) -> None:
        self.undo()

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{MISTAKEN}, and call the model")

    def __getattr__(self, name: str):
        model = self.__dict__.get("model")
        if name.startswith("__") or not hasattr(model, name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        raise AttributeError(f"{MISTAKEN}, and use model.{name}")

    def undo(self) -> None:
        """Give the model back as it was; a second call does nothing, nor touches a later patch."""
        if self.model.get_decoder().__dict__.get("_hfsparse") is self._patch:
            unpatch(self.model)

    def stats(self) -> Stats:
        """Densities since the last reset, and KV bytes held after the last call with a cache."""
        state = self._own()
        layers = [LayerStats() for _ in state.plan.layers]
        for at, layer in enumerate(state.layers):
            held = state.held[at] if state.held else Held([], 0, None)
            pairs, blocks = layer.counts.work()
            layers[layer.index] = LayerStats(
                pairs,
                blocks,
                layer.reads(),
                held.work(layer.kv_heads, state.seen),
                held.bytes(layer.kv_heads),
                layer.counts.cut.tolist(),
                Work(*layer.counts.skipped.T.tolist()),
                layer.window,
            )
        return Stats(layers)

    def reset_stats(self) -> None:
        """Forget the densities counted so far."""
        for layer in self._own().layers:
            layer.counts.reset()
            layer.steps.clear()

    def explain(self) -> str:
        """What runs where and why, in words."""
        self._own()
        return explain(self.model)

    def _own(self) -> State:
        if self.model.get_decoder().__dict__.get("_hfsparse") is not self._patch:
            raise PatchError(
                f"this handle's patch is no longer on the {type(self.model).__name__}: ask before "
                "undo(), or ask the handle of the patch that is on it now"
            )
        return self._patch


def patch(
    model: PreTrainedModel,
    plan: Plan | str | os.PathLike | None = None,
    allow: Collection[str] = (),
    fuse: bool = False,
) -> Patched:
    """Make `model` follow `plan` (a Plan or its file) until `undo()`; None drops nothing.

    On a GPU, decode steps are replayed as CUDA graphs. With fuse=True torch.compile fuses their
    small kernels: faster, after half a minute of compiling at the first steps of a batch size.
    allow={"fingerprint"} takes a plan made for another configuration of the same shape. Raises
    PlanError or PatchError before anything changes. Warns of a plan whose proof told nothing.
    """
    _check_model(model)
    if is_patched(model):
        raise PatchError(
            f"this {type(model).__name__} is patched already: call handle.undo() or "
            "hfsparse.unpatch(model) first"
        )
    modules = _attention_modules(model)
    if plan is None:
        plan = Plan.full(ModelId.of(model))
    else:  # the caller may go on with theirs
        plan = copy.deepcopy(plan) if isinstance(plan, Plan) else Plan.load(plan)
    plan.validate()
    plan.check(model, allow)
    if plan.unproved:
        warnings.warn(
            f"plan {plan.hash()[:19]} was verified by nothing ({plan.unproved}): it may lose "
            "answers. Compare it with dense on your own questions, by hfsparse eval custom",
            stacklevel=2,
        )
    below = _below(plan, model.device)
    layers = _layer_plans(plan, [m.layer_idx for m in modules], windows(model), below)
    decoder = model.get_decoder()

    graphs = Graphs(layers, linear=len(layers) < plan.model.layers, fuse=fuse)
    state = State(layers[0].owner, model, plan, layers, _own_configs(model), graphs)
    try:
        for own in state.configs:
            for module in own.modules:
                module.config = own.copy
        decoder.config._attn_implementation_internal = NAME
        decoder._hfsparse = state
        for module, layer in zip(modules, layers, strict=True):
            module._hfsparse = layer
        state.hooks.append(decoder.register_forward_pre_hook(_before_forward, with_kwargs=True))
        state.hooks.append(
            decoder.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)
        )
        adopt = _partial(_before_attention, decoder, like=_before_attention)
        state.hooks.append(modules[0].register_forward_pre_hook(adopt, with_kwargs=True))
        if "forward" in decoder.__dict__:
            graphs.never = "its decoder's forward is not its class's (accelerate's hooks?)"
        else:
            decoder.forward = _partial(_forward, decoder, like=decoder.forward)
        for name, function in SHADOWS.items():
            if hasattr(type(model), name):
                setattr(model, name, _partial(function, model, like=getattr(model, name)))
        wrong = [m.layer_idx for m in modules if m.config._attn_implementation != NAME]
        if wrong:
            raise PatchError(f"layers {wrong} of {type(model).__name__} kept their own attention")
    except BaseException:
        _restore(model, state)
        raise
    return Patched(model, state)


def unpatch(model: PreTrainedModel) -> None:
    """Give a patched model back as it was: names, hooks and functions."""
    state = _state(model)
    if state.model is not model:
        raise PatchError(
            f"this {type(model).__name__} is part of a patched model: give hfsparse.unpatch the "
            "model that was patched, or call handle.undo()"
        )
    _restore(model, state)


def _partial(function: Callable, owner: Any, like: Callable) -> functools.partial:
    """A method for one object, with another's signature: unlike a bound one, it can be pickled."""
    made = functools.partial(function, owner)
    return functools.update_wrapper(made, like, assigned=("__module__",), updated=())


def _restore(model: PreTrainedModel, state: State) -> None:
    while leave(state.owner):
        pass  # interrupted forwards may have left this thread inside
    state.graphs.kept.clear()
    for hook in state.hooks:
        hook.remove()
    for own in state.configs:
        own.give_back()
    decoder = model.get_decoder()
    if getattr(decoder.forward, "func", None) is _forward:
        del decoder.forward
    for module in model.modules():
        module.__dict__.pop("_hfsparse", None)
    for name in (*SHADOWS, "_compiled_call", "_cache"):
        model.__dict__.pop(name, None)


def _check_model(model: Any) -> None:
    """PatchError for what is no model of transformers, or only holds one."""
    if isinstance(model, Patched):
        raise PatchError(MISTAKEN)
    if isinstance(model, PreTrainedModel):
        return
    if callable(getattr(model, "get_base_model", None)):  # a PeftModel
        inside = "get_base_model()"
    else:
        modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
        held = [*modules, ("model", getattr(model, "model", None))]
        inside = next((name for name, each in held if isinstance(each, PreTrainedModel)), None)
    kind = type(model).__name__
    where = "" if inside is None else f": patch its {inside}, and go on with the {kind}"
    raise PatchError(f"got {kind}: give a transformers model (PreTrainedModel){where}")


def _own_configs(model: PreTrainedModel) -> list[OwnConfig]:
    """A copy of each config that the model and its submodels have, still parts of one another."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    copies = {key: copy.copy(config) for key, config in configs.items()}
    for own in copies.values():
        for name, part in vars(own).items():
            vars(own)[name] = copies.get(id(part), part)
    made = []
    for key, config in configs.items():
        modules = [m for m in model.modules() if getattr(m, "config", None) is config]
        made.append(OwnConfig(config, copies[key], modules, dict(vars(copies[key]))))
    return made


def is_patched(model: Any) -> bool:
    return any("_hfsparse" in module.__dict__ for module in model.modules())


def explain(model: PreTrainedModel) -> str:
    """What runs where in a patched model and why, in words."""
    state = _state(model)
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
        asked = replace(need, lists=lists or skips, skip=skips)
        chosen = kernels.pick(table, asked)
        better = table[: table.index(chosen)]
        why = [f"not {kernel.name}: {kernel.why_not(asked)}" for kernel in better]
        lines.append(f"{what}: {chosen.name}" + "".join(f" ({reason})" for reason in why))
    plain = kernels.pick(kernels.PREFILL, replace(need, lists=True, logits=True, skip=skip)).name
    past = "behind a past, " if kernels.fused(need) else ""
    lines.append(f"full heads {past}past a sliding window, softcap, sink logits: {plain}")
    lines += _by_layer(state, need)
    why = _in_one_call(model.config)
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
        listed = kernels.pick(kernels.PREFILL, replace(need, lists=True, skip=skip)).name
        asked = replace(need, lists=skip or layer.window is not None, skip=skip)
        whole = kernels.pick(kernels.PREFILL, asked).name
        paged = kernels.pick(kernels.DECODE, replace(need, lists=True)).name
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


def _state(model: PreTrainedModel) -> State:
    _check_model(model)
    state = model.get_decoder().__dict__.get("_hfsparse") if is_patched(model) else None
    if state is None:
        raise PatchError(
            f"this {type(model).__name__} is not patched: call hfsparse.patch(model) first"
        )
    return state


def _attention_modules(model: PreTrainedModel) -> list[Any]:
    """The text decoder's self-attention modules in layer order; PatchError if unsupported."""
    modules = probe.attention_modules(model.get_decoder())
    why = next(_obstacles(model, modules), None)
    if why is not None:
        raise PatchError(
            f"{type(model).__name__} can't be patched: {why}. Supported: decoders of transformers "
            "with full or sliding-window attention (Llama, Qwen, Mistral, Gemma 3, …)"
        )
    return modules


def _obstacles(model: PreTrainedModel, modules: list[Any]) -> Iterator[str]:
    """Why this model's attention can't follow a plan."""
    if getattr(model.config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder"
    try:
        config = text_config(model)
        if any(by_layer(config, "kv_lora_rank")):
            yield "its cache holds latents (MLA), not keys per head"
        if any(by_layer(config, "num_kv_shared_layers")):
            yield "layers share keys and values"
        if any(getattr(m, "indexer", None) is not None for m in modules):
            yield "an indexer of its own chooses the keys that it reads"
        if config.model_type == "diffllama":
            yield "it calls attention twice a layer"
        values = attention_values(config)
    except ShapeError as error:
        yield f"its config gives no one shape for all layers ({error})"
        return
    kinds = values["kinds"]
    if other := sorted(set(kinds) - {"full_attention", "sliding_attention", *LINEAR}):
        yield f"it has layers of kind {', '.join(other)}"
    wanted = [i for i, kind in enumerate(kinds) if kind not in LINEAR]
    if len(wanted) < len(kinds) and not hasattr(cache_utils, "LinearAttentionLayer"):
        yield "this transformers keeps the state of linear layers in a cache of the model's own"
    has_default = GenerationMixin._supports_default_dynamic_cache.__func__  # of any class
    if len(wanted) < len(kinds) and not has_default(type(model)):
        yield "it keeps the state of its linear layers in a cache of its own"
    if not modules:
        yield "it has no attention layers that hfsparse knows"
    found = [m.layer_idx for m in modules]
    if None in found:
        yield "some of its attention belongs to no layer of the decoder"
    causal = {m.layer_idx for m in modules if m.is_causal}
    if not causal.issuperset(found):
        yield "its tokens attend to later ones too"
    if not all(m.is_causal for m in modules):
        yield "its layers have attention to an encoder, too (cross-attention)"
    if found != wanted:
        yield f"its attention layers are {found}, its config says {wanted}"
    if not model._can_set_attn_implementation():
        yield "its attention can't be exchanged"
    full = Plan.full(ModelId.of(model))
    why = probe.why_not(model.get_decoder(), _layer_plans(full, wanted, windows(model), full.below))
    if why is not None:
        yield why
    for m in modules:  # code that the probe can't run
        ratio = getattr(m, "num_key_value_groups", None)
        if ratio is not None and ratio * values["kv_heads"] != values["q_heads"]:
            yield (
                f"layer {m.layer_idx} has q and kv heads as {ratio} to 1, where its config says "
                f"{values['q_heads']} to {values['kv_heads']}"
            )


def _below(plan: Plan, device: torch.device) -> Below:
    """The plan's thresholds; for prompts what `hfsparse bench --write` measured on this device."""
    found: Any = plan.measured
    for key in (device_name(device), "below", "prefill"):
        found = found.get(key) if isinstance(found, dict) else None
    return replace(plan.below, prefill=found) if isinstance(found, int) else plan.below


def _layer_plans(
    plan: Plan, indices: list[int], windows: list[int | None], below: Below
) -> list[LayerPlan]:
    plans, owner, source = [], uuid.uuid4().hex, None
    steps, at = Counter(), HeadIndex()
    for index in indices:
        words, window = plan.layers[index], windows[index]
        rings = frozenset(g for g, word in enumerate(words.cache) if word != "full")
        groups: dict[Group, list[int]] = {}
        for head, (cache, decode) in enumerate(zip(words.cache, words.decode, strict=True)):
            band = plan.patterns[cache].band if head in rings else FULL
            band = Band(0, window) if window is not None else band
            selector = None if decode in ("full", "ring") else plan.patterns[decode]
            groups.setdefault(Group((), band, selector), []).append(head)
        plans.append(
            LayerPlan(
                owner,
                index,
                plan.model.kv_heads,
                tuple(plan.patterns.get(word) for word in words.prefill),
                tuple(_group(g, tuple(heads), source) for g, heads in groups.items()),
                rings,
                below,
                plan.skip,
                window,
                Counts(plan.model.q_heads),
                not plans,
                steps,
                source=source if any(isinstance(g.selector, Reuse) for g in groups) else None,
                at=at,
            )
        )
        if any(g.selector is not None for g in plans[-1].groups):
            source = plans[-1]
    for layer in plans:
        if layer.source is not None:
            layer.source.shared = True
    return plans


def _group(kind: Group, heads: tuple[int, ...], source: LayerPlan | None) -> Group:
    """kv heads of a kind; those that reuse a choice find it at their places in the chooser's."""
    if not isinstance(kind.selector, Reuse):
        return replace(kind, heads=heads)
    chooses = next(g.heads for g in source.groups if g.selector is not None)
    return Group(heads, kind.band, reuses=tuple(chooses.index(head) for head in heads))


def _cache_in(kwargs: dict) -> Any:
    """The cache that a call is given, if any."""
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def _forward(decoder, *args, **kwargs):
    """The forward of a patched text decoder: its class's own, or the replay of a recorded step."""
    state = decoder.__dict__.get("_hfsparse")
    own = functools.partial(type(decoder).forward, decoder)
    if args or state is None or torch.compiler.is_dynamo_compiling():
        return own(*args, **kwargs)
    cache = _cache_in(kwargs)
    try:
        return state.graphs.run(own, decoder, kwargs, cache)
    except torch.cuda.OutOfMemoryError as error:
        raise torch.cuda.OutOfMemoryError(_too_much(decoder, kwargs, cache)) from error
    except Exception:
        raise
    except BaseException:  # the hook behind a forward is told of an Exception alone
        leave(state.owner)
        raise


def _too_much(decoder, kwargs: dict, cache: Any) -> str:
    """What a call that is out of memory needs under the plan, what dense does, and what fits."""
    from hfsparse import memory

    state, weight = decoder._hfsparse, next(decoder.parameters())
    new = new_tokens(kwargs)
    past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    room = torch.cuda.get_device_properties(weight.device).total_memory if weight.is_cuda else 0
    return memory.too_much(
        *(decoder, state.plan, past + new.shape[1], len(new), new.shape[1] if past else 0, room)
    )


@torch.compiler.disable
def _before_forward(decoder, args, kwargs):
    """Pre-hook on the text decoder: make its cache ours, and tell that cache who is running."""
    state: State = decoder._hfsparse
    enter(state.owner)
    if getattr(decoder, "_is_replica", False):
        raise PatchError(
            "DataParallel runs copies of the model that share one patch: use one process a GPU "
            "(DistributedDataParallel), device_map='auto', or handle.undo() first"
        )
    if decoder.config._attn_implementation != NAME:
        raise PatchError(
            f"the attention implementation was set to {decoder.config._attn_implementation} under "
            "an hfsparse patch: call handle.undo() first, then set it"
        )
    names = parameters(type(decoder))
    args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("output_attentions", decoder.config.output_attentions):
        warnings.warn(
            "output_attentions: hfsparse computes no attention weights, they will be None. Call "
            "handle.undo() to see the dense model's",
            stacklevel=2,
        )
    cache = _cache_in(kwargs)
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(decoder.config, "use_cache", None) if use_cache is None else use_cache
    if cache is None and use_cache and not decoder.training:  # in training it is the model's affair
        cache = DynamicCache()
        kwargs[next(name for name in CACHES if name in names)] = cache
    _check_width(kwargs, cache)
    if cache is not None:
        _adopt(cache, decoder)
    return args, kwargs


def _before_attention(decoder, module, args, kwargs) -> None:
    """Pre-hook on the first attention module: make ours a cache that the decoder has made itself.

    While it is trained, whether it makes one is left to it: without one, as where activations are
    checkpointed, it looks for packed sequences.
    """
    if not module._hfsparse.fusing:
        _adopt_made(decoder, (*args, *kwargs.values()))


@torch.compiler.disable
def _adopt_made(decoder, given: tuple) -> None:
    cache = next((x for x in given if isinstance(x, Cache)), None)
    if cache is None or any(isinstance(layer, Layer) for layer in cache.layers):
        return
    if len(cache.layers) > len(decoder._hfsparse.plan.layers):
        raise PatchError(
            f"{type(decoder).__name__} loops over layers, and its cache can't be followed while it "
            "is trained: pass use_cache=False, or call model.eval()"
        )
    _adopt(cache, decoder)


@torch.compiler.disable
def _after_forward(decoder, args, kwargs, output) -> None:
    """Hook behind the text decoder, also when it raised: note what the cache holds."""
    state: State = decoder._hfsparse
    leave(state.owner)
    if output is None:
        return  # an error
    returned = output.values() if isinstance(output, dict) else output
    cache = next((x for x in (_cache_in(kwargs), *returned) if isinstance(x, Cache)), None)
    if cache is None:
        return
    layers = [layer for layer in cache.layers if isinstance(layer, Layer)]
    if len(layers) < len(state.layers) or not all(layer.is_initialized for layer in layers):
        return  # a draft by the first layers; gradient checkpointing goes without
    state.seen = layers[0].seen
    if state.graphs.why is None and state.graphs.held() is layers[0]:
        return  # a replay: it wrote into what was there
    state.graphs.held = weakref.ref(layers[0])
    held: dict[int, list[Held]] = {layer.index: [] for layer in state.layers}
    for layer in layers:
        held[layer.index].append(layer.held())
    state.held = [Held.together(parts) for parts in held.values()]


def _check_width(given: dict, cache: Any) -> None:
    """PatchError unless a mask `[B, columns]` covers exactly the past and the new tokens."""
    mask = given.get("attention_mask")
    new = new_tokens(given)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or new is None:
        return
    past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    if mask.shape[1] != past + new.shape[1]:
        virtual = f". {VIRTUAL}" if mask.shape[1] > past + new.shape[1] else ""
        raise PatchError(
            f"attention_mask covers {mask.shape[1]} columns, past and input together have "
            f"{past + new.shape[1]}: pass the mask of the whole conversation, no more and no less"
            f"{virtual}"
        )


def _adopt(cache: Any, decoder: Any, reserve: int = 0, expected: int = 0) -> None:
    """Put our layers into an empty cache; refuse one that isn't ours and isn't empty."""
    state: State = decoder._hfsparse
    kind = type(cache).__name__
    if not isinstance(cache, Cache):
        raise CacheError(f"got a {kind} as cache: give a transformers Cache, or none")
    ours = [layer for layer in cache.layers if isinstance(layer, Layer)]
    if ours:
        if len({n for layer in (ours[0], ours[-1]) for n in (layer.seen, layer.stored)}) > 1:
            raise CacheError(
                "this cache is broken: a forward pass was interrupted half-way through its layers. "
                "Start again from the prompt with a new cache"
            )
        for layer in ours if expected else ():
            layer.expected = expected
        if reserve:  # a new call of `generate`
            state.graphs.forget(ours[0])
        return
    layer_kinds = {type(layer).__name__ for layer in cache.layers}
    special = [name for name in (kind, *layer_kinds) if "Quant" in name or "EncoderDecoder" in name]
    if special or getattr(cache, "offloading", False):
        what = f"a {special[0]}" if special else "an offloaded cache"
        raise CacheError(f"{what} is not supported under hfsparse: use the default cache")
    if cache.get_seq_length():
        raise CacheError(
            f"this cache holds {int(cache.get_seq_length())} tokens of the unpatched model, which "
            f"hfsparse can't go on from: start again from the prompt with a new cache. {VIRTUAL}"
        )
    layers: list[Any] = [None] * len(state.plan.layers)
    if len(state.layers) < len(layers):  # linear layers keep transformers' own
        layers = cache.layers or DynamicCache(config=decoder.config).layers
    for layer in state.layers:
        layers[layer.index] = layer.new_cache(reserve, expected)
    cache.layers = layers[: decoder.config.num_hidden_layers]  # a draft may run the first alone
    cache.layer_class_to_replicate = None


def _prepare_cache(self, generation_config, model_kwargs, *args, **kwargs):
    """`_prepare_cache_for_generation`, then our layers, with room for the whole generation."""
    self.__dict__.pop("_cache", None)  # up to 5.0 a static cache goes on with the last one's layers
    original = type(self)._prepare_cache_for_generation
    result = original(self, generation_config, model_kwargs, *args, **kwargs)
    cache = _cache_in(model_kwargs)
    if cache is not None:
        mask = model_kwargs.get("attention_mask")
        # 5.24 drops a mask of ones, and notes how wide it was
        width = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[1]
        if generation_config.prefill_chunk_size is None and width > LONG:
            fresh = model_kwargs.get("inputs_embeds") is None and not cache.get_seq_length()
            whole = generation_config.output_hidden_states  # of chunks only the last one's come
            alike = _in_one_call(self.config) is None and _in_order(model_kwargs)
            if fresh and alike and not whole:
                generation_config.prefill_chunk_size = CHUNK
        chunked = generation_config.prefill_chunk_size
        if chunked and not width:
            raise PatchError(
                "prefill_chunk_size: generate does not tell how long the whole prompt is. Pass its "
                "attention_mask, or leave prefill_chunk_size away"
            )
        expected = width if chunked else 0
        reserve = kwargs.get("max_cache_length", args[-1] if args else 0)
        _adopt(cache, self.get_decoder(), reserve, expected)
        if generation_config.is_assistant:
            _keep(cache, SLACK + (generation_config.max_new_tokens or 0))
    return result


def _in_one_call(config) -> str | None:
    """Why prompts in chunks may be read otherwise than in one call; None: they are read alike."""
    if hasattr(config, "vision_config"):
        return "it may hold images"
    values = attention_values(config.get_text_config(decoder=True))
    if not set(LINEAR).isdisjoint(values["kinds"]):  # as Jamba's do in any version
        return "its linear layers may begin anew with each chunk"
    ropes = values["rope"].values()
    if other := sorted({rope["rope_type"] for rope in ropes} - {*ROPES}):
        return f"rope {', '.join(other)} may depend on a call's length"
    return None


def _in_order(model_kwargs: dict) -> bool:
    """Whether each row's tokens keep their positions in chunks."""
    mask = model_kwargs.get("attention_mask")
    plain = model_kwargs.get("position_ids") is None and (mask is None or bool(mask.all()))
    return NUMBERED or plain


def _candidate_generator(self, *args, **kwargs):
    """`_get_candidate_generator`, whose drafts can be taken back however long they are."""
    generator = type(self)._get_candidate_generator(self, *args, **kwargs)
    draft = generator.get_candidates

    def get_candidates(input_ids, *args, **more):
        found = draft(input_ids, *args, **more)
        _keep(_cache_in(kwargs["model_kwargs"]), found[0].shape[1] - input_ids.shape[1])
        return found

    generator.get_candidates = get_candidates
    return generator


def _keep(cache: Any, tokens: int) -> None:
    """Have a cache keep so many tokens beyond its windows."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, Layer):
            layer.keep(tokens)


def _no_serving(self, *args, **kwargs):
    raise PatchError(
        "continuous batching keeps its own paged cache, which hfsparse can't shape: use "
        "model.generate, or handle.undo() first"
    )


# Methods of a patched model that are ours.
SHADOWS = {
    "_prepare_cache_for_generation": _prepare_cache,
    "_get_candidate_generator": _candidate_generator,
    **dict.fromkeys(SERVING, _no_serving),
}
