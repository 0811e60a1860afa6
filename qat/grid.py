"""The only Python that rounds: how a float becomes a code, and back.

    code = clamp(round_half_even(x / scale) + zero_point, lo, hi)        x^ = (code - zero_point) * scale

Arithmetic is float32 whatever comes in and whatever the autocast. Codes are signed: [-2^(b-1), 2^(b-1)-1], so [-8, 7]
at 4 bits. A stored scale is rounded to bfloat16 inside [2^-17, 65280]; each such value is exact in float16 too, so
one result fills every file format bit for bit. Gradients, observers and byte packing are elsewhere.

Letters: N rows, K row length, G groups per row, S group size. A tensor [..., N, K] is seen as [..., N, G, S].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.scheme import QuantSpec

SCALE_MIN = 2.0**-17
SCALE_MAX = 65280.0  # the largest bfloat16 that float16 holds too
DYNAMIC_SCALE_MIN = 2.0**-100  # a dynamic scale is never stored; only a division by zero has to be avoided
# Rows are worked on in blocks that stay in a core's L2 cache: one pass over memory instead of one per operation.
CPU_BLOCK = 1 << 17


class QParams(NamedTuple):
    """`scale` float32 (tensor units per code) and `zero_point` int32 (a code), both shaped like the groups."""

    scale: Tensor
    zero_point: Tensor


def code_range(spec: QuantSpec) -> tuple[int, int]:
    """Lowest and highest code, inclusive."""
    return -(1 << (spec.bits - 1)), (1 << (spec.bits - 1)) - 1


def group_view(x: Tensor, spec: QuantSpec) -> Tensor:
    """[..., K] seen as [..., G, S]; S = K unless the granularity is `group`."""
    size = spec.group_size or x.shape[-1]
    return x.unflatten(-1, (x.shape[-1] // size, size)) if x.shape[-1] else x.unsqueeze(-2)


def min_max(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Extremes of every group of x [..., K], float32, shaped like the scale ([..., G]; all ones for `tensor`)."""
    if spec.granularity == "tensor":
        low, high = torch.aminmax(x.detach())
        ones = (1,) * x.dim()
        return low.float().view(ones), high.float().view(ones)
    low, high = torch.aminmax(group_view(x.detach(), spec), dim=-1)
    return low.float(), high.float()


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The nearest storable scale [..., G], as float32. A dynamic activation scale stays unrounded."""
    if spec.scale_dtype == "float32":
        return scale.float().clamp(min=DYNAMIC_SCALE_MIN)
    return scale.float().clamp(SCALE_MIN, SCALE_MAX).bfloat16().float()


def round_zero_point(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The nearest code that may stand for zero [..., G], int32, inside the code range."""
    low, high = code_range(spec)
    return torch.round(zero_point).clamp(low, high).to(torch.int32)


def choose_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """Place [low, high] on the grid of `spec`.

    Args:
        low, high: [..., G] extremes per group, in tensor units; the range is widened to hold 0.
    Returns:
        QParams: scale [..., G] already rounded to what is stored, zero_point [..., G] int32.
    Guarantees: 0.0 is a code exactly; an all-zero group has a finite positive scale.
    Symmetric weights divide the largest magnitude by half the range (7.5 at 4 bits, as compressed-tensors does),
    symmetric activations by the highest code (127, as vLLM, SGLang and llama.cpp do).
    Source: Jacob et al. 2018, arXiv:1712.05877, sec. 2.1.
    """
    code_low, code_high = code_range(spec)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if spec.symmetric:
        divisor = float(code_high) if spec.is_activation else (code_high - code_low) / 2
        scale = round_scale(torch.maximum(-low, high) / divisor, spec)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32))
    scale = round_scale((high - low) / (code_high - code_low), spec)
    return QParams(scale, round_zero_point(code_low - low / scale, spec))


