"""Histogram of everything seen, then the clip range with the least squared error. For per-tensor grids.

2048 equal bins over [-reach, reach], reach a power of two. When a value falls outside, `reach` doubles and neighbouring
bins merge in pairs, so no count is ever moved across a bin edge and the order of the tensors does not matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat import grid, ranks
from qat.errors import UserError, problem
from qat.grid import QParams
from qat.observers.base import Observer
from qat.scheme import QuantSpec

BINS = 2048
SHRINKS = tuple(1 - 0.01 * i for i in range(91))


class HistogramObserver(Observer):
    """low, high = extremes seen; `qparams` clips them where the histogram says that pays."""

    counts: Tensor
    reach: Tensor

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...]):
        if spec.granularity != "tensor":
            fix = "Use mse, percentile or minmax for per-channel and per-group grids."
            wanted = "the histogram observer holds one histogram per layer (granularity=tensor)"
            raise UserError(problem("fake_quant observer", wanted, spec.granularity, fix))
        super().__init__(spec, scale_shape)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("reach", torch.zeros(1))

    @torch.no_grad()
    def observe(self, x: Tensor, together: bool = False) -> None:
        super().observe(x, together)
        needed = float(torch.maximum(-self.low, self.high).clamp(min=1e-30))
        reach = float(self.reach) or 2.0 ** math.ceil(math.log2(needed))
        while reach < needed:
            merged = self.counts.view(-1, 2).sum(-1)
            self.counts.zero_()
            self.counts[BINS // 4 : BINS - BINS // 4] = merged
            reach *= 2
        self.reach.fill_(reach)
        counts = torch.histc(x.detach().float(), BINS, -reach, reach).double()
        self.counts += ranks.reduced(counts, "sum") if together else counts

    def join(self, low: Tensor, high: Tensor) -> None:
        seen = self.count > 0
        self.low.copy_(torch.where(seen, torch.minimum(self.low, low), low))
        self.high.copy_(torch.where(seen, torch.maximum(self.high, high), high))

    def qparams(self, spec: QuantSpec) -> QParams:
        width = 2 * self.reach / BINS
        centers = -self.reach + width * (torch.arange(BINS, device=self.counts.device) + 0.5)
        best = None
        for shrink in SHRINKS:
            qparams = grid.choose_qparams(self.low * shrink, self.high * shrink, spec)
            flat = QParams(qparams.scale.view(1, 1), qparams.zero_point.view(1, 1))
            wrong = grid.fake_quantize(centers.view(1, -1), flat, spec, torch.float32).view(-1) - centers
            error = float((self.counts * wrong.double().square()).sum())
            if best is None or error < best[0]:
                best = (error, qparams)
        assert best is not None
        return best[1]
