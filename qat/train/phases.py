"""Phases as data: what the fake quantizers do from which optimizer step on.

The state at a step is the fold of all entries with `at <= step`, a pure function, so a resumed run is in the right
phase whatever step it stopped at. Actions:
    observe          watch the inputs, do not quantize
    fake_quantize    quantize (and stop watching)
    freeze_scales    hold every scale and zero point from here on
    bits N           weights whose scheme is narrower than N train at N bits
    freeze_codes     hold every integer; scales may move. The stage `scales` does this, a schedule cannot: weights that
                     train on would leave their integers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qat.fake_quant import FakeQuantize, Phase
from qat.nn.quant import input_fake_quants, quantized_weights
from qat.train.calibrate import adopt_inputs

ACTIONS = ("observe", "fake_quantize", "freeze_scales", "bits", "freeze_codes")


@dataclass(frozen=True)
class PhaseEntry:
    """One line of the schedule."""

    at: int
    do: str
    bits: int | None = None


@dataclass(frozen=True)
class PhaseState:
    """The folded state: what every FakeQuantize should be doing."""

    observing: bool = False
    quantizing: bool = False
    frozen: bool = False
    bits: int = 0
    codes_frozen: bool = False

    @property
    def name(self) -> str:
        """For the log: `observe`, `fake_quantize`, `frozen`, `codes_frozen`; the width while above the scheme's."""
        verb = "fake_quantize" if self.quantizing else "observe"
        verb = "codes_frozen" if self.codes_frozen else "frozen" if self.frozen else verb
        return f"{verb}@{self.bits}" if self.bits else verb


def state_at(step: int, schedule: Sequence[PhaseEntry]) -> PhaseState:
    """The fold of all entries up to and including `step`."""
    state = PhaseState(observing=True)
    for entry in schedule:
        if entry.at > step:
            continue
        if entry.do == "observe":
            state = replace(state, observing=True, quantizing=False)
        elif entry.do == "fake_quantize":
            state = replace(state, observing=False, quantizing=True)
        elif entry.do == "freeze_scales":
            state = replace(state, observing=False, frozen=True)
        elif entry.do == "freeze_codes":
            state = replace(state, observing=False, codes_frozen=True)
        else:
            state = replace(state, bits=entry.bits or 0)
    return state


@torch.no_grad()
def apply_phase(model: nn.Module, state: PhaseState) -> None:
    """Bring every FakeQuantize of a training model into `state`.

    A weight's range is taken afresh from the weight when its width changes and when quantization sets in, so nobody
    watches weights in between. An input's range is what was observed.
    """
    for _, weight, fake_quant in quantized_weights(model):
        before = fake_quant.now
        bits = max(state.bits, fake_quant.spec.bits)
        fake_quant.set_phase(replace(before, observing=False, quantizing=state.quantizing, bits=bits))
        sets_in = state.quantizing and not before.quantizing and not before.frozen
        if bits != before.bits or sets_in:
            _take_range(fake_quant, weight)
        if state.frozen and not before.frozen:
            fake_quant.freeze(weight)
        if state.codes_frozen and not before.codes_frozen:
            fake_quant.freeze_codes(weight)
    inputs = list(input_fake_quants(model))
    if not state.observing:
        adopt_inputs([(name, fq) for name, fq in inputs if fq.now.observing and fq.observer and not fq.now.frozen])
    for _, fake_quant in inputs:
        frozen = fake_quant.now.frozen
        fake_quant.set_phase(Phase(state.observing, state.quantizing, frozen, fake_quant.spec.bits))
        if state.frozen and not frozen:
            fake_quant.freeze(None)


def _take_range(fake_quant: FakeQuantize, weight: Tensor) -> None:
    """Give a grid that is stored its scale from the weight as it is now; other grids follow the weight anyway."""
    if fake_quant.observer is not None:
        # the best range depends on the width
        fake_quant.observer.spec = fake_quant.current_spec
        fake_quant.observer.count.zero_()
        fake_quant.observer.observe(weight)
        fake_quant.adopt_observed()
    elif fake_quant.now.frozen:
        fake_quant.freeze(weight)
