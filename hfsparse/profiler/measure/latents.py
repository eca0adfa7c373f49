"""A layer of MLA as its cache has it: all q heads read one kv head of latents.

Attention's weights are the same, so that methods measure a pattern for each q head, and one way to
keep and read the layer's latents, as they do for any group of heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hfsparse.runtime.latent import Latents, matrix_of
from hfsparse.runtime.layer_plan import layer_plan_of


def solve_latents(module: nn.Module, k: Tensor, v: Tensor) -> Latents | None:
    """The latents of which a patched layer has made k, v `[B, H, S, D]`; None where of none.

    Without a cache nobody is given them: they are solved for, by least squares.
    """
    if not (rank := layer_plan_of(module).rank):
        return None
    nope = module.qk_nope_head_dim
    made = torch.cat([k[..., :nope], v], -1).transpose(1, 2).flatten(2)  # [B, S, H * (nope + v)]
    weight = matrix_of(module.kv_b_proj, rank, k).float().expand(len(k), -1, -1)
    latent = torch.linalg.lstsq(weight, made.float().mT).solution.mT
    return Latents(module, latent[:, None].to(k.dtype), k[:, :1, :, nope:])


def absorb_out(latents: Latents, out: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of heads' output `[B, H, Q, v]` and its gradient what they are of latents `[B, H, Q, rank]`.

    Of all outputs that give this one it is the shortest.
    """
    weight = latents.weight[:, latents.nope :].float()  # [H, v, rank]
    means = torch.einsum("bhqv,hrv->bhqr", out.float(), torch.linalg.pinv(weight))
    return means.to(out.dtype), torch.einsum("bhqv,hvr->bhqr", grad, weight.to(grad.dtype))
