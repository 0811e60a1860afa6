"""Running extremes: nothing seen is ever clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.observers.base import Observer


class MinMaxObserver(Observer):
    """low, high = extremes of everything seen."""

    def join(self, low: Tensor, high: Tensor) -> None:
        seen = self.count > 0
        self.low.copy_(torch.where(seen, torch.minimum(self.low, low), low))
        self.high.copy_(torch.where(seen, torch.maximum(self.high, high), high))
