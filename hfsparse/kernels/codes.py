"""Matrices of quantised weights, as torchao's tensors hold them.

A format is one line of FORMATS. A tensor that none reads is left to its own products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128  # columns of a tile of tinygemm's: 16 words of each of 8 rows
GROUPS = (32, 64, 128, 256)  # columns of a group, where it is no whole row
CODES = (torch.int8, torch.float8_e4m3fn, torch.int32)


class Quantised(NamedTuple):
    """A matrix `[N, K]`: each number is its code times its group's scale, plus its group's zero.

    A group is some columns of a row, or all. A zero of integers is taken from the codes instead.
    """

    rows: int  # N; tiles may hold more, and more columns than K, of zeros
    codes: Tensor  # int8 or float8_e4m3fn [N, K]; 8 of 4 bits a word: int32 [N, K / 8] or in tiles
    scale: Tensor  # [N, groups of a row]
    zero: Tensor | None = None  # as scale, in its strides, too
    tiled: bool = False  # words lie as tinygemm reads them, int32 [N / 8, K / 128, 32, 4]

    @property
    def columns(self) -> int:
        """Columns that are held."""
        if self.tiled:
            return self.codes.shape[1] * TILE
        return self.codes.shape[1] * (8 if self.codes.dtype == torch.int32 else 1)

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.columns // self.scale.shape[1]

    def numbers(self) -> Tensor:
        """The matrix as it is held, in float32."""
        codes = self.codes if self.codes.dtype != torch.int32 else _unpack(self.codes, self.tiled)
        codes, zero = codes.float(), self.zero
        scale = self.scale.float().repeat_interleave(self.group, 1)
        if zero is None:
            return codes * scale
        zero, integers = zero.repeat_interleave(self.group, 1), not zero.is_floating_point()
        return (codes - zero) * scale if integers else codes * scale + zero


def _unpack(words: Tensor, tiled: bool) -> Tensor:
    """Codes from -8 to 7 `[N, K]` of words of eight."""
    codes = words[..., None] >> torch.arange(0, 32, 4, device=words.device) & 15
    if not tiled:  # in two's complement, one behind another
        return ((codes ^ 8) - 8).flatten(1)
    N, K = words.shape[0] * 8, words.shape[1] * TILE
    # Of a word: a row of 8, columns 2c + 32w on; of its codes: columns 16b, 8c and 1 further.
    codes = codes.unflatten(-1, (2, 2, 2)).unflatten(2, (8, 4))  # [N/8, K/128, row, c, w, 1, 16, 8]
    return codes.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(N, K) - 8


# By the name of torchao's class.
FORMATS = {
    "Int8Tensor": lambda w: Quantised(len(w), w.qdata, w.scale, getattr(w, "zero_point", None)),
    "Float8Tensor": lambda w: Quantised(len(w), w.qdata, w.scale),
    "Int4Tensor": lambda w: Quantised(
        len(w), w.qdata.view(torch.int32), w.scale.t(), w.zero_point.t()
    ),
    "Int4TilePackedTo4dTensor": lambda w: Quantised(
        len(w), w.qdata, *(t.t() for t in w.scale_and_zero.unbind(-1)), tiled=True
    ),
}
# What a weight has whose products round activations, too, or scale them.
OF_ACTIVATIONS = "act_quant_kwargs", "act_quant_scale", "act_pre_scale"


def read(weight: Tensor) -> Quantised | None:
    """What torchao's tensor of a weight `[N, K]` holds; None: it is of no known format."""
    kind = type(weight)
    made = FORMATS.get(kind.__name__) if kind.__module__.partition(".")[0] == "torchao" else None
    if made is None or weight.ndim != 2:
        return None
    if any(getattr(weight, name, None) is not None for name in OF_ACTIVATIONS):
        return None
    if getattr(weight, "activation_dtype", torch.bfloat16) != torch.bfloat16:
        return None
    matrix = made(weight)
    if matrix.scale.ndim != 2 or matrix.codes.dtype not in CODES:
        return None
    whole = matrix.scale.shape[1] == 1 and matrix.codes.dtype != torch.int32
    if whole:  # torchao's own product reads no zeros of rows: they are none
        matrix = matrix._replace(zero=None)
        if len(matrix.scale) == 1:
            matrix = matrix._replace(scale=matrix.scale.expand(matrix.rows, 1))
    grouped = matrix.group in GROUPS and (matrix.group >= TILE or not matrix.tiled)
    by_row = len(matrix.scale) >= matrix.rows and matrix.codes.is_contiguous()
    return matrix if by_row and (whole or grouped) else None
