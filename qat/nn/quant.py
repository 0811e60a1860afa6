"""Training layers: a float layer whose weight, and optionally input, pass through FakeQuantize.

Each takes over the float layer's Parameters (same objects, so ties and optimizers keep working) and has
`quantized_weights()`: parameter name -> (weight seen as [..., N, K], its FakeQuantize). Packed layers for serving are
in `packed.py`.

Letters: N out_features, K in_features, E experts, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat import grid
from qat.estimators import compute_dtype
from qat.fake_quant import FakeQuantize, whole
from qat.kernels.cpu import train as fused
from qat.kernels.reference import integer_matmul


class QuantLinear(nn.Linear):
    """y = fq(x) fq(W)^T + b for x [..., K], W [N, K]."""

    def __init__(self, linear: nn.Linear, weight_fq: FakeQuantize, input_fq: FakeQuantize | None):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_fake_quant, self.input_fake_quant = weight_fq, input_fq

    def fake_weight(self) -> Tensor:
        """fq(W) [N, K] in the dtype of the matmul."""
        return self.weight_fake_quant(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return _fake_linear(self, input, self.weight)

    def quantized_weights(self) -> dict[str, tuple[Tensor, FakeQuantize]]:
        """The weight [N, K] and its grid."""
        return {"weight": (self.weight, self.weight_fake_quant)}


class QuantConv1D(nn.Module):
    """GPT-2's Conv1D: the same as QuantLinear with the weight stored [K, N]."""

    def __init__(self, conv: Any, weight_fq: FakeQuantize, input_fq: FakeQuantize | None):
        super().__init__()
        self.weight: nn.Parameter = conv.weight
        self.bias: nn.Parameter = conv.bias
        self.weight_fake_quant, self.input_fake_quant = weight_fq, input_fq

    def forward(self, x: Tensor) -> Tensor:
        return _fake_linear(self, x, self.weight.t().contiguous())

    def quantized_weights(self) -> dict[str, tuple[Tensor, FakeQuantize]]:
        """The weight seen as [N, K] and its grid."""
        return {"weight": (self.weight.t().contiguous(), self.weight_fake_quant)}


def _fake_linear(layer: QuantLinear | QuantConv1D, x: Tensor, weight_NK: Tensor) -> Tensor:
    """fq(x) fq(W)^T + b for x [..., K]: [..., N].

    A layer with quantized inputs multiplies the integers that it will be served with: always on a CPU with the C++
    kernels, elsewhere when evaluated without gradients.
    """
    weight_fq, input_fq = layer.weight_fake_quant, layer.input_fake_quant
    if input_fq is None:
        return F.linear(x, weight_fq(weight_NK), layer.bias)
    specs, dtype = (weight_fq.current_spec, input_fq.current_spec), compute_dtype(x)
    is_quantizing = input_fq.now.quantizing and weight_fq.now.quantizing
    is_plain = not (input_fq.now.observing or weight_fq.now.observing or weight_fq.now.codes_frozen)
    if is_quantizing and is_plain and fused.linear_refuses(x, weight_NK, *specs, dtype) is None:
        raw, there = weight_fq.on_grid(weight_NK, None)
        y = fused.integer_linear(x, weight_NK, raw, there, specs, (weight_fq.gradients, dtype))
        return y if layer.bias is None else y + layer.bias.to(y.dtype)
    if layer.training or torch.is_grad_enabled() or not is_quantizing:
        return F.linear(input_fq(x), weight_fq(weight_NK), layer.bias)
    flat, spec = x.reshape(-1, x.shape[-1]), weight_fq.current_spec
    inputs = input_fq.codes(flat), input_fq.qparams(flat)
    codes = weight_fq.codes(weight_NK), weight_fq.qparams(weight_NK)
    is_fused = fused.product_refuses(inputs[1], *codes) is None
    y = (fused.integer_product if is_fused else integer_matmul)(*inputs, *codes, spec).to(x.dtype).to(dtype)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class QuantEmbedding(nn.Embedding):
    """Rows of fq(W), W [vocabulary, K]; only the rows looked up are computed when each row has its own scale."""

    def __init__(self, embedding: nn.Embedding, weight_fq: FakeQuantize):
        super().__init__(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            device="meta",
        )
        self.weight = embedding.weight
        self.weight_fake_quant = weight_fq

    def forward(self, input: Tensor) -> Tensor:
        fake_quant, dtype = self.weight_fake_quant, self.weight.dtype
        if fake_quant.spec.granularity == "tensor" or fake_quant.is_stored:
            return F.embedding(input, fake_quant(self.weight, dtype), self.padding_idx)
        return fake_quant(F.embedding(input, self.weight, self.padding_idx), dtype)

    def quantized_weights(self) -> dict[str, tuple[Tensor, FakeQuantize]]:
        """The table [vocabulary, K] and its grid."""
        return {"weight": (self.weight, self.weight_fake_quant)}


