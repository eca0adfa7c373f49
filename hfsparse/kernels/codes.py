"""Matrices of quantised weights, as torchao's tensors hold them.

A format is one line of FORMATS. A tensor that none reads is left to its own products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CODES = (torch.int8, torch.float8_e4m3fn)
GROUPS = (32, 64, 128, 256)  # columns of a group, where it is no whole row
# What a weight has whose products round activations, too, or scale them.
OF_ACTIVATIONS = "act_quant_kwargs", "act_quant_scale", "act_pre_scale"


class Quantised(NamedTuple):
    """A matrix `[N, K]`: each number is its code, less its group's zero, times the group's scale.

    A group is some columns of a row, or all of them.
    """

    codes: Tensor  # [N, K]
    scale: Tensor  # [N, groups of a row]
    zero: Tensor | None = None  # as scale, integers; None: all are 0

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def layout(self) -> tuple:
        """What matrices have in common that one launch reads."""
        return self.codes.dtype, self.scale.dtype, self.group, self.zero is None

    def numbers(self) -> Tensor:
        """The matrix in float32."""
        codes, scale = self.codes.float(), self.scale.float().repeat_interleave(self.group, 1)
        if self.zero is None:
            return codes * scale
        return (codes - self.zero.repeat_interleave(self.group, 1)) * scale


# By the name of torchao's class.
FORMATS = {
    "Int8Tensor": lambda w: Quantised(w.qdata, w.scale, getattr(w, "zero_point", None)),
    "Float8Tensor": lambda w: Quantised(w.qdata, w.scale),
}


def read(weight: Tensor) -> Quantised | None:
    """What torchao's tensor of a weight `[N, K]` holds; None: it is of no known format."""
    kind = type(weight)
    made = FORMATS.get(kind.__name__) if kind.__module__.partition(".")[0] == "torchao" else None
    if made is None or any(getattr(weight, name, None) is not None for name in OF_ACTIVATIONS):
        return None
    codes, scale, zero = made(weight)
    if codes.ndim != 2 or scale.ndim != 2 or codes.dtype not in CODES or not codes.is_contiguous():
        return None
    if scale.shape[1] == 1:  # of rows torchao's own product reads no zeros: they are none
        return Quantised(codes, scale.expand(len(codes), 1))
    matrix = Quantised(codes, scale, zero)
    return matrix if len(scale) == len(codes) and matrix.group in GROUPS else None