def blocks(x: Tensor) -> int:
    """Rows of x [R, ...] worked on at a time: a cache block on a CPU, all at once elsewhere."""
    if x.device.type != "cpu":
        return max(1, x.shape[0])
    return max(1, CPU_BLOCK // max(1, x[0].numel())) if x.shape[0] else 1


def rows(x: Tensor, qparams: QParams, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """x as [R, G, S] with scale and zero point as float32 [R or 1, G, 1], ready to broadcast."""
    grouped = group_view(x, spec).flatten(0, -3) if x.dim() > 1 else group_view(x, spec).unsqueeze(0)
    scale, zero_point = (q.reshape(-1, q.shape[-1], 1).float() for q in qparams)
    return grouped, scale, zero_point


def row_block(q: Tensor, start: int, stop: int) -> Tensor:
    """Rows start..stop of a per-row quantity [R, G, 1], or the one row that all share."""
    return q if q.shape[0] == 1 else q[start:stop]


def codes_(scaled: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """The rounding itself, in place on x / scale [R, G, S] float32: round half to even, shift, clamp."""
    low, high = code_range(spec)
    scaled.round_()
    if zero_point is not None:
        scaled.add_(zero_point)
    return scaled.clamp_(low, high)


def is_inside(scaled: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Where the clamp of `codes_` changes nothing, for x / scale [R, G, S]; a tie counts as what it is rounded to."""
    low, high = code_range(spec)
    rounded = torch.round(scaled)
    if zero_point is None:
        return (rounded >= low) & (rounded <= high)
    return (rounded >= low - zero_point) & (rounded <= high - zero_point)


def quantize(x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """int8 codes of x [..., K], same shape."""
    grouped, scale, zero_point = rows(x.detach(), qparams, spec)
    out = torch.empty(grouped.shape, dtype=torch.int8, device=x.device)
    step = blocks(grouped)
    for start in range(0, grouped.shape[0], step):
        stop = start + step
        scaled = grouped[start:stop].float() / row_block(scale, start, stop)
        shift = None if spec.symmetric else row_block(zero_point, start, stop)
        out[start:stop] = codes_(scaled, shift, spec)
    return out.view(x.shape)


def dequantize(codes: Tensor, qparams: QParams, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """(codes - zero_point) * scale in float32, then `dtype`; codes [..., K] int8."""
    grouped, scale, zero_point = rows(codes, qparams, spec)
    out = torch.empty(grouped.shape, dtype=dtype, device=codes.device)
    step = blocks(grouped)
    for start in range(0, grouped.shape[0], step):
        stop = start + step
        value = grouped[start:stop].float()
        if not spec.symmetric:
            value -= row_block(zero_point, start, stop)
        out[start:stop] = value.mul_(row_block(scale, start, stop))
    return out.view(codes.shape)


def fake_quantize(x: Tensor, qparams: QParams, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """`dequantize(quantize(x))` of x [..., K] in one pass over memory; the same bits by construction and by test."""
    grouped, scale, zero_point = rows(x.detach(), qparams, spec)
    out = torch.empty(grouped.shape, dtype=dtype, device=x.device)
    step = blocks(grouped)
    for start in range(0, grouped.shape[0], step):
        stop = start + step
        block_scale = row_block(scale, start, stop)
        shift = None if spec.symmetric else row_block(zero_point, start, stop)
        value = codes_(grouped[start:stop].float() / block_scale, shift, spec)
        if shift is not None:
            value.sub_(shift)
        out[start:stop] = value.mul_(block_scale)
    return out.view(x.shape)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Codes uint8 [N, K]: which entry of its row's table [N, C], in rising order, each x [N, K] is nearest to.

    Codes of a table count from 0; half way between two entries belongs to the lower one.
    """
    middles = (table[:, 1:].float() + table[:, :-1].float()) / 2
    return torch.searchsorted(middles.contiguous(), x.detach().float().contiguous()).to(torch.uint8)


def look_up(codes: Tensor, table: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The entries of table [N, C] that codes [N, K] name, as `dtype`."""
    return table.gather(1, codes.long()).to(dtype)
