"""Run a prompt through a model and measure the attention of each free layer, one at a time.

Two forward passes without gradients (apart, so that logits and graph never lie in memory together)
find the prompt's key tokens: those that the model predicts well, and badly when every head is
short-sighted (LongPPL, arXiv 2410.23771). Long attention matters there, and on few other tokens.
Free are the layers that a plan may change: with attention, and no window of their own.
The backward pass from their margin then visits each layer with its attention's output and gradient.
Layers are recomputed one by one (reentrant checkpointing), so that memory is one layer's; hidden
states between layers wait in the CPU's.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.models.layers import layer_shapes
from hfsparse.models.loading import input_device
from hfsparse.models.logits import read_logits
from hfsparse.models.names import text_decoder
from hfsparse.patcher import patch
from hfsparse.plan import Plan
from hfsparse.profiler.measure.latents import absorb_out, solve_latents
from hfsparse.profiler.measure.modes import isolate_modes
from hfsparse.profiler.measure.shared_keys import SharedKeys
from hfsparse.profiler.measure.slices import slice_tokens, wrap_forwards
from hfsparse.runtime.latent import Latents
from hfsparse.runtime.layer_plan import Logits, layer_plan_of, layer_plans_of, observed

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")  # a layer's output, as models name it
KEYS = 48  # key tokens a prompt
SURE = 6.0  # margins are cut off here: a token at e^6 to one is as good as certain
SLICE = 256  # tokens whose logits exist at a time
MAPPED = 8 << 20  # bytes: larger blocks of CPU memory go back to the system once freed


@dataclass(frozen=True)
class Given:
    """What one layer's attention is given in one prompt."""

    q: Tensor  # [1, Hq, L, D], post-RoPE
    k: Tensor  # [1, Hkv, L, D]
    v: Tensor  # [1, Hkv, L, Dv]


@dataclass(frozen=True)
class Seen(Given):
    """One layer's attention in one prompt, and what its output is worth."""

    out: Tensor  # [1, Hq, L, Dv]
    grad: Tensor  # [1, Hq, L, Dv], of the objective: here the mean margin of the key tokens
    logits: Logits
    keys: Tensor  # [n] rows that predict the key tokens, ascending
    layer: int  # that keeps the keys
    proj: Tensor | None = None  # [Hq, Dv, hidden], the output projection; None: not found
    first: int = 0  # number of the first kv head, where these are a part of the layer's

    @property
    def heads(self) -> range:
        """Numbers of the kv heads."""
        return range(self.first, self.first + self.k.shape[1])


@isolate_modes
def capture(
    model: PreTrainedModel,
    ids: Tensor,
    short_sighted: Plan,
    measure: Callable[[Seen], dict[str, np.ndarray]],
) -> list[dict[str, np.ndarray]]:
    """What `measure` answers for each free layer on ids `[1, L]`, in their order.

    `short_sighted` finds key tokens.
    """
    _return_large_blocks()
    ids = _copy_ids(model, ids)
    decoder = text_decoder(model)
    margins = []
    for plan in (short_sighted, None):
        with patch(model, plan), slice_tokens(model), torch.no_grad():
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            margins.append(_measure_margins(model, hidden, ids))
            del hidden
    lost = margins[1] - margins[0]
    keys = lost.topk(min(KEYS, len(lost))).indices.sort().values.to(ids.device)
    return backward(
        model, ids, keys, lambda *prediction: _measure_margin(*prediction).mean(), measure
    )


