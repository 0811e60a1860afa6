"""Every serving op in plain torch: the truth that each optimized kernel is tested against.

    wna16_matmul      float inputs, n-bit weights:   y = x (scale (codes - zero_point))^T
    wna8_matmul       int8 inputs, n-bit weights:    y = sum over groups of s_x s_w sum (c_x - z_x)(c_w - z_w)
    packed_embedding  rows of a packed table
    lm_head_top       the k largest logits, best first

The integer sums are exact: |c_x c_w| < 2^15, summed over at most 256 values in float32, then over pieces in float64.
Each is rounded to float32 once, and groups are added up with one fused multiply-add each, in order: the C++ kernels
give the same bits.
Letters: M input rows (tokens), K in_features, N out_features, G groups, S group size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qat import grid
from qat.grid import QParams
from qat.packing import PackedTensor
from qat.scheme import QuantSpec

INT8_ROWS = QuantSpec(8, True, "token", None, True, "float32", True)
EXACT_TERMS = 256  # 256 products below 2^15.01 (zero points included: 255 * 255) stay under float32's 2^24


def wna16_matmul(x: Tensor, weight: PackedTensor) -> Tensor:
    """x [..., K] times the packed weight [N, K], in x's dtype (autocast decides as for any matmul): [..., N]."""
    return F.linear(x, weight.dequantize(x.dtype))


def quantize_input(x: Tensor, spec: QuantSpec, static: QParams | None) -> tuple[Tensor, QParams]:
    """int8 codes of x [..., K] and their grid: the stored one, or one per token."""
    qparams = static if static is not None else grid.choose_qparams(*grid.min_max(x, spec), spec)
    return grid.quantize(x, qparams, spec), qparams


def wna8_matmul(x: Tensor, weight: PackedTensor, input_spec: QuantSpec, static: QParams | None) -> Tensor:
    """Integer matmul of quantized x [..., K] with the packed weight [N, K]: [..., N] in x's dtype.

    Args:
        static: stored input grid ([1] each), or None for one scale per token.
    """
    codes, qparams = quantize_input(x.reshape(-1, x.shape[-1]), input_spec, static)
    y_MN = integer_matmul(codes, qparams, weight.codes(), weight.qparams, weight.spec)
    return y_MN.to(x.dtype).view(*x.shape[:-1], y_MN.shape[-1])


def integer_matmul(x_codes: Tensor, x: QParams, w_codes: Tensor, w: QParams, w_spec: QuantSpec) -> Tensor:
    """Codes x [M, K] on the grid `x` (one scale per row, or one) times codes w [N, K] on `w`: [M, N] float32.

    Training layers evaluate with this too: a float matmul of the same numbers sums in another order, and one input code
    that flips on a tie changes every layer after it (1.4 % perplexity on SmolLM2-135M W8A8).
    """
    x_MK = x_codes.float() - x.zero_point.view(-1, 1)
    w_NK = w_codes.float()
    if not w_spec.symmetric:
        w_NK = (grid.group_view(w_NK, w_spec) - w.zero_point.float().unsqueeze(-1)).flatten(-2)
    groups = w.scale.shape[-1]
    size = w_NK.shape[-1] // groups
    y_MN = torch.zeros(x_MK.shape[0], w_NK.shape[0], device=x_codes.device)
    with torch.autocast(x_codes.device.type, enabled=False):  # a bfloat16 result would round the sums
        for g in range(groups):
            total = torch.zeros_like(y_MN, dtype=torch.float64)
            for start in range(g * size, (g + 1) * size, EXACT_TERMS):
                stop = min(start + EXACT_TERMS, (g + 1) * size)
                total += x_MK[:, start:stop] @ w_NK[:, start:stop].t()
            y_MN = fused_multiply_add(total.float(), w.scale[..., g].reshape(1, -1), y_MN)
    return y_MN * x.scale.view(-1, 1)


