"""Percentile range: the outermost 0.1 % of a group's values on either side are clipped; averaged over tensors.

Values of one group are sorted, so a group should be large (a row or a tensor); a per-tensor grid looks at an evenly
spaced sample of at most 2^20 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat import grid
from qat.observers.base import AveragingObserver

SHARE = 0.001
SAMPLE = 1 << 20


class PercentileObserver(AveragingObserver):
    """low, high = moving average of the 0.1 and 99.9 percentiles."""

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.granularity == "tensor":
            flat = x.detach().flatten()
            grouped = flat[:: max(1, flat.numel() // SAMPLE)].float().view(1, -1)
        else:
            grouped = grid.group_view(x.detach(), self.spec).float()
        size = grouped.shape[-1]
        rank = int(SHARE * size)
        ordered = grouped.sort(dim=-1).values
        low, high = ordered[..., rank], ordered[..., size - 1 - rank]
        # an infinity hidden beyond the percentile is still an error
        poison = torch.where(torch.isfinite(ordered[..., [0, -1]]).all(-1), 0.0, torch.nan)
        return low + poison, high + poison
