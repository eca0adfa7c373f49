"""How much a kv head needs its whole past, from one forward pass over a text with passkeys.

Measured on rows that predict the passkeys in the answers; of a group's q heads the largest counts.

    copy    attention on the token that is being copied (retrieval heads, arXiv 2404.15574; its
            mass, where the paper counts how often it is the largest)
    mass    attention outside sink + recent
    error   what a ring changes in the layer's output after its projection, relative to the whole
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.models.loading import input_device
from hfsparse.models.names import text_decoder
from hfsparse.patcher import patch
from hfsparse.patterns.streaming import Streaming
from hfsparse.profiler.measure.capture import PROJECTIONS, find_projection
from hfsparse.profiler.measure.exact import attend
from hfsparse.profiler.measure.latents import solve_latents
from hfsparse.profiler.measure.modes import isolate_modes
from hfsparse.profiler.measure.slices import slice_tokens
from hfsparse.profiler.prompts.passkeys import Passkeys
from hfsparse.runtime.layer_plan import Logits, layer_plan_of, observed

PROXIES = ("copy", "mass", "error")
ROWS = 64  # rows that are measured, spread over the answers


@isolate_modes
def measure_proxies(
    model: PreTrainedModel, keys: Passkeys, stream: Streaming
) -> dict[str, np.ndarray]:
    """Each proxy `[layers, Hkv]`, a row for each layer that may be sparse."""
    some = np.linspace(0, len(keys.rows) - 1, min(ROWS, len(keys.rows))).astype(int)
    rows, sources = (torch.tensor(t, device="cpu")[some] for t in (keys.rows, keys.sources))
    found: list[dict[str, Tensor]] = []

    def observe(module, q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> None:
        if not layer_plan_of(module).alone:
            return
        at, source = rows.to(q.device), sources.to(q.device)
        q, latents = q[:, :, at], solve_latents(module, k, v)
        if latents is not None:
            q, (k, v) = latents.absorb(q), latents.kept
        given = q[0], k[0], v[0], logits, at, source, stream
        found.append(_layer(module, latents, *given))

    ids = keys.ids.to(input_device(model))
    with patch(model), slice_tokens(model), observed(model, observe), torch.no_grad():
        text_decoder(model)(input_ids=ids, use_cache=False)
    return {name: torch.stack([each[name] for each in found]).numpy() for name in PROXIES}


def _layer(module, latents, q, k, v, logits, rows, sources, stream) -> dict[str, Tensor]:
    """Each proxy [Hkv]; q `[Hq, R, D]` at `rows` [R], k, v `[Hkv, L, D]`."""
    group, each = len(q) // len(k), torch.arange(len(rows), device=rows.device)
    keys = torch.arange(k.shape[1], device=rows.device)
    near = (keys < stream.sink) | (keys >= stream.band.start(rows)[:, None])  # [R, L]
    found: dict[str, list[Tensor]] = {"copy": [], "mass": []}
    exact, change = [], []  # [group, R, Dv] each
    for g in range(len(k)):
        heads = slice(g * group, (g + 1) * group)
        mass = attend(q[heads], k[g], rows, logits, heads)  # [group, R, L]
        bare = 0.0 if logits.s_aux is None else 1 - mass.sum(-1)  # what sink logits take
        kept = mass * near
        share = kept.sum(-1) + bare
        found["copy"].append(mass[:, each, sources].mean(1).amax())
        found["mass"].append((1 - share).mean(1).amax())
        values = v[g].float()
        exact.append(mass @ values)
        change.append(kept @ values / share.clamp(min=1e-9)[..., None] - exact[-1])
    proj = find_projection(module, torch.cat(exact)[None].to(v.dtype), latents)
    if proj is None:
        raise UsageError(
            f"{type(module).__name__} has no output projection called {', '.join(PROJECTIONS)}: "
            "heads' errors can't be measured. Please report this model to hfsparse"
        )
    proj = proj.float().unflatten(0, (len(k), group))
    whole = torch.einsum("ghrd,ghdo->ro", torch.stack(exact), proj).norm(dim=-1)
    moved = torch.einsum("ghrd,ghdo->gro", torch.stack(change), proj).norm(dim=-1)
    error = (moved / whole.clamp(min=1e-9)).mean(1)
    return {name: torch.stack(t).cpu() for name, t in found.items()} | {"error": error.cpu()}
