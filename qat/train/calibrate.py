"""Before the first step: show the weights, and some training windows, to the observers.

Weights are looked at directly. Static inputs need forward passes; those run with float weights and inputs, and the
same windows on every process, so that all processes of a job hold the same scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qat.errors import UserError, problem
from qat.fake_quant import FakeQuantize, Phase
from qat.nn.quant import input_fake_quants, quantized_weights
from qat.progress import track


@torch.no_grad()
def calibrate(model: nn.Module, windows: Tensor, batch_size: int) -> None:
    """Give every static or learned FakeQuantize its first scale. A model on the meta device gets it from rank 0 later.

    Args:
        windows: [n, block] token ids shown to the observers of static inputs.
    """
    named = [(name, fq) for name, fq in input_fake_quants(model) if fq.observer is not None]
    watched = [fq for _, fq in named]
    # without windows a phase that watches has to come first (checks.py)
    batches = windows.split(batch_size) if watched and len(windows) else ()
    if any(parameter.is_meta for parameter in model.parameters()):
        for _ in track(batches, "calibrate"):
            pass  # to hear requests to stop together with rank 0, which does the work
        return
    for _, weight, fake_quant in quantized_weights(model):
        if fake_quant.observer is not None:
            fake_quant.observer.observe(weight)
            fake_quant.adopt_observed()
    if not batches:
        return
    quants = [fq for _, _, fq in quantized_weights(model)] + watched
    before = [fq.now for fq in quants]
    for fake_quant in quants:
        observing = any(fake_quant is w for w in watched)
        fake_quant.set_phase(Phase(observing, False, False, fake_quant.now.bits))
    was_training = model.training
    model.eval()
    for batch in track(batches, "calibrate"):
        model(batch)
    model.train(was_training)
    for fake_quant, phase in zip(quants, before, strict=True):
        fake_quant.set_phase(phase)
    adopt_inputs(named)


def adopt_inputs(watched: Sequence[tuple[str, FakeQuantize]]) -> None:
    """Give named input grids the range that they have seen; UserError naming all layers that no token came to."""
    unseen = [name for name, fake_quant in watched if fake_quant.observer and not int(fake_quant.observer.count)]
    if unseen:
        got = f"nothing at {', '.join(unseen[:10])}" + (f" and {len(unseen) - 10} more" if len(unseen) > 10 else "")
        fix = "Raise fake_quant.calibration_batches, keep them by plan rules, or use scheme.input.dynamic=true."
        raise UserError(problem("calibration", "every static input must see data", got, fix), before_work=False)
    for _, fake_quant in watched:
        fake_quant.adopt_observed()
