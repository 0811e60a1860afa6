"""Training W + (alpha / r) B A with W held, so that the optimizer has r (N + K) values of a matrix, not N K.

    B [N, r] begins at 0, A [r, K] Gaussian; both are float32, and so is the sum

The sum is a parametrization of the layer's `weight`: whoever asks for the weight, fake quantization above all, gets the
sum, and it is computed in one place. `merge` writes that very tensor into W, so its codes are those of training.
Saved are Adam's two moments and the gradient of W; the sum itself lives from forward to backward, unless activations
are recomputed (trainer.gradient_checkpointing).
Source: LR-QAT (arXiv:2406.06385), which adds B A to W / scale and keeps W as integers; here the scale may move freely.

Letters: N out_features, K in_features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.fake_quant import FakeQuantize
from qat.nn.quant import QuantConv1D


class LowRank(nn.Module):
    """weight [N, K] -> weight + (alpha / r) B A, in float32."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        rows, columns = shape
        self.factor = alpha / rank
        self.b = nn.Parameter(torch.zeros(rows, rank))
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.b, self.a, alpha=self.factor)


def attach(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Give every linear layer a product B A, but not a head that is tied to the token table."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in list(model.modules()):
        if not (isinstance(module, (nn.Linear, QuantConv1D)) or type(module).__name__ == "Conv1D"):
            continue
        weight = module.weight
        if id(weight) not in tables:
            assert isinstance(weight, nn.Parameter)
            low_rank = LowRank((weight.shape[0], weight.shape[1]), rank, alpha, generator).to(weight.device)
            parametrize.register_parametrization(module, "weight", low_rank)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Write every sum into its weight and take the products off; the model is as it was built, its codes unchanged."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module, "weight"):
            continue
        parametrizations = module.parametrizations["weight"]  # type: ignore[index]
        if isinstance(parametrizations[0], LowRank):
            whole = module.weight.clone()  # type: ignore[operator]
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight.copy_(whole)  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.state_changed()
