"""Training on the C++ kernels: fake quantization in one pass over memory, and linear layers on the integer product.

    fake_quantize    what estimators.fake_quantize computes, forward and backward, the same codes and scales bit for bit
    integer_linear   the arithmetic that a layer with int8 inputs is served with, and straight-through gradients:
                     dx = dy fq(W),  dfq(W) = dy^T fq(x)  with fq(x) kept as int8 codes, half the memory of bfloat16

The gradient of an input on a dynamic symmetric grid passes whole: its largest value is the highest code, so nothing is
clipped. A NaN or an infinity in a token makes that token's outputs NaN; a NaN in a weight, those of its row.
`refuses` and `linear_refuses` say what does not run here; callers then use the plain torch code.

Letters: M tokens, N out_features, K in_features, R rows of any tensor, G groups per row.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qat import grid
from qat.grid import QParams
from qat.kernels import cpu
from qat.scheme import QuantSpec

DTYPES = (torch.float32, torch.bfloat16)
WORD = 4  # inputs multiplied by one instruction; a group has to be a multiple
TERMS = 65536  # of one group: 255 * 127 each, so their int32 sum cannot overflow


@dataclass(frozen=True)
class OnGrid:
    """A tensor on its grid, seen as rows: rounded `scale` float32 and `zero_point` int32 (empty when symmetric), both
    [R or 1, G]; `values` [R, K] and int8 `codes` [R, K] where asked for, else empty."""

    values: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class Gradients:
    """Which gradients flow through the rounding of a weight (see estimators.Estimator)."""

    clipped: bool
    scale: bool
    zero_point: bool


@cache
def unavailable() -> str | None:
    """None when the training ops are there, else the reason why not."""
    reason = cpu.unavailable()
    if reason is not None:
        return reason
    torch.library.register_fake("qat::grid_quantize", _grid_quantize_shapes)
    torch.library.register_fake("qat::grid_gradient", _grid_gradient_shapes)
    torch.library.register_fake("qat::grid_dequantize", _grid_dequantize_shape)
    torch.library.register_fake("qat::integer_linear", _integer_linear_shape)
    return None


def refuses(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why x [..., K] cannot be fake-quantized to `dtype` here, or None."""
    if x.device.type != "cpu" or type(x) not in (Tensor, nn.Parameter):
        return "needs a plain CPU tensor"
    if x.dtype not in DTYPES or dtype not in DTYPES:
        return f"needs float32 or bfloat16, got {x.dtype} to {dtype}"
    if x.dim() < 2 or x.numel() == 0:
        return "needs at least two dimensions and one value"
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain code itself"
    return unavailable()


def linear_refuses(x: Tensor, weight: Tensor, spec: QuantSpec, input_spec: QuantSpec, dtype: torch.dtype) -> str | None:
    """Why x [..., K] times weight [N, K] cannot run on the integer product, or None."""
    if not (input_spec.symmetric and input_spec.granularity == "token" and input_spec.bits == 8):
        return f"inputs must be int8 sym token, got {input_spec.describe()}"
    size = weight.shape[-1] // spec.groups(weight.shape[-1])
    if weight.dim() != 2 or size % WORD or size > TERMS:
        return f"needs a matrix with groups of a multiple of {WORD} and at most {TERMS} inputs, got {size}"
    return refuses(x, dtype) or refuses(weight, dtype)


def product_refuses(x: QParams, w_codes: Tensor, w: QParams) -> str | None:
    """Why `integer_product` cannot multiply inputs on the grid `x` with codes [N, K] on `w`, or None."""
    if x.zero_point.any():
        return "inputs must have no zero points"
    size = w_codes.shape[-1] // w.scale.shape[-1]
    if size % WORD or size > TERMS or w_codes.device.type != "cpu":
        return f"needs groups of a multiple of {WORD} and at most {TERMS} inputs on a CPU, got {size}"
    return unavailable()


def integer_product(x_codes: Tensor, x: QParams, w_codes: Tensor, w: QParams, w_spec: QuantSpec) -> Tensor:
    """What reference.integer_matmul computes, the same bits: [M, N] float32 of codes x [M, K] and w [N, K]."""
    groups, rows = w.scale.shape[-1], x_codes.shape[0]
    sums = x_codes.view(rows, groups, -1).sum(-1, dtype=torch.int32)
    x_scale = x.scale.float().reshape(-1, 1).expand(rows, 1).contiguous()
    scale, zero_point = _rows_of(w, w_spec)
    return torch.ops.qat.integer_linear(
        x_codes.contiguous(), sums, x_scale, w_codes.contiguous(), scale, zero_point, w_spec.bits, False
    )


