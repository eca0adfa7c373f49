"""Matrices of quantised weights, as torchao's tensors hold them.

A format is one line of FORMATS. A tensor that none reads is left to its own products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CODES = (torch.int8, torch.float8_e4m3fn)
GROUPS = (32, 64, 128, 256)  # columns of a group, where it is no whole row
TILE = 8, 128  # rows and columns of a tile of four-bit codes
GROUPS_OF_TILES = (128, 256)
# What a weight has whose products round activations, too, or scale them.
OF_ACTIVATIONS = "act_quant_kwargs", "act_quant_scale", "act_pre_scale"


class Quantised(NamedTuple):
    """A matrix `[N, K]`: each number is its code, less its group's zero, times the group's scale.

    A group is some columns of a row, or all of them. Codes of four bits, `tiled`, lie as PyTorch's
    `_convert_weight_to_int4pack` lays them for tensor cores: a tile behind another, of which each
    row has 16 words, and word 4 l + j in the half h the codes of columns 32 j + 8 i + 2 l + h. Its
    scale has two numbers for a group: the number is its code, less 8, times the first, plus the
    second.
    """

    codes: Tensor  # [N, K]; in four bits int32 [N, K / 8]
    scale: Tensor  # [N, groups of a row]; in four bits [groups of a row, N, 2]
    zero: Tensor | None = None  # as scale, integers; None: all are 0

    @property
    def tiled(self) -> bool:
        """Whether codes are of four bits."""
        return self.codes.dtype == torch.int32

    @property
    def columns(self) -> int:
        """K."""
        return self.codes.shape[1] * (8 if self.tiled else 1)

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.columns // self.scale.shape[0 if self.tiled else 1]

    @property
    def layout(self) -> tuple:
        """What matrices have in common that one launch reads."""
        return self.codes.dtype, self.scale.dtype, self.group, self.zero is None

    def numbers(self) -> Tensor:
        """The matrix in float32."""
        if self.tiled:
            scale, added = (part.T.float().repeat_interleave(self.group, 1)
                            for part in self.scale.unbind(-1))  # fmt: skip
            return (_untiled(self.codes) - 8) * scale + added
        codes, scale = self.codes.float(), self.scale.float().repeat_interleave(self.group, 1)
        if self.zero is None:
            return codes * scale
        return (codes - self.zero.repeat_interleave(self.group, 1)) * scale


def _untiled(words: Tensor) -> Tensor:
    """Codes `[N, K]` of words `[N, K / 8]`."""
    (N, wide), (rows, columns) = words.shape, TILE
    tiles = words.reshape(N // rows, wide * 8 // columns, rows, 4, 4, 1)
    codes = (tiles >> torch.arange(0, 32, 4, device=words.device)) & 15
    # Of a tile and a row: l, j, h, i.
    return codes.unflatten(-1, (2, 4)).permute(0, 2, 1, 4, 6, 3, 5).reshape(N, wide * 8)


# By the name of torchao's class.
FORMATS = {
    "Int4TilePackedTo4dTensor": lambda w: Quantised(
        w.qdata.reshape(8 * len(w.qdata), -1), w.scale_and_zero
    ),
    "Int8Tensor": lambda w: Quantised(w.qdata, w.scale, getattr(w, "zero_point", None)),
    "Float8Tensor": lambda w: Quantised(w.qdata, w.scale),
}


def read(weight: Tensor) -> Quantised | None:
    """What torchao's tensor of a weight `[N, K]` holds; None: it is of no known format."""
    kind = type(weight)
    made = FORMATS.get(kind.__name__) if kind.__module__.partition(".")[0] == "torchao" else None
    if made is None or any(getattr(weight, name, None) is not None for name in OF_ACTIVATIONS):
        return None
    codes, scale, zero = matrix = made(weight)
    if matrix.tiled:
        fits = (len(codes), matrix.columns) == weight.shape  # else it was padded
        return matrix if fits and matrix.group in GROUPS_OF_TILES else None
    if codes.ndim != 2 or scale.ndim != 2 or codes.dtype not in CODES or not codes.is_contiguous():
        return None
    if scale.shape[1] == 1:  # of rows torchao's own product reads no zeros: they are none
        return Quantised(codes, scale.expand(len(codes), 1))
    matrix = Quantised(codes, scale, zero)
    return matrix if len(scale) == len(codes) and matrix.group in GROUPS else None
