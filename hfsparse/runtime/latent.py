"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent a token serves all heads.

A head's key is made of the token's latent by a matrix, and ends with a rotated part that all heads
share; its value is made of the latent alone. The cache keeps latent and rotated part, as one key of
one kv head, whose first dims are its value. Prompts are read by head, as the model expands them. A
step expands nothing that is cached: queries take on the matrix of keys, and what they read is the
latents' mean, which the matrix of values then expands.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hfsparse.runtime.cache.layer import join_latents


class Latents:
    """The latents of a call's tokens in one layer, and the matrices that expand any."""

    def __init__(self, module: nn.Module, latent: Tensor, rotated: Tensor):
        """latent `[B, 1, Q, rank]`, rotated `[B, 1, Q, rope]`; module: makes keys of them."""
        self.module, self.rank = module, latent.shape[-1]
        self.kept = join_latents(latent, rotated)  # what the cache takes in place of k and v

    @cached_property
    def weight(self) -> Tensor:
        """`[H, nope + v, rank]`: what of a head's key isn't rotated, and its value."""
        module, like = self.module, self.kept[0]
        heads = -1, module.qk_nope_head_dim + module.v_head_dim
        return matrix_of(module.kv_b_proj, self.rank, like).unflatten(0, heads)

    @property
    def nope(self) -> int:
        """Dims of a key that aren't rotated."""
        return self.module.qk_nope_head_dim

    def absorb(self, q: Tensor) -> Tensor:
        """Queries of expanded keys `[B, H, Q, nope + rope]` as those of latents."""
        up = torch.einsum("bhqn,hnr->bhqr", q[..., : self.nope], self.weight[:, : self.nope])
        return torch.cat([up, q[..., self.nope :]], -1)

    def values(self, read: Tensor) -> Tensor:
        """What heads read of latents `[B, H, Q, rank]`, as values `[B, H, Q, v]`."""
        return torch.einsum("bhqr,hvr->bhqv", read, self.weight[:, self.nope :])

    def expand(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Each head's keys `[B, H, S, nope + rope]` and values, of keys as the cache holds them."""
        latent, rotated = k[:, 0, :, : self.rank], k[..., self.rank :]
        made = linear(latent, self.weight.flatten(0, 1)).unflatten(2, self.weight.shape[:2])
        made = made.transpose(1, 2)
        shared = rotated.expand(-1, made.shape[1], -1, -1)
        return torch.cat([made[..., : self.nope], shared], -1), made[..., self.nope :]


def matrix_of(projection: nn.Module, rank: int, like: Tensor) -> Tensor:
    """A projection without bias as `[out, rank]`, in the type of `like`.

    Of one that is more than a weight (quantised, with an adapter, loaded when it is called) it is
    what the projection makes of the identity.
    """
    more = (
        "forward" in vars(projection) or projection._forward_hooks or projection._forward_pre_hooks
    )
    if type(projection) is nn.Linear and not more and projection.weight.device == like.device:
        return projection.weight.to(like.dtype)
    each = torch.eye(rank, dtype=like.dtype, device=like.device)
    half = like.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(like.device.type, like.dtype if half else None, enabled=half):
        return projection(each).to(like.dtype).mT


def why_not(module: nn.Module) -> str | None:
    """Why the latents of this module can't be read as one head; None: they can."""
    if not hasattr(module, "expand_kv"):
        return (
            "this transformers caches the keys of each head that it makes of latents (MLA): 5.17 "
            "and later cache the latents"
        )
    bias = getattr(module.kv_b_proj, "bias", None)
    if (bias() if callable(bias) else bias) is not None:  # torch's quantised layers have a method
        return "it adds a bias to what it makes of latents (MLA)"
    with torch.autocast("cpu", enabled=False):
        alone, given = _sample(module)
        ours = Latents(alone, *given)
        try:
            found = alone.expand_kv(*given)
        except AttributeError:  # it takes more than the projection
            found = ()
        if len(found) == 2 and all(map(_same, found, ours.expand(ours.kept[0]))):
            return None
    return "it makes keys and values of latents (MLA) in a way that hfsparse doesn't know"


def _sample(module: nn.Module) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small module of this class that expands latents, on the CPU, and a latent for it."""
    rank, rope, heads = 4, module.qk_rope_head_dim, 2
    wide = heads * (module.qk_nope_head_dim + module.v_head_dim)
    where = {"device": "cpu", "dtype": torch.float32}
    alone = type(module).__new__(type(module))
    nn.Module.__init__(alone)
    for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        setattr(alone, name, getattr(module, name))
    alone.kv_b_proj = nn.utils.skip_init(nn.Linear, rank, wide, bias=False, **where)
    weight, latent, rotated = (
        torch.arange(rows * columns, **where).sin().view(rows, columns)
        for rows, columns in ((wide, rank), (1, rank), (1, rope))
    )
    alone.kv_b_proj.weight.data.copy_(weight)
    return alone, (latent[None, None], rotated[None, None])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