def on_grid(x: Tensor, qparams: QParams | None, spec: QuantSpec, dtype: torch.dtype | None, codes: bool) -> OnGrid:
    """x [..., K] on the grid `qparams` (already rounded) or its own; values as `dtype`, if given."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    if qparams is None and spec.granularity == "tensor":
        qparams = grid.choose_qparams(*grid.min_max(x, spec), spec)
    kind = 0 if dtype is None else 1 + DTYPES.index(dtype)
    values, own_codes, _, scale, zero_point = _quantize(rows, qparams, spec, kind, codes, 0)
    if qparams is not None:
        scale, zero_point = _rows_of(qparams, spec)
    return OnGrid(values, own_codes, scale, zero_point)


def fake_quantize(x: Tensor, raw: QParams | None, there: OnGrid, spec: QuantSpec, gradients: Gradients) -> Tensor:
    """`there.values` as a function of x [..., K], and of the raw learned scale and zero point where they are given."""
    scale, zero_point = (None, None) if raw is None else raw
    return _FakeQuantize.apply(x, scale, zero_point, there, spec, gradients)


def integer_linear(
    x: Tensor, weight: Tensor, raw: QParams | None, there: OnGrid, specs: tuple[QuantSpec, QuantSpec], rest: Any
) -> Tensor:
    """y [..., N] of x [..., K] rounded per token and weight [N, K] as the codes `there`.

    Args:
        specs: of the weight and of the inputs.
        rest: (Gradients of the weight, dtype of the result and of the backward matmuls).
    """
    scale, zero_point = (None, None) if raw is None else raw
    inputs = _last_inputs.rounded(x, specs[1], weight.shape[-1] // there.scale.shape[-1])
    return _IntegerLinear.apply(x, weight, scale, zero_point, inputs, there, specs[0], *rest)


class _LastInputs:
    """The rounding of the tensor that a layer read last: q, k and v read one tensor, gate and up another."""

    def __init__(self) -> None:
        self.of: weakref.ref[Tensor] | None = None
        self.key: Any = None
        self.made: tuple[Tensor, ...] = ()

    def rounded(self, x: Tensor, spec: QuantSpec, size: int) -> tuple[Tensor, ...]:
        """Codes [M, K] of x [..., K] rounded per token, their sums over groups of `size` [M, G], and scales [M, 1]."""
        key = (None if x.is_inference() else x._version, spec, size)
        if self.of is None or self.of() is not x or self.key != key or key[0] is None:
            rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
            _, codes, sums, scale, _ = _quantize(rows, None, spec, 0, True, size)
            self.of, self.key, self.made = weakref.ref(x, self._forget), key, (codes, sums, scale)
        return self.made

    def _forget(self, of: Any) -> None:
        if of is self.of:
            self.of, self.made = None, ()


_last_inputs = _LastInputs()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, there, spec, gradients):
        ctx.save_for_backward(x, there.scale, there.zero_point)
        ctx.spec, ctx.gradients = spec, gradients
        ctx.shapes = _shape(scale), _shape(zero_point)
        # a view of its own: kept values may be returned again, and each result belongs to one graph
        return there.values.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        return *_gradients(grad, x, scale, zero_point, ctx), None, None, None


class _IntegerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, zero_point, inputs, there, spec, gradients, dtype):
        codes, sums, token_scale = inputs
        # rounded to the dtype of x first, as a served layer does
        narrow = torch.bfloat16 in (x.dtype, dtype)
        y = torch.ops.qat.integer_linear(
            codes, sums, token_scale, there.codes, there.scale, there.zero_point, spec.bits, narrow
        )
        ctx.save_for_backward(codes, token_scale, weight, there.codes, there.scale, there.zero_point)
        ctx.spec, ctx.gradients, ctx.dtype, ctx.x = spec, gradients, dtype, (x.shape, x.dtype)
        ctx.shapes = _shape(scale), _shape(zero_point)
        return y.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        codes, token_scale, weight, weight_codes, scale, zero_point = ctx.saved_tensors
        narrow = ctx.dtype == torch.bfloat16
        grad_MN = grad.reshape(-1, weight.shape[0]).to(ctx.dtype)
        dx: Tensor | None = None
        rest: tuple[Tensor | None, ...] = (None, None, None)
        if ctx.needs_input_grad[0]:
            size = weight.shape[-1] // scale.shape[-1]
            fake_NK = torch.ops.qat.grid_dequantize(weight_codes, scale, zero_point, size, narrow)
            shape, dtype = ctx.x
            dx = (grad_MN @ fake_NK).to(dtype).view(shape)
        if any(ctx.needs_input_grad[1:4]):
            no_zero = zero_point.new_empty(0, 0)
            fake_MK = torch.ops.qat.grid_dequantize(codes, token_scale, no_zero, codes.shape[1], narrow)
            rest = _gradients(grad_MN.t() @ fake_MK, weight, scale, zero_point, ctx)
        return dx, *rest, None, None, None, None, None


def _gradients(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, ctx: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x and of the raw scale and zero point, as the estimator in `ctx` lets them flow."""
    flow: Gradients = ctx.gradients
    if not flow.clipped:
        return grad.to(x.dtype), None, None
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    grad_rows = grad.reshape(rows.shape).contiguous()
    if grad_rows.dtype not in DTYPES:
        grad_rows = grad_rows.float()
    size = rows.shape[-1] // scale.shape[-1]
    dx, dscale, dzero = torch.ops.qat.grid_gradient(
        grad_rows, rows, scale, zero_point, ctx.spec.bits, size, flow.scale, flow.zero_point
    )
    scale_shape, zero_shape = ctx.shapes
    return dx.view(x.shape), _reduce(dscale, scale_shape), _reduce(dzero, zero_shape)


