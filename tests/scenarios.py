"""Trainings that one process and several do alike; run under torchrun they leave their results in a folder.

torchrun --nproc-per-node=2 tests/scenarios.py FOLDER MODEL_DIR WINDOWS.safetensors STRATEGY NAME[@CUT] ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from quant_models import float_model, plan
from safetensors.torch import load_file, save_file

from qat import ranks, signals
from qat.checkpoint import unique_state
from qat.checkpoints import Checkpoints
from qat.config import ModelConfig
from qat.insert import FakeQuantOptions, insert
from qat.metrics import Metrics
from qat.models import meta_model
from qat.train.blockwise import BlockOptions, fit_blocks
from qat.train.calibrate import calibrate
from qat.train.fit import FitOptions, as_teacher, fit
from qat.train.losses import LossWeights
from qat.train.module import CausalLMModule, OptimOptions
from qat.train.phases import PhaseEntry

STEPS, GLOBAL_BATCH = 6, 4
OPTIM = OptimOptions(5e-3, 5e-3, 0.01, (0.9, 0.95), 0.2, 0.1, 1.0, steps=STEPS)
BLOCK_OPTIM = OptimOptions(1e-3, 1e-2, 0.0, (0.9, 0.95), 0.0, 0.1, 1.0, steps=6)
DELAYED = (PhaseEntry(0, "observe"), PhaseEntry(2, "fake_quantize"), PhaseEntry(4, "freeze_scales"))
QUANTIZE = (PhaseEntry(0, "fake_quantize"),)
HOLD = (PhaseEntry(0, "fake_quantize"), PhaseEntry(0, "freeze_codes"))
LATER = FakeQuantOptions(learns_later=True)
SCENARIOS = {
    "dynamic": ("w4a8_g32", FakeQuantOptions(), QUANTIZE, LossWeights(1.0, 0.5)),
    "static": ("w8a8_static", FakeQuantOptions("ste_clipped", "static", "minmax"), DELAYED, LossWeights(0.0, 1.0)),
    "learned": ("w4a16_g32_asym", FakeQuantOptions("lsq_plus", "learned", "mse"), DELAYED, LossWeights(0.0, 1.0)),
    "scales": ("w4a16_g32_asym", LATER, HOLD, LossWeights(1.0, 0.5)),
}


def train(folder: Path, model_dir: Path, windows: torch.Tensor, strategy: str, name: str, cut: int | None = None):
    """One scenario to its end, or until rank `cut % 2` is asked to stop after step `cut`; the model, or None."""
    scheme, how, schedule, loss = SCENARIOS[name]
    on_meta = strategy == "fsdp2" and ranks.rank() > 0
    model = meta_model(ModelConfig(path=str(model_dir))) if on_meta else float_model(model_dir)
    teacher = as_teacher(model, "fp32") if loss.kl else None
    insert(model, plan(scheme), how)
    calibrate(model, windows[:4], 2)
    seen = []

    def score(student) -> float:
        seen.append(1)
        if cut is not None and len(seen) == cut + 1 and ranks.rank() == cut % ranks.world():
            os.kill(os.getpid(), signal.SIGTERM)
        with torch.no_grad():
            return float(student(windows[:1].to(next(student.parameters()).device)).logits.mean())

    options = FitOptions(
        strategy=strategy, devices=ranks.world(), precision="fp32", max_steps=STEPS,
        batch_size=GLOBAL_BATCH // ranks.world(), eval_every=1, layer_stats_every=2,
        trains="scales" if name == "scales" else "all",
    )  # fmt: skip
    store = Checkpoints(folder / "checkpoints")
    try:
        result = fit(model, teacher, windows, loss, OPTIM, schedule, options, Metrics(folder), score, store)
    except signals.Stopped:
        signals.forget()
        return None
    if ranks.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(unique_state(result.model), folder / "state.safetensors")
        (folder / "facts.json").write_text(json.dumps({"steps": result.steps, "tokens": result.tokens}))
    return result.model


def train_blocks(folder: Path, model_dir: Path, windows: torch.Tensor, cut: int | None = None) -> None:
    """Blocks of a learned grid by all processes, each leaving what it ended with; or asked to stop at step `cut`."""
    floating, model = float_model(model_dir), float_model(model_dir)
    insert(model, plan("w2a16_g32"), FakeQuantOptions("lsq", "learned", "mse"))
    calibrate(model, windows[:4], 2)
    listening, heard = signals.requested, []

    def requested() -> int:
        heard.append(1)
        if cut is not None and len(heard) == cut and ranks.rank() == cut % ranks.world():
            os.kill(os.getpid(), signal.SIGTERM)
        return listening()

    options = BlockOptions(precision="fp32", batch_size=1, windows=10)
    signals.requested = requested
    try:
        store = Checkpoints(folder / "checkpoints")
        model = fit_blocks(model, floating, windows, BLOCK_OPTIM, options, Metrics(folder), store).model
    except signals.Stopped:
        signals.forget()
    finally:
        signals.requested = listening
    folder.mkdir(parents=True, exist_ok=True)
    save_file(unique_state(model), folder / f"state{ranks.rank()}.safetensors")


def train_with_nan(folder: Path, model_dir: Path, windows: torch.Tensor, strategy: str) -> None:
    """`dynamic` with a loss that is not a number in the third step of the last process alone."""
    honest = CausalLMModule.losses

    def losses(self, ids):
        loss, ce, kl = honest(self, ids)
        is_bad = self.global_step == 2 and ranks.rank() == ranks.world() - 1
        return (loss * float("nan") if is_bad else loss), ce, kl

    CausalLMModule.losses = losses
    try:
        model = train(folder, model_dir, windows, strategy, "dynamic")
    finally:
        CausalLMModule.losses = honest
    # under fsdp2 the first process alone has the whole
    mine = float(sum(parameter.double().sum() for parameter in model.parameters())) if strategy == "ddp" else 0.0
    sums = ranks.gather(mine)
    if ranks.rank() == 0:
        (folder / "sums.json").write_text(json.dumps(sums))


def main() -> None:
    """Every scenario named, under one process group."""
    folder, model_dir, windows, strategy, *names = sys.argv[1:]
    torch.set_num_threads(1)
    ranks.connect("cpu", timeout_minutes=2)
    there = load_file(windows)["windows"]
    for name in names:
        name, _, cut = name.partition("@")
        place = Path(folder) / strategy / (name + cut)
        if name == "nan":
            train_with_nan(place, Path(model_dir), there, strategy)
            continue
        if name == "blocks":
            signals.listen()
            for until in [int(cut), None] if cut else [None]:
                train_blocks(place, Path(model_dir), there, until)
            continue
        if cut:
            assert train(place, Path(model_dir), there, strategy, name, int(cut)) is None
        train(place, Path(model_dir), there, strategy, name)
    ranks.disconnect()


if __name__ == "__main__":
    main()
