"""Range with the least quantization error: shrink each group's [min, max] step by step, keep the best.

The error is sum |x^ - x|^2.4 over the group; 2.4 rather than 2 weighs outliers a little more. Averaged over tensors.
Source: the range search of GPTQ's reference implementation (Frantar et al., arXiv:2210.17323): norm 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat import grid
from qat.observers.base import AveragingObserver

NORM = 2.4
SHRINKS = tuple(1 - 0.02 * i for i in range(31))  # 1.00 down to 0.40


class MseObserver(AveragingObserver):
    """low, high = moving average of the error-minimizing range of each tensor."""

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = grid.min_max(x, self.spec)
        best = torch.full_like(low, torch.inf)
        best_low, best_high = low.clone(), high.clone()
        for shrink in SHRINKS:
            qparams = grid.choose_qparams(low * shrink, high * shrink, self.spec)
            error = grid.fake_quantize(x, qparams, self.spec, torch.float32).sub_(x.detach()).abs_().pow_(NORM)
            total = error.sum().view(low.shape) if low.numel() == 1 else grid.group_view(error, self.spec).sum(-1)
            better = total < best
            best = torch.where(better, total, best)
            best_low = torch.where(better, low * shrink, best_low)
            best_high = torch.where(better, high * shrink, best_high)
        return best_low, best_high