def _reduce(per_group: Tensor, shape: torch.Size | None) -> Tensor | None:
    """Sums per row and group [R, G] summed down to the scale's own shape; None where nothing is learned."""
    if shape is None or per_group.numel() == 0:
        return None
    return per_group.view(shape) if per_group.numel() == shape.numel() else per_group.sum().view(shape)


def _quantize(rows: Tensor, qparams: QParams | None, spec: QuantSpec, kind: int, codes: bool, sum_group: int) -> Any:
    low, high = grid.code_range(spec)
    divisor = float(high) if spec.symmetric and spec.is_activation else (high - low) / (2 if spec.symmetric else 1)
    none = QParams(rows.new_empty(0, 0, dtype=torch.float32), rows.new_empty(0, 0, dtype=torch.int32))
    scale, zero_point = none if qparams is None else _rows_of(qparams, spec)
    size, stored = spec.group_size or rows.shape[1], spec.scale_dtype == "bfloat16"
    return torch.ops.qat.grid_quantize(
        rows, scale, zero_point, spec.bits, spec.symmetric, size, divisor, stored, kind, codes, sum_group
    )


def _rows_of(qparams: QParams, spec: QuantSpec) -> QParams:
    """Scale and zero point as the ops take them, [R or 1, G]; an empty zero point when symmetric."""
    groups = qparams.scale.shape[-1]
    scale = qparams.scale.detach().reshape(-1, groups).float().contiguous()
    if spec.symmetric:
        return QParams(scale, scale.new_empty(0, groups, dtype=torch.int32))
    return QParams(scale, qparams.zero_point.detach().reshape(-1, groups).to(torch.int32).contiguous())


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _grid_quantize_shapes(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool, group: int, *rest: Any
) -> tuple[Tensor, ...]:
    _, _, values, want_codes, sum_group = rest
    (rows, k), groups, own = x.shape, x.shape[1] // group, scale.numel() == 0
    return (
        x.new_empty(rows if values else 0, k, dtype=torch.bfloat16 if values == 2 else torch.float32),
        x.new_empty(rows if want_codes else 0, k, dtype=torch.int8),
        x.new_empty(rows if sum_group else 0, k // sum_group if sum_group else 0, dtype=torch.int32),
        x.new_empty(rows if own else 0, groups, dtype=torch.float32),
        x.new_empty(rows if own and not symmetric else 0, groups, dtype=torch.int32),
    )


def _grid_gradient_shapes(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group: int, learns: bool, learns_zero: bool
) -> tuple[Tensor, ...]:
    rows, groups = x.shape[0], x.shape[1] // group
    dscale = x.new_empty(rows if learns else 0, groups, dtype=torch.float32)
    return torch.empty_like(x), dscale, x.new_empty(rows if learns_zero else 0, groups, dtype=torch.float32)


def _grid_dequantize_shape(codes: Tensor, scale: Tensor, zero_point: Tensor, group: int, bfloat16: bool) -> Tensor:
    return torch.empty_like(codes, dtype=torch.bfloat16 if bfloat16 else torch.float32)


def _integer_linear_shape(x: Tensor, sums: Tensor, x_scale: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16 if rest[-1] else torch.float32)
