"""Which models can be patched, and why others can't."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel, cache_utils

from hfsparse import families
from hfsparse.errors import HandleError, PatchError, ShapeError
from hfsparse.models.fingerprint import attention_values
from hfsparse.models.layers import KINDS, LayerShape, by_layer, layer_shapes, text_config
from hfsparse.models.names import text_decoder
from hfsparse.patcher import probe
from hfsparse.patcher.resolve import resolve_layers
from hfsparse.plan import ModelId, Plan
from hfsparse.runtime.cache import host
from hfsparse.runtime.latent import why_not as why_not_latents
from hfsparse.runtime.layer_plan import LayerPlan

ROPES = ("default", "linear", "llama3", "yarn")  # these turn by the position, not a call's length
MISTAKEN = (
    "this is the handle of a patch, not the model (handle.model), which is changed in place: write "
    "handle = hfsparse.patch(model, plan), not model = hfsparse.patch(model, plan)"
)


class Handle:
    """What `patch` returns: it holds the model and is none, and says so where it's used as one."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, *args, **kwargs):
        raise HandleError(f"{MISTAKEN}, and call the model")

    def __getattr__(self, name: str):
        model = self.__dict__.get("model")
        if name.startswith("__") or not hasattr(model, name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        raise HandleError(f"{MISTAKEN}, and use model.{name}")


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The text decoder's self-attention modules in layer order; PatchError if unsupported."""
    modules = probe.attention_modules(text_decoder(model))
    why = next(_obstacles(model, modules), None)
    if why is not None:
        raise PatchError(
            f"{type(model).__name__} can't be patched: {why}. Supported: {supported()}: "
            f"{families.counted()} ({families.PAGE})"
        )
    return [*modules]


def supported() -> str:
    """Which models can be patched, in words."""
    kinds = ", ".join(dict.fromkeys(KINDS.values()))
    return f"decoders of transformers with {kinds}, over keys, shared keys or latents (MLA)"


def _obstacles(model: PreTrainedModel, modules: dict[torch.nn.Module, int]) -> Iterator[str]:
    """Why this model's attention can't follow a plan; modules: with the layer of each."""
    if getattr(model.config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder"
    if not modules:
        yield "it has no attention layers that hfsparse knows"
    try:
        config = text_config(model)
        yield from _config_obstacles(config, modules)
        attention_values(config)
        shapes = layer_shapes(config)
    except ShapeError as error:
        yield f"its config gives no one shape for all layers ({error})"
        return
    if any(shape.producer is not None and shape.rank for shape in shapes):
        yield "its layers share latents (MLA)"
    yield from _layer_obstacles(model, shapes)
    yield from _module_obstacles(modules, [i for i, shape in enumerate(shapes) if shape.attends])
    if not model._can_set_attn_implementation():
        yield "its attention can't be exchanged"
    full = Plan.full(ModelId.of(model))
    layers = resolve_layers(full, shapes, full.below)
    if why := probe.why_not(text_decoder(model), layers):
        yield why
    for m, layer in modules.items():  # code that the probe can't run
        ratio, shape = getattr(m, "num_key_value_groups", None), shapes[layer]
        if not (ratio is None or shape.rank) and ratio * shape.kv_heads != shape.q_heads:
            yield (
                f"layer {layer} has q and kv heads as {ratio} to 1, where its config says "
                f"{shape.q_heads} to {shape.kv_heads}"
            )


def _config_obstacles(config: Any, modules: Iterable[torch.nn.Module]) -> Iterator[str]:
    """What a config says of attention that is not of a query over its layer's own keys."""
    if any(getattr(m, "indexer", None) is not None for m in modules):
        yield "it is sparse already: an indexer of its own chooses the keys that it reads"
    if any(by_layer(config, "kv_lora_rank")):
        yield from filter(None, map(why_not_latents, modules))
    if config.model_type == "diffllama":
        yield "it calls attention twice a layer"


def _layer_obstacles(model: PreTrainedModel, shapes: list[LayerShape]) -> Iterator[str]:
    """Kinds of layers that we don't know, or whose state we can't keep."""
    other = sorted({shape.kind for shape in shapes} - {*KINDS})
    if sparse := [kind for kind in other if "sparse" in kind or "compressed" in kind]:
        yield f"it is sparse already: its layers are of kind {', '.join(sparse)}"
    if other:
        yield f"it has layers of kind {', '.join(other)}"
    stateful = any(shape.has_state for shape in shapes)
    if stateful and not hasattr(cache_utils, "LinearAttentionLayer"):
        yield "this transformers keeps the state of linear layers in a cache of the model's own"
    has_default = GenerationMixin._supports_default_dynamic_cache.__func__  # of any class
    if not has_default(type(model)):
        yield "it keeps the state of its linear layers in a cache of its own"


def _module_obstacles(modules: dict[torch.nn.Module, int], attending: list[int]) -> Iterator[str]:
    """Attention modules that are not causal self-attention, one in each layer that attends."""
    found = [*modules.values()]
    causal = {layer for m, layer in modules.items() if m.is_causal}
    if not causal.issuperset(found):
        yield "its tokens attend to later ones too"
    if not all(m.is_causal for m in modules):
        yield "its layers have attention to an encoder, too (cross-attention)"
    if found != attending:
        yield f"its attention layers are {found}, its config says {attending}"


def check_host(modules: Iterable[torch.nn.Module], layers: Iterable[LayerPlan]) -> None:
    """PatchError where a layer keeps keys in host memory and no GPU is there to read them."""
    for module, layer in zip(modules, layers, strict=True):
        if not layer.hosts:
            continue
        if (why := host.why_not(next(module.parameters()).device)) is not None:
            raise PatchError(
                f"layer {layer.index} keeps keys in host memory, which a GPU reads, and this is "
                f"{why}. Move the model to a GPU and patch it there, or use a plan without host"
            )


def check_model(model: Any) -> None:
    """PatchError for what is no model of transformers, or only holds one."""
    if isinstance(model, Handle):
        raise HandleError(MISTAKEN)
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
