"""Observer: watches float tensors, answers QParams. Never quantizes for anyone but itself.

State is in buffers with their final shapes from construction: `low`, `high` shaped like the scale, `count` [1].
Subclasses say how one tensor's statistics join the state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from qat import grid, ranks
from qat.errors import UserError, problem
from qat.grid import QParams
from qat.scheme import QuantSpec


class Observer(nn.Module, ABC):
    """Keeps the range [low, high] of every group of what it has seen.

    Args:
        spec: the grid the range is for.
        scale_shape: [..., G], shape of the scale; all ones for per-tensor grids.
    """

    low: Tensor
    high: Tensor
    count: Tensor

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...]):
        super().__init__()
        self.spec = spec
        self.register_buffer("low", torch.zeros(scale_shape))
        self.register_buffer("high", torch.zeros(scale_shape))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor, together: bool = False) -> None:
        """Take x [..., K] into account; raises UserError when it holds NaN or infinity.

        With `together`, every process of the job shows its own part of a batch and all end with the same state.
        """
        low, high = self.range_of(x)
        if together:
            low, high = self.across(low, high)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            fix = "Look for a NaN in the weights or a diverging layer before it."
            raise UserError(problem("observer", "values must be finite", "NaN or infinity", fix), before_work=False)
        self.join(low.view(self.low.shape), high.view(self.high.shape))
        self.count += 1

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of one tensor x [..., K], shaped like the scale [..., G]."""
        return grid.min_max(x, self.spec)

    def across(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """One range [..., G] for the parts of a batch that the processes of a job hold: the extremes."""
        return ranks.reduced(low, "min"), ranks.reduced(high, "max")

    @abstractmethod
    def join(self, low: Tensor, high: Tensor) -> None:
        """Merge one tensor's range [..., G] into the state."""

    def qparams(self, spec: QuantSpec) -> QParams:
        """The grid [..., G] for what was seen; `spec` may differ from the own one in bits only (bit progression)."""
        return grid.choose_qparams(self.low, self.high, spec)

    def extra_repr(self) -> str:
        return self.spec.describe()


class AveragingObserver(Observer):
    """Joins ranges by an exponential moving average; the first tensor sets it."""

    momentum = 0.9

    def across(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return ranks.reduced(low, "mean"), ranks.reduced(high, "mean")

    def join(self, low: Tensor, high: Tensor) -> None:
        # a tensor expression, not an `if`: no synchronisation with a GPU
        keep = torch.where(self.count > 0, self.momentum, 0.0).to(self.low.dtype)
        self.low.mul_(keep).add_((1 - keep) * low)
        self.high.mul_(keep).add_((1 - keep) * high)
