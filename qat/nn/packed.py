"""Serving layers: a PackedTensor, a bias and a chosen kernel. No gradients.

Module names equal those of the float model, so that the rest of a Hugging Face model is untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.estimators import compute_dtype
from qat.grid import QParams
from qat.kernels.dispatch import PREFERENCE, choose, matmul_op
from qat.packing import PackedTensor
from qat.scheme import QuantScheme


class PackedLinear(nn.Module):
    """y = x W^T + b for x [..., K] and a packed W [N, K]; serves Conv1D as well.

    Args:
        static: stored grid of the inputs for static schemes.
        dtype: what a dense kernel keeps its weight in.
    """

    def __init__(
        self,
        weight: PackedTensor,
        scheme: QuantScheme,
        bias: Tensor | None,
        static: QParams | None = None,
        backend: str = "as_trained",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.packed, self.scheme, self.static = weight, scheme, static
        op = matmul_op(weight, scheme.input is not None)
        self.choice = choose(op, weight, backend, scheme.input)
        self.state = self.choice.kernel.prepare(weight, dtype)
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [N, K] float32; some Hugging Face code asks a layer for its weight's dtype."""
        return self.packed.dequantize(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        rest = () if self.scheme.input is None else (self.scheme.input, self.static)
        y = self.choice.kernel.run(self.state, x, *rest).to(compute_dtype(x))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.scheme.name}, {tuple(self.packed.shape)}, kernel={self.choice.backend}"


class PackedEmbedding(nn.Module):
    """Rows of a packed table [vocabulary, K], float32."""

    def __init__(
        self,
        table: PackedTensor,
        padding_idx: int | None,
        backend: str = "as_trained",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.packed, self.padding_idx = table, padding_idx
        self.num_embeddings, self.embedding_dim = table.shape
        self.choice = choose("packed_embedding", table, backend if backend in PREFERENCE else "reference")
        self.state = self.choice.kernel.prepare(table, dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized table [vocabulary, K] float32."""
        return self.packed.dequantize(torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.choice.kernel.run(self.state, ids)


class DequantizedParameter(nn.Module):
    """Parametrization that serves a packed 3-D expert weight [E, N, K] in place of the float Parameter."""

    def __init__(self, weight: PackedTensor, transposed: bool):
        super().__init__()
        self.packed, self.transposed = weight, transposed

    def forward(self, placeholder: Tensor) -> Tensor:
        weight = self.packed.dequantize(compute_dtype(placeholder))
        return weight.transpose(-1, -2) if self.transposed else weight


def pack_experts(module: nn.Module, name: str, weight: PackedTensor, transposed: bool) -> None:
    """Serve expert weight `name` from packed bytes; an empty Parameter stands where the float one was."""
    setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
    parametrize.register_parametrization(module, name, DequantizedParameter(weight, transposed), unsafe=True)


def kernel_summary(model: nn.Module) -> dict[str, Any]:
    """Backends in use and why others were refused: {backend: layers}, {backend: reason}."""
    used: dict[str, int] = {}
    refused: dict[str, str] = {}
    for module in model.modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            used[module.choice.backend] = used.get(module.choice.backend, 0) + 1
            refused.update(module.choice.refused)
    return {"used": used, "refused": refused}