class FakeQuantizedParameter(nn.Module):
    """Parametrization of a 3-D expert weight: [E, N, K], or [E, K, N] when `transposed`."""

    def __init__(self, weight_fq: FakeQuantize, transposed: bool):
        super().__init__()
        self.weight_fake_quant, self.transposed = weight_fq, transposed

    def forward(self, x: Tensor) -> Tensor:
        if self.transposed:
            return self.weight_fake_quant(x.transpose(-1, -2).contiguous()).transpose(-1, -2)
        return self.weight_fake_quant(x)

    def as_ENK(self, x: Tensor) -> Tensor:
        """The weight seen as [E, N, K]."""
        return x.transpose(-1, -2).contiguous() if self.transposed else x


def quantize_experts(module: nn.Module, name: str, weight_fq: FakeQuantize, transposed: bool) -> None:
    """Put fake quantization on the 3-D Parameter `name` of an expert module; computed once per forward pass."""
    if not parametrize.is_parametrized(module):
        module.register_forward_pre_hook(_enter_cache)
        module.register_forward_hook(_leave_cache, always_call=True)
    parametrize.register_parametrization(module, name, FakeQuantizedParameter(weight_fq, transposed), unsafe=True)


def _enter_cache(module: nn.Module, _args: Any) -> None:
    context = parametrize.cached()
    context.__enter__()
    module.__dict__.setdefault("_parametrize_contexts", []).append(context)


def _leave_cache(module: nn.Module, _args: Any, _output: Any) -> None:
    module.__dict__["_parametrize_contexts"].pop().__exit__(None, None, None)


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, FakeQuantize]]:
    """Every quantized weight of a training model once: (full parameter name, weight as [..., N, K], FakeQuantize).

    A tied matrix appears under its first name only.
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantConv1D, QuantEmbedding)):
            if id(module.weight_fake_quant) in seen:
                continue
            seen.add(id(module.weight_fake_quant))
            for name, (weight, fake_quant) in module.quantized_weights().items():
                yield f"{module_name}.{name}", whole(weight), fake_quant
        elif parametrize.is_parametrized(module):
            for name, parametrizations in module.parametrizations.items():
                quantized = parametrizations[0]
                if isinstance(quantized, FakeQuantizedParameter):
                    weight = quantized.as_ENK(whole(parametrizations.original))
                    yield f"{module_name}.{name}", weight, quantized.weight_fake_quant


def input_fake_quants(model: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """Every input FakeQuantize of a training model: (module name, FakeQuantize)."""
    for name, module in model.named_modules():
        input_fq = getattr(module, "input_fake_quant", None)
        if isinstance(input_fq, FakeQuantize):
            yield name, input_fq


@torch.no_grad()
def weight_health(weight: Tensor, fake_quant: FakeQuantize, max_rows: int = 64) -> dict[str, Any]:
    """SQNR (dB), clip share and the codes of the first `max_rows` rows of a weight [..., N, K]; cheap enough to log."""
    sample = weight.detach().flatten(0, -2)[:max_rows]
    qparams = fake_quant.qparams(weight)
    if fake_quant.spec.granularity != "tensor":
        qparams = grid.QParams(*(q.flatten(0, -2)[:max_rows] for q in qparams))
    spec = fake_quant.current_spec
    if fake_quant.now.codes_frozen:
        codes = fake_quant.codes(weight).flatten(0, -2)[:max_rows]
    else:
        codes = grid.quantize(sample, qparams, spec)
    error = grid.dequantize(codes, qparams, spec) - sample
    low, high = grid.code_range(spec)
    grouped, scale, zero = grid.rows(sample, qparams, spec)
    v = grouped / scale + zero
    clipped = ((v < low - 0.5) | (v > high + 0.5)).float().mean()
    sqnr = 10 * torch.log10(sample.square().sum() / error.square().sum().clamp(min=1e-30))
    return {"sqnr_db": float(sqnr), "clip_share": float(clipped), "codes": codes, "scale": qparams.scale.clone()}
