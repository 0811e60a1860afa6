"""Range search: shrink each group's [min, max] step by step and keep what loses least.

Least is either sum |x^ - x|^2.4 over the group, as in `observers/mse.py`, or, with the inputs' Gram matrix, the squared
error of the group's share of the layer's output: e^T H e for the rounding error e of one row and group.

Letters: N rows, K row length, G groups per row, S group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat import grid
from qat.grid import QParams
from qat.observers.mse import NORM, SHRINKS
from qat.scheme import QuantSpec


def from_extremes(weight: Tensor, spec: QuantSpec) -> QParams:
    """The grid that holds every value of weight [N, K]: scale and zero point [N, G]."""
    return grid.choose_qparams(*grid.min_max(weight, spec), spec)


def search(weight: Tensor, spec: QuantSpec, gram: Tensor | None = None) -> QParams:
    """The best of `SHRINKS` for each group of weight [N, K]: scale and zero point [N, G] ([1, 1] for `tensor` grids).

    Args:
        gram: [K, K] Hessian of the layer's inputs; None takes the weight's own error.
    """
    low, high = grid.min_max(weight, spec)
    least = torch.full_like(low, torch.inf)
    best = QParams(torch.empty_like(low), torch.empty_like(low, dtype=torch.int32))
    blocks = None if gram is None else diagonal_blocks(gram, spec)
    for shrink in SHRINKS:
        qparams = grid.choose_qparams(low * shrink, high * shrink, spec)
        error = grid.fake_quantize(weight, qparams, spec, torch.float32).sub_(weight)
        loss = group_loss(error, blocks, spec)
        if spec.granularity == "tensor":
            loss = loss.sum().view(low.shape)
        better = loss < least
        least = torch.where(better, loss, least)
        best = QParams(*(torch.where(better, new, old) for new, old in zip(qparams, best, strict=True)))
    return best


def diagonal_blocks(gram: Tensor, spec: QuantSpec) -> Tensor:
    """The part [G, S, S] of a Gram matrix [K, K] that couples columns of one group."""
    size = spec.group_size or gram.shape[0]
    count = gram.shape[0] // size
    return gram.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def group_loss(error: Tensor, blocks: Tensor | None, spec: QuantSpec) -> Tensor:
    """What the rounding error [N, K] costs in each row and group: [N, G]."""
    grouped = grid.group_view(error, spec)
    if blocks is None:
        return grouped.abs().pow(NORM).sum(-1)
    by_group = grouped.transpose(0, 1)  # [G, N, S]
    return ((by_group @ blocks) * by_group).sum(-1).t()
