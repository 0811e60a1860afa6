"""A run that was cut anywhere and went on is, bit for bit, the run that never stopped."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from quant_models import float_model, plan

from qat import signals
from qat.checkpoints import Checkpoints
from qat.config import DataConfig
from qat.data import load_windows
from qat.errors import UserError
from qat.insert import FakeQuantOptions, insert
from qat.metrics import Metrics
from qat.train.calibrate import calibrate
from qat.train.fit import FitOptions, fit
from qat.train.losses import LossWeights
from qat.train.module import OptimOptions
from qat.train.phases import PhaseEntry

STEPS = 8
OPTIM = OptimOptions(1e-2, 1e-2, 0.01, (0.9, 0.95), 0.2, 0.1, 1.0, steps=STEPS)
OPTIONS = FitOptions(precision="fp32", max_steps=STEPS, batch_size=2, eval_every=1, layer_stats_every=3)
DELAYED = (PhaseEntry(0, "observe"), PhaseEntry(2, "fake_quantize"), PhaseEntry(5, "freeze_scales"))
QUANTIZE = (PhaseEntry(0, "fake_quantize"),)
PROGRESSIVE = (
    PhaseEntry(0, "fake_quantize"),
    PhaseEntry(0, "bits", 8),
    PhaseEntry(3, "bits", 6),
    PhaseEntry(6, "bits", 4),
)
LEARNED = FakeQuantOptions("lsq_plus", "learned", "mse")
STATIC = FakeQuantOptions("ste_clipped", "static", "minmax")


pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture(scope="module")
def windows(tiny_text, tiny_tokenizer):
    # 5 windows, 2 at a step: the edge of an epoch falls inside a step and between steps
    return load_windows(DataConfig(path=str(tiny_text), block_size=32, eval_tokens=64), tiny_tokenizer).train[:5]


def run(folder, model_dir, windows, scheme, options, schedule, cut=None, number=signal.SIGTERM, **changes):
    """Train, asking to stop after step `cut`; tensors of the trained model and the lines of metrics.jsonl."""
    model = float_model(model_dir)
    insert(model, plan(scheme), options)
    calibrate(model, windows[:4], 2)
    steps = []

    def score(_):
        steps.append(1)
        if cut is not None and len(steps) == cut + 1:  # the first is of step 0
            os.kill(os.getpid(), number)
        return 1.0

    chosen = replace(OPTIONS, **changes)
    arguments = (model, None, windows, LossWeights(0.0, 1.0), OPTIM, schedule, chosen, Metrics(folder), score)
    result = fit(*arguments, Checkpoints(folder / "checkpoints"))
    timeless = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        timeless.append({k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gib")})
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}, timeless, result


CASES = {
    "dropout": ("tiny_gpt2_dir", "w4a16_g32", FakeQuantOptions(), QUANTIZE, {}),
    "phases": ("tiny_model_dir", "w8a8_static", STATIC, DELAYED, {}),
    "learned": ("tiny_model_dir", "w4a16_g32_asym", LEARNED, DELAYED, {}),
    "bits": ("tiny_model_dir", "w4a8_g32", LEARNED_SYM := FakeQuantOptions("lsq", "learned", "mse"), PROGRESSIVE, {}),
    "workers": ("tiny_gpt2_dir", "w4a16_g32", FakeQuantOptions(), DELAYED, {"loader_workers": 2}),
    "accumulate": ("tiny_gpt2_dir", "w4a16_g32", FakeQuantOptions(), DELAYED, {"accumulate": 3, "precision": "bf16"}),
    "experts": ("tiny_mixtral_dir", "w4a16_g32", FakeQuantOptions(), QUANTIZE, {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_run_cut_at_any_step_goes_on_bit_for_bit(request, tmp_path, windows, case):
    model, scheme, options, schedule, changes = CASES[case]
    model = request.getfixturevalue(model)
    cuts = range(1, STEPS) if case in ("phases", "dropout") else (1, 4, 5, 7)
    whole, lines, result = run(tmp_path / "whole", model, windows, scheme, options, schedule, **changes)
    assert result.steps == STEPS
    assert len(result.step_seconds) == STEPS
    for cut in cuts:
        folder = tmp_path / f"cut{cut}"
        with pytest.raises(signals.Stopped):
            run(folder, model, windows, scheme, options, schedule, cut=cut, **changes)
        signals.forget()
        torch.manual_seed(cut)
        state, again, result = run(folder, model, windows, scheme, options, schedule, **changes)
        assert state.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(state[name], whole[name])] == []
        assert again == lines
        assert result.tokens == STEPS * changes.get("accumulate", 1) * 2 * 32
        assert len(result.step_seconds) == STEPS


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(signal.SIGTERM, "preempted", 75), (signal.SIGUSR1, "preempted", 75), (signal.SIGINT, "interrupted", 130)],
)
def test_signal_saves_the_step_it_came_in_and_tells_how_the_run_ended(
    tmp_path, tiny_model_dir, windows, number, status, code
):
    arguments = (tmp_path, tiny_model_dir, windows, "w4a16_g32", FakeQuantOptions(), QUANTIZE)
    with pytest.raises(signals.Stopped) as stopped:
        run(*arguments, cut=3, number=number)
    assert (stopped.value.status, stopped.value.exit_code) == (status, code)
    found, skipped = Checkpoints(tmp_path / "checkpoints").newest()
    assert found is not None
    assert (found.facts["step"], skipped) == (3, [])


def test_second_control_c_stops_now(tmp_path):
    signals.listen()
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.requested() == signals.INTERRUPTED
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_request_is_heard_in_every_loop_with_a_bar():
    from qat.progress import track

    signals.listen()
    seen = []
    with pytest.raises(signals.Stopped, match="preempted; resume it"):
        for item in track(range(5), "loop"):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1, 2]


def test_damaged_checkpoint_is_passed_over_for_the_one_before_it_and_said(tmp_path, tiny_model_dir, windows, capsys):
    arguments = (tmp_path, tiny_model_dir, windows, "w4a16_g32", FakeQuantOptions(), QUANTIZE)
    with pytest.raises(signals.Stopped):
        run(*arguments, cut=4, checkpoint_every=2)
    signals.forget()
    file = next((tmp_path / "checkpoints/step-000004").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    state, lines, _ = run(*arguments)
    assert (
        f"step-000004 is damaged ({file.name} has another checksum); using the one before it" in capsys.readouterr().err
    )
    whole, wanted, _ = run(tmp_path / "whole", *arguments[1:])
    assert all(torch.equal(state[name], whole[name]) for name in whole)
    assert lines == wanted


def test_checkpoint_of_another_scheme_is_refused(tmp_path, tiny_model_dir, windows):
    with pytest.raises(signals.Stopped):
        run(tmp_path, tiny_model_dir, windows, "w4a16_g32", STATIC, QUANTIZE, cut=2)
    signals.forget()
    with pytest.raises(UserError, match=r"step-000002: must fit the model, got model\..*It belongs to another model"):
        run(tmp_path, tiny_model_dir, windows, "w4a16_row", STATIC, QUANTIZE)