@isolate_modes
def forward(
    model: PreTrainedModel, ids: Tensor, look: Callable[[Given], dict[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """What `look` answers for each free layer, in order, in a dense forward pass over ids `[1, L]`.

    It takes a small part of the time of `capture`.
    """
    _return_large_blocks()
    found: list[dict[str, np.ndarray]] = []

    def observe(module, q, k, v, logits):
        if layer_plan_of(module).free:
            latents = solve_latents(module, k, v)
            if latents is not None:
                q, (k, v) = latents.absorb(q), latents.kept
            found.append(look(Given(q, k, v)))

    with patch(model), slice_tokens(model), observed(model, observe), torch.no_grad():
        text_decoder(model)(input_ids=_copy_ids(model, ids), use_cache=False)
    return found


@isolate_modes
def backward(
    model: PreTrainedModel,
    ids: Tensor,
    keys: Tensor,
    objective: Callable[[PreTrainedModel, Tensor, Tensor], Tensor],
    measure: Callable[[Seen], dict[str, np.ndarray]],
) -> list[dict[str, np.ndarray]]:
    """What `measure` answers for each free layer, in order, in the backward pass from an objective.

    `objective` is given the model, its last hidden states `[1, n, hidden]` at rows `keys` [n] of
    ids `[1, L]`, and the tokens [n] that follow these rows.
    """
    _return_large_blocks()
    found: dict[int, dict[str, np.ndarray]] = {}
    ids = _copy_ids(model, ids)
    decoder = text_decoder(model)
    observe = _make_observer(model, keys, measure, found)
    with patch(model), checkpoint_layers(model), observed(model, observe), torch.enable_grad():
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        hidden = hidden[:, keys.to(hidden.device)]
        wanted = objective(model, hidden, ids[0, keys + 1])
        if not wanted.requires_grad:
            raise _explain_no_gradient(model)
        wanted.backward()
    return [found[layer] for layer in sorted(found)]


def stack_layers(
    model: PreTrainedModel, found: list[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What layers that may be sparse have answered, as arrays `[layers, ...]`, 0 in the others."""
    free = [shape.free for shape in layer_shapes(model)]
    stacked = {}
    for name in found[0]:
        rows = np.stack([each[name] for each in found])
        stacked[name] = np.zeros((len(free), *rows.shape[1:]), rows.dtype)
        stacked[name][free] = rows
    return stacked


def _make_observer(
    model: PreTrainedModel,
    keys: Tensor,
    measure: Callable[[Seen], dict[str, np.ndarray]],
    found: dict[int, dict[str, np.ndarray]],
) -> Callable:
    """What layers call (`Mode.observe`): in the backward pass it puts into `found`, by layer,
    what `measure` answers."""

    shared = SharedKeys()

    def observe(module, q, k, v, logits):
        layer = layer_plan_of(module)
        shared.follow(layer, k, v)
        if not torch.is_grad_enabled() or not layer.free:  # the forward pass, or a window
            return None

        # Detached: a hook that held its own tensor's graph would keep every layer alive.
        held = [t.detach() for t in (q, k, v)]

        def watch(out: Tensor) -> None:
            if not out.requires_grad:
                raise _explain_no_gradient(model)
            held.append(out.detach())

            def visit(grad: Tensor | None) -> None:
                if grad is None:
                    raise _explain_no_gradient(model)
                with torch.no_grad():
                    at = keys.to(grad.device)
                    found[layer.index] = measure(_look(module, *held, grad, logits, at))
                held.clear()  # autograd keeps this hook until it is through with the layer

            out.register_hook(visit)

        return watch

    return observe


def _look(module, q, k, v, out, grad, logits, keys) -> Seen:
    latents = solve_latents(module, k, v)
    proj = find_projection(module, out, latents)
    if latents is not None:
        q, (k, v), (out, grad) = latents.absorb(q), latents.kept, absorb_out(latents, out, grad)
    layer = layer_plan_of(module)
    return Seen(q, k, v, out, grad, logits, keys, (layer.producer or layer).index, proj)


def check_gradients(model: PreTrainedModel) -> None:
    """Raise UsageError where a layer's attention gets no gradient, found out on a few tokens."""
    ids, keys = torch.zeros(1, 8, dtype=torch.long), torch.tensor([6])
    backward(
        model, ids, keys, lambda *prediction: _measure_margin(*prediction).mean(), lambda seen: {}
    )


def _explain_no_gradient(model: PreTrainedModel) -> UsageError:
    return UsageError(
        f"the weights of this {type(model).__name__} let no gradient through, as some that are "
        "quantised don't: profile the model that they were made from, whose plan fits them too, or "
        "use method streaming-llm"
    )


def _copy_ids(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """A copy on the model's input device: inference tensors can take no part in autograd."""
    return ids.to(input_device(model)).clone()


def _measure_margins(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Margin [L - 1] of each next token, a slice of the vocabulary's logits at a time."""
    pairs = zip(hidden[:, :-1].split(SLICE, 1), ids[0, 1:].split(SLICE), strict=True)
    return torch.cat([_measure_margin(model, part, wanted) for part, wanted in pairs]).clamp(
        -SURE, SURE
    )


def _measure_margin(model: PreTrainedModel, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Log-odds of the tokens wanted [n] against all others; hidden `[1, n, hidden]`."""
    scores = read_logits(model, hidden)[0].float()
    wanted = wanted.to(scores.device)
    others = scores.scatter(1, wanted[:, None], -torch.inf).logsumexp(1)
    return scores.gather(1, wanted[:, None])[:, 0] - others


def find_projection(
    module: torch.nn.Module, out: Tensor, latents: Latents | None = None
) -> Tensor | None:
    """What each head's output `[1, Hq, L, Dv]` adds to the layer's, as `[Hq, Dv, hidden]`.

    Asked of the module, whatever holds its weights (quantised, adapted). latents: heads' outputs
    are of these, Dv is their rank.
    """
    project = next((getattr(module, n) for n in PROJECTIONS if hasattr(module, n)), None)
    if project is None:
        return None
    values = None if latents is None else latents.weight[:, latents.nope :]  # [Hq, v, rank]
    heads, size = out.shape[1], out.shape[3] if values is None else values.shape[1]
    ones = torch.eye(heads * size, dtype=out.dtype, device=out.device)
    answers = project(ones) - project(torch.zeros_like(ones[:1]))
    proj = answers.view(heads, size, -1)
    return proj if values is None else torch.einsum("hvo,hvr->hro", proj, values)


def _return_large_blocks() -> None:
    """Keep glibc from raising, up to 32 MiB, the size that it serves from a heap that fragments.

    Hidden states that live long among short-lived blocks cost 0.2 to 0.5 GiB so, at 4,096 tokens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, MAPPED)  # M_MMAP_THRESHOLD


@contextmanager
def checkpoint_layers(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow from the embeddings on, to no weights; each decoder layer is recomputed."""
    weights = [p for p in model.parameters() if p.requires_grad]
    layers = _find_layers(model)
    hook = model.get_input_embeddings().register_forward_hook(_begin)
    try:
        for weight in weights:
            weight.requires_grad_(False)
        with slice_tokens(model), wrap_forwards(layers, _recompute):
            yield
    finally:
        hook.remove()
        for weight in weights:
            weight.requires_grad_(True)


def _find_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's layers: all in a list of which some hold attention, the outermost such list."""
    modules = text_decoder(model).modules()
    lists = [m for m in modules if isinstance(m, torch.nn.ModuleList) and layer_plans_of(m)]
    inside = {each for layers in lists for layer in layers for each in layer.modules()}
    return [layer for layers in lists if layers not in inside for layer in layers]


def _begin(module: torch.nn.Module, args: tuple, out: Tensor) -> Tensor:
    """Let embeddings depend on a scalar: of a leaf autograd would keep the gradient."""
    return out + out.new_zeros((), requires_grad=True)


def _recompute(forward: Callable, hidden_states: Tensor, *args, **kwargs):
    with save_on_cpu(pin_memory=hidden_states.is_cuda):  # hidden states wait for the backward pass
        return checkpoint(partial(forward, **kwargs), hidden_states, *args, use_reentrant=True)
