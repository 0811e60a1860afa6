"""Straight-through and learned-step gradients of fake quantization. Forward is `grid.py`; nothing here rounds.

With v = x / scale and code = clamp(round(v) + zero_point, lo, hi), m = 1 where the clamp did nothing:

    ste_clipped        dx = g * m                 (no gradient to weights outside the grid)
    ste_pass_through   dx = g
    lsq                dx = g * m,  dscale = sum over the group of g * (m ? round(v) - v : code - zero_point)
    lsq_plus           as lsq,      dzero_point = sum over the group of -g * scale * (1 - m)

Nothing but the inputs is saved for backward: masks are recomputed block by block, so a training step holds no more
memory than the bf16 copy of the weight that autocast would hold anyway.
Source: Bengio et al. arXiv:1308.3432; Esser et al. arXiv:1902.08153 (LSQ); Bhalgat et al. arXiv:2004.09576 (LSQ+).
The 1/sqrt(N * hi) factor of LSQ is left out: Adam cancels it, and scales have a learning rate of their own.

Letters: R rows, G groups per row, S group size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat import grid
from qat.grid import QParams
from qat.scheme import QuantSpec


@dataclass(frozen=True)
class Estimator:
    """Which gradients flow: clipped or not, to the scale, to the zero point."""

    clipped: bool
    learns_scale: bool = False
    learns_zero_point: bool = False


ESTIMATORS = {
    "ste_clipped": Estimator(clipped=True),
    "ste_pass_through": Estimator(clipped=False),
    "lsq": Estimator(clipped=True, learns_scale=True),
    "lsq_plus": Estimator(clipped=True, learns_scale=True, learns_zero_point=True),
}


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the matmul behind x [...] will run in: the autocast type when autocast is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, estimator: Estimator, dtype: torch.dtype
) -> Tensor:
    """x [..., K] moved onto the grid, same shape, as `dtype`; gradients as `estimator` says.

    `scale` and `zero_point` [..., G] may be raw learned parameters: they are rounded to storable values here, and the
    gradient passes straight through that rounding.
    """
    return _FakeQuantize.apply(x, scale, zero_point, spec, estimator, dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """What int8 codes [..., K] stand for, as `dtype`, with gradients to the raw `scale` and `zero_point` [..., G].

    dscale = sum over the group of g * (code - zero_point),  dzero_point = sum over the group of -g * scale
    """
    return _Dequantize.apply(codes, scale, zero_point, spec, dtype)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes, scale, zero_point, spec, dtype):
        qparams = QParams(grid.round_scale(scale, spec), grid.round_zero_point(zero_point, spec))
        ctx.save_for_backward(codes, *qparams)
        ctx.spec = spec
        return grid.dequantize(codes, qparams, spec, dtype)

    @staticmethod
    def backward(ctx, grad):
        codes, scale, zero_point = ctx.saved_tensors
        grouped, scale_rows, zero_rows = grid.rows(codes, QParams(scale, zero_point), ctx.spec)
        grad_rows = grad.reshape(grouped.shape)
        sums = torch.empty(2, *grouped.shape[:2], device=codes.device)
        step = grid.blocks(grouped)
        for start in range(0, grouped.shape[0], step):
            stop = start + step
            g = grad_rows[start:stop].float()
            sums[0, start:stop] = (g * (grouped[start:stop] - grid.row_block(zero_rows, start, stop))).sum(-1)
            sums[1, start:stop] = -(g * grid.row_block(scale_rows, start, stop)).sum(-1)
        dzero = _reduce(sums[1], scale.shape) if ctx.needs_input_grad[2] else None
        return None, _reduce(sums[0], scale.shape), dzero, None, None


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, spec, estimator, dtype):
        qparams = QParams(grid.round_scale(scale, spec), grid.round_zero_point(zero_point, spec))
        ctx.save_for_backward(x, *qparams)
        ctx.spec, ctx.estimator = spec, estimator
        return grid.fake_quantize(x, qparams, spec, dtype)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        spec, estimator = ctx.spec, ctx.estimator
        if not estimator.clipped:
            return grad.to(x.dtype), None, None, None, None, None
        dx, dscale, dzero = _clipped_gradients(grad, x, QParams(scale, zero_point), spec, estimator)
        return dx, dscale, dzero, None, None, None


def _clipped_gradients(
    grad: Tensor, x: Tensor, qparams: QParams, spec: QuantSpec, estimator: Estimator
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, scale and zero point; the latter two None where they are not learned."""
    grouped, scale, zero_point = grid.rows(x, qparams, spec)
    grad_rows = grad.reshape(grouped.shape)
    dx = torch.empty(grouped.shape, dtype=x.dtype, device=x.device)
    dscale = torch.empty(grouped.shape[:2], device=x.device) if estimator.learns_scale else None
    dzero = torch.empty(grouped.shape[:2], device=x.device) if estimator.learns_zero_point else None
    step = grid.blocks(grouped)
    for start in range(0, grouped.shape[0], step):
        stop = start + step
        g = grad_rows[start:stop]
        block_scale = grid.row_block(scale, start, stop)
        shift = None if spec.symmetric else grid.row_block(zero_point, start, stop)
        v = grouped[start:stop].float() / block_scale
        inside = grid.is_inside(v, shift, spec)
        torch.mul(g, inside, out=dx[start:stop]) if g.dtype == x.dtype else dx[start:stop].copy_(g).mul_(inside)
        if dscale is None:
            continue
        code = grid.codes_(v.clone(), shift, spec)
        if shift is not None:
            code.sub_(shift)
        code.sub_(v.mul_(inside))
        dscale[start:stop] = torch.mul(code, g).sum(-1)
        if dzero is not None:
            dzero[start:stop] = -(g * block_scale * ~inside).sum(-1)
    shape = qparams.scale.shape
    return dx.view(x.shape), _reduce(dscale, shape), _reduce(dzero, shape)


def _reduce(per_group: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Per-row-and-group sums [R, G] summed down to the scale's own shape (one value for per-tensor grids)."""
    if per_group is None:
        return None
    return per_group.view(shape) if per_group.numel() == shape.numel() else per_group.sum().view(shape)
