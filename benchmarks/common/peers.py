"""Two peers as arms of prefill.py: FlexAttention, and skip-softmax of nvidia-modelopt.

Each is one call over q `[1, H, S, D]` and k, v `[1, Hkv, S, D]`, causal, without padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from zipfile import ZipFile

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.lists import FULL, BlockLists

PEAK = 16.0  # e^(16 * 16 / sqrt(128)) = e^22.6: what the weight of a key that matters grows by
THRESHOLD = 1e-3  # modelopt skips a tile whose weights are all below this share of the largest
KERNEL = "modelopt.torch.kernels.common.attention.triton_fa"
HELPERS = ("sparsity.attention", "quantization.attention", "quantization.common")


# -- FlexAttention -------------------------------------------------------------------------------


def causal(batch, head, query, key):
    return query >= key


def block_mask(lists: BlockLists):
    """Lists of one unpadded prompt, whole blocks and the diagonal, as FlexAttention's own."""
    from torch.nn.attention.flex_attention import BlockMask

    grid = lists.grid
    if lists.columns is not None or set(lists.bands) != {FULL} or grid.window is not None:
        raise ValueError("columns, bands and windows need more than a causal mask function")
    listed = []
    for count, index in (
        (lists.part_count, lists.part_index),
        (lists.full_count, lists.full_index),
    ):  # an index must be as wide as there are blocks
        index = pad(index, (0, grid.nk - index.shape[-1]))
        listed += [count.contiguous(), index.contiguous()]
    return BlockMask.from_kv_blocks(
        *listed, BLOCK_SIZE=grid.block, mask_mod=causal, seq_lengths=(grid.Sq, grid.Sk)
    )


class Flex:
    """FlexAttention's Triton kernel, compiled for each length."""

    def __init__(self):
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.config.recompile_limit = 64
        self.compiled = torch.compile(flex_attention, dynamic=False)

    def bind(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> Callable:
        """A call over these lists; the first makes its block mask and may compile."""
        more = {"scale": scale, "enable_gqa": True, "kernel_options": {"BACKEND": "TRITON"}}

        def run() -> Tensor:
            if "block_mask" not in more:
                more["block_mask"] = block_mask(lists)
            return self.compiled(q, k, v, **more)

        return run


# -- nvidia-modelopt -----------------------------------------------------------------------------


class ModelOpt:
    """Skip-softmax of nvidia-modelopt, from a wheel, a folder or the installed package.

    Only the kernel and the files that it calls are imported: the whole package wants much more.
    """

    def __init__(self, where: str | None = None):
        if where is None:
            spec = find_spec("modelopt")
            if spec is None:
                raise ImportError("nvidia-modelopt is not installed; name a wheel by --modelopt")
            where = Path(next(iter(spec.submodule_search_locations))).parent
        elif where.endswith(".whl"):
            self.folder = TemporaryDirectory()  # kept: Triton reads the kernels' source
            with ZipFile(where) as wheel:
                wheel.extractall(self.folder.name)
            where = self.folder.name
        where = Path(where)
        stems = [KERNEL.rpartition(".")[0], *(f"modelopt.torch.kernels.{name}" for name in HELPERS)]
        parents = {".".join(s.split(".")[: n + 1]) for s in stems for n in range(s.count(".") + 1)}
        for name in sorted(parents):
            package = ModuleType(name)
            package.__path__ = [str(where.joinpath(*name.split(".")))]
            sys.modules[name] = package
        self.kernel = import_module(KERNEL)
        found = [path.name.split("-")[1] for path in where.glob("nvidia_modelopt-*.dist-info")]
        self.version = found[0].removesuffix(".dist") if found else "of unknown version"

    def bind(self, q: Tensor, k: Tensor, v: Tensor, scale: float, skip: bool = True) -> Callable:
        """A call; without `skip` it is plain dense attention."""
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # [S, heads, D]
        start = torch.zeros(1, dtype=torch.int32, device=q.device)
        length = torch.full_like(start, len(q))
        more = {"softmax_scale": scale, "skip_softmax_threshold": THRESHOLD if skip else None}

        def run(**also):
            out = self.kernel.attention(q, k, v, start, length, len(q), **more, **also)
            return out if also else out.transpose(0, 1)[None]

        return run

    def tile(self) -> tuple[int, int]:
        """Queries and keys of the tile that its autotuner chose last."""
        best = getattr(self.kernel._attn_fwd, "best_config", None)
        return (best.kwargs["BLOCK_M"], best.kwargs["BLOCK_N"]) if best else (128, 32)

    def read(self, run: Callable) -> float:
        """Share of its tiles that a bound call did not skip, by its own counters."""
        # It would count tiles of another size than it computes.
        self.kernel._MEASURE_BLOCK_M, self.kernel._MEASURE_BLOCK_N = self.tile()
        out = run(measure_sparsity=True)
        return 1 - out._sparsity_skipped / out._sparsity_total


def peaked(q: Tensor, k: Tensor, share: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k whose weight lies in a share of the key blocks, and which: bool [Hkv, nk].

    Random inputs weigh all tiles alike, so that none can be skipped, or all. Here a tile matters
    beyond doubt or not at all: one dim of q and k is 0 in keys that don't, PEAK elsewhere. The
    blocks that do are one of each 1 / share, at random; the first is always one.
    """
    heads, nk = k.shape[1], k.shape[2] // block
    count = max(1, round(share * nk))
    at = (torch.arange(count, device=k.device) + torch.rand(heads, count, device=k.device)) / share
    at[:, 0] = 0
    chosen = torch.zeros(heads, nk, dtype=torch.bool, device=k.device)
    chosen.scatter_(1, at.long().clamp(max=nk - 1), True)
    q, k = q.clone(), k.clone()
    q[..., 0] = PEAK
    k[..., 0] = PEAK * chosen.repeat_interleave(block, 1)
    return q, k, chosen
