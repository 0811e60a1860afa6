"""FakeQuantize: float in, float on the grid out, straight-through gradient. Owns one Observer and the QParams.

Where the scale comes from is fixed at construction:
    dynamic   from the tensor at hand, at every call, until it is frozen
    static    from the observer, once
    learned   static, times (1 + scale_shift) with a learned shift; the shift makes the learning rate relative, and the
              product is plain float32 multiplication, so the same bits on every machine
On a CPU with the C++ kernels this runs fused (kernels/cpu/train.py), and what a Parameter became is kept until it
changes.
Once the codes are frozen, they come from the weight and the stored scale, and values from `scale * (1 + scale_shift)`:
scales go on learning while the integers stay. That runs in plain torch.
Everything that changes is a buffer or parameter with its final shape from construction; `phase` [4] holds
(observing, quantizing, 1 for a frozen scale or 2 for frozen codes, bits) and is mirrored in plain ints so that forward
never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qat import estimators, grid
from qat.errors import UserError, problem
from qat.estimators import Estimator
from qat.grid import QParams
from qat.kernels.cpu import train as fused
from qat.observers import OBSERVERS, Observer
from qat.scheme import QuantSpec

SCALE_MODES = ("dynamic", "static", "learned")
PROBES = 64


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 may have sharded; every process of the job must ask. Same shape as the logical one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class _Kept:
    """What a Parameter became, and what tells that it has not changed since.

    Writes count in `Tensor._version`, except those through `.data`; `probe` [<= PROBES], values spread over the weight,
    tells of these, since an optimizer moves nearly all of them.
    """

    key: tuple
    probe: Tensor
    there: fused.OnGrid


@dataclass(frozen=True)
class Phase:
    """What a FakeQuantize does now."""

    observing: bool = False
    quantizing: bool = True
    frozen: bool = False
    bits: int = 8
    codes_frozen: bool = False


@contextmanager
def not_observing(model: nn.Module) -> Iterator[None]:
    """What passes through a model here changes no observer: held-out text chooses no grid."""
    watching = [module for module in model.modules() if isinstance(module, FakeQuantize) and module.now.observing]
    for module in watching:
        module.now = replace(module.now, observing=False)
    try:
        yield
    finally:
        for module in watching:
            module.now = replace(module.now, observing=True)


class FakeQuantize(nn.Module):
    """Moves x [..., K] onto the grid of `spec`.

    Args:
        spec: the final grid.
        scale_shape: [..., G] of the scale; (1,) for dynamic per-token grids, which store nothing.
        estimator: which gradients flow.
        scale_mode: dynamic, static or learned.
        observer: key of OBSERVERS; unused (None) when the scale is dynamic.
        learns_later: a scale that does not learn has a shift all the same, for when the codes are frozen.
    """

    scale: Tensor
    zero_point: Tensor
    phase: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: tuple[int, ...],
        estimator: Estimator,
        scale_mode: str,
        observer: str | None = None,
        learns_later: bool = False,
    ):
        super().__init__()
        assert scale_mode in SCALE_MODES, scale_mode
        assert (scale_mode == "learned") == estimator.learns_scale
        self.spec, self.estimator, self.scale_mode = spec, estimator, scale_mode
        self.observer: Observer | None = None
        if scale_mode != "dynamic":
            self.observer = OBSERVERS[observer or "minmax"](spec, scale_shape)
        self.register_buffer("scale", torch.ones(scale_shape))
        self.register_buffer("zero_point", torch.zeros(scale_shape, dtype=torch.int32))
        has_shift, trains = estimator.learns_scale or learns_later, estimator.learns_scale
        self.scale_shift = nn.Parameter(torch.zeros(scale_shape), requires_grad=trains) if has_shift else None
        learns_zero_point = estimator.learns_zero_point and not spec.symmetric
        self.zero_shift = nn.Parameter(torch.zeros(scale_shape)) if learns_zero_point else None
        self.now = Phase(bits=spec.bits)
        self.register_buffer("phase", torch.tensor([0, 1, 0, spec.bits], dtype=torch.int32))
        self._kept: _Kept | None = None

    @property
    def current_spec(self) -> QuantSpec:
        """The grid at the present bit width."""
        return self.spec if self.now.bits == self.spec.bits else replace(self.spec, bits=self.now.bits)

    @property
    def is_stored(self) -> bool:
        """Whether the scale is this object's own, and not that of the tensor at hand."""
        return self.scale_mode != "dynamic" or self.now.frozen or self.now.codes_frozen

    def set_phase(self, phase: Phase) -> None:
        """Change what forward does; recorded in the `phase` buffer."""
        self.now, self._kept = phase, None
        held = 2 if phase.codes_frozen else int(phase.frozen)
        state = [int(phase.observing), int(phase.quantizing), held, phase.bits]
        self.phase.copy_(torch.tensor(state, dtype=torch.int32))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [..., K] on the grid, same shape; `dtype` defaults to what the next matmul runs in."""
        if self.now.observing and self.observer is not None:
            self.observer.observe(x, together=self.training)
        dtype = dtype or estimators.compute_dtype(x)
        if not self.now.quantizing:
            # a learned scale stays in the graph without effect: DDP waits for the gradient of every parameter
            idle = [whole(p).sum() for p in self.parameters() if p.requires_grad and torch.is_grad_enabled()]
            return x.to(dtype) + 0.0 * sum(idle) if idle else x.to(dtype)
        if self.now.codes_frozen:
            return estimators.dequantize(self.codes(x), *self._qparams_for_gradient(x), self.current_spec, dtype)
        if fused.refuses(x, dtype) is None:
            raw, there = self.on_grid(x, dtype)
            return fused.fake_quantize(x, raw, there, self.current_spec, self.gradients)
        scale, zero_point = self._qparams_for_gradient(x)
        return estimators.fake_quantize(x, scale, zero_point, self.current_spec, self.estimator, dtype)

    @property
    def gradients(self) -> fused.Gradients:
        """The estimator, as the fused ops take it."""
        own = self.estimator
        return fused.Gradients(own.clipped, own.learns_scale, self.zero_shift is not None)

    def on_grid(self, x: Tensor, dtype: torch.dtype | None) -> tuple[QParams | None, fused.OnGrid]:
        """Raw scale and zero point that gradients flow to (None when x [..., K] itself decides), and x on its grid.

        Holds values in `dtype`, or int8 codes when it is None. A Parameter's result is kept while neither it nor its
        grid changes; values only where a backward pass holds them anyway.
        """
        spec, raw, rounded = self.current_spec, None, None
        if self.is_stored:
            raw = QParams(*self._qparams_for_gradient(x))
            with torch.no_grad():
                rounded = QParams(grid.round_scale(raw.scale, spec), grid.round_zero_point(raw.zero_point, spec))
        if not isinstance(x, nn.Parameter) or x.is_inference():
            return raw, fused.on_grid(x, rounded, spec, dtype, dtype is None)
        key = (x.data_ptr(), x._version, x.shape, x.dtype, spec, dtype)
        probe = x.detach().flatten()[:: max(1, x.numel() // PROBES)]
        kept = self._kept
        if kept is None or kept.key != key or not torch.equal(kept.probe, probe) or _moved(kept.there, rounded, spec):
            self._kept = kept = None  # freed before the next is made
            kept = _Kept(key, probe.clone(), fused.on_grid(x, rounded, spec, dtype, dtype is None))
            if dtype is None or torch.is_grad_enabled():
                self._kept = kept
        return raw, kept.there

    def _qparams_for_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_stored:
            return self.from_tensor(x)
        # Frozen shifts stay in the graph without effect: DDP waits for the gradient of every parameter it began with,
        # and an optimizer's momentum goes on moving them.
        moves = 0.0 if self.now.frozen else 1.0
        scale = self.scale if self.scale_shift is None else self.scale * (1 + moves * whole(self.scale_shift))
        zero_point = self.zero_point if self.zero_shift is None else self.zero_point + moves * whole(self.zero_shift)
        return scale, zero_point

    def from_tensor(self, x: Tensor) -> QParams:
        """The grid that x itself asks for (min-max)."""
        spec = self.current_spec
        return grid.choose_qparams(*grid.min_max(x, spec), spec)

    @torch.no_grad()
    def qparams(self, x: Tensor) -> QParams:
        """Exactly the rounded scale and zero point that forward(x) uses."""
        scale, zero_point = self._qparams_for_gradient(x)
        spec = self.current_spec
        return QParams(grid.round_scale(scale, spec), grid.round_zero_point(zero_point, spec))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """int8 codes of x [..., K]: the integers that forward(x) stands for."""
        base = QParams(self.scale, self.zero_point) if self.now.codes_frozen else self.qparams(x)
        return grid.quantize(x, base, self.current_spec)

    @torch.no_grad()
    def adopt_observed(self) -> None:
        """Take the observer's range as the static scale (start of a learned one)."""
        assert self.observer is not None
        if int(self.observer.count) == 0:
            fix = "Set fake_quant.calibration_batches >= 1."
            raise UserError(problem("calibration", "an observer must see data", "none", fix), before_work=False)
        self._store(self.observer.qparams(self.current_spec))

    @torch.no_grad()
    def freeze(self, x: Tensor | None) -> None:
        """Fix scale and zero point from now on; x is the weight, None for inputs."""
        if self.scale_mode == "dynamic":
            if x is None or self.spec.granularity == "token":
                return  # per-token scales belong to each input; there is nothing to hold still
            self._store(self.from_tensor(x))
        elif self.scale_shift is not None:
            self._store(self.qparams(torch.empty(0)))
        self.set_phase(replace(self.now, frozen=True))

    @torch.no_grad()
    def adopt(self, qparams: QParams) -> None:
        """Take scale and zero point [..., G] found elsewhere as the static ones (start of learned ones)."""
        assert self.scale_mode != "dynamic", "a dynamic scale is the tensor's own"
        self._store(QParams(grid.round_scale(qparams.scale, self.spec), qparams.zero_point))

    @torch.no_grad()
    def freeze_codes(self, x: Tensor) -> None:
        """Fix the codes of the weight x [..., K] from now on; its scale, and a learned zero point, may move."""
        self._store(self.qparams(x))
        self.set_phase(replace(self.now, frozen=False, codes_frozen=True))

    def _store(self, qparams: QParams) -> None:
        self._kept = None
        self.scale.copy_(qparams.scale.view(self.scale.shape))
        self.zero_point.copy_(qparams.zero_point.view(self.scale.shape))
        for shift in (self.scale_shift, self.zero_shift):
            if shift is not None:
                shift.detach().zero_()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.state_changed()

    def state_changed(self) -> None:
        """To be called after buffers were written from outside: `now` follows `phase`, nothing old is kept."""
        self._kept = None
        if self.phase.device.type != "meta":
            observing, quantizing, held, bits = self.phase.tolist()
            self.now = Phase(bool(observing), bool(quantizing), held == 1, bits, held == 2)

    def train(self, mode: bool = True) -> FakeQuantize:
        """As torch; what training kept is freed for evaluation, and the other way round."""
        if mode != self.training:
            self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}

    def extra_repr(self) -> str:
        return f"{self.spec.describe()}, {self.scale_mode}"


def _moved(there: fused.OnGrid, rounded: QParams | None, spec: QuantSpec) -> bool:
    """Whether a stored or learned grid is no longer the one x was put on; the grid of x itself moves only with x."""
    if rounded is None:
        return False
    if not torch.equal(there.scale.flatten(), rounded.scale.flatten()):
        return True
    return not spec.symmetric and not torch.equal(there.zero_point.flatten(), rounded.zero_point.flatten())