# by the names of the optimized ops: what differs there is how the codes are stored
w4a16_matmul = w8a16_matmul = wna16_matmul
w4a8_matmul = w8a8_matmul = wna8_matmul


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c of float32 tensors [...] that broadcast, rounded once, to float32.

    The product is exact in float64. Where its sum with c was itself rounded to the middle between two float32 values,
    the part lost there decides the direction. No result is
    below the normal range of float32: scales are 2^-17 or more.
    """
    product = a.double() * b.double()
    total = product + c.double()
    is_middle = (total.view(torch.int64) & 0x1FFFFFFF) == 0x10000000
    if is_middle.any():
        back = total - product
        lost = (product - (total - back)) + (c - back)
        # one step of float64 is enough to leave the middle
        away = torch.nextafter(total, torch.full_like(total, torch.inf).copysign(lost))
        total = torch.where(is_middle & (lost != 0), away, total)
    return total.float()


def packed_embedding(ids: Tensor, table: PackedTensor) -> Tensor:
    """Rows `ids` [...] of the packed table [vocabulary, K]: [..., K] float32. Only those rows are unpacked."""
    flat = ids.reshape(-1)
    scale, zero_point = table.scale, table.zero_point
    if table.spec.granularity != "tensor":
        scale = scale[flat]
        zero_point = None if zero_point is None else zero_point[flat]
    picked = PackedTensor(table.packed[flat], scale, zero_point, table.spec, (flat.numel(), table.shape[-1]))
    return picked.dequantize(torch.float32).view(*ids.shape, table.shape[-1])


def lm_head_top(hidden: Tensor, head: PackedTensor, k: int, input_spec: QuantSpec | None) -> tuple[Tensor, Tensor]:
    """The k largest of hidden [M, K] times the packed head [V, K], and their tokens: [M, k] float32 and int64.

    The largest comes first, the lower token first among equals. A NaN is never among them: a row of NaN gives -infinity
    and -1.

    Args:
        input_spec: int8 grid of the inputs, one scale per token; None for float inputs.
    """
    hidden = hidden.float()
    logits = wna16_matmul(hidden, head) if input_spec is None else wna8_matmul(hidden, head, input_spec, None)
    numbers = torch.where(logits.isnan(), -torch.inf, logits)
    values, tokens = (part[:, :k] for part in numbers.sort(dim=-1, descending=True, stable=True))
    return values, torch.where(logits.gather(-1, tokens).isnan(), -1, tokens)


def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """int8 codes [M, K] and scale [M, 1] per row of x [M, K] float32 / rms(x) * weight [K]."""
    normed = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
    codes, qparams = quantize_input(normed, INT8_ROWS, None)
    return codes, qparams.scale


def silu_mul_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [M, K] and scale [M, 1] per row of silu(gate) * up, both [M, K] float32."""
    codes, qparams = quantize_input(F.silu(gate) * up, INT8_ROWS, None)
    return codes, qparams.scale


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, is_int8: bool) -> Tensor:
    """Attention of one token's query q [M, H, D] over keys and values [M, KV, T, D], which the cache holds as int8 with
    a scale per position, or as bfloat16: [M, H, D] float32. Rotation is `rotate`."""
    heads_per_kv = q.shape[1] // keys.shape[1]
    if is_int8:
        keys, values = (grid.dequantize(*quantize_input(t, INT8_ROWS, None), INT8_ROWS) for t in (keys, values))
    else:
        keys, values = keys.bfloat16().float(), values.bfloat16().float()
    keys, values = (t.repeat_interleave(heads_per_kv, 1) for t in (keys, values))
    scores = (keys @ q.unsqueeze(-1)).squeeze(-1) / q.shape[-1] ** 0.5
    return (scores.softmax(-1).unsqueeze(-2) @ values).squeeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., D]: halves (a, b) become (a cos - b sin, b cos + a sin); cos, sin [..., D / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
