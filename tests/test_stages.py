"""Stages of a training: integers held while scales learn, whole runs of several stages, and each cut in any of them."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace

import pytest
import torch
from quant_models import IDS, float_model, logits, plan
from safetensors.torch import load_file
from tiny_runs import read, same_process, tiny_run

from qat import estimators, grid, pipeline, signals
from qat.checkpoints import Checkpoints
from qat.checks import check
from qat.cli.compose import compose_run, to_yaml
from qat.config import DataConfig, RunConfig
from qat.convert import pack_model
from qat.data import load_windows
from qat.insert import FakeQuantOptions, insert
from qat.metrics import Metrics
from qat.nn.quant import quantized_weights
from qat.scheme import QuantSpec
from qat.stage_config import PhaseConfig, StageConfig
from qat.train.calibrate import calibrate
from qat.train.fit import FitOptions, fit
from qat.train.losses import LossWeights
from qat.train.module import CausalLMModule, OptimOptions
from qat.train.phases import PhaseEntry, apply_phase, state_at

OPTIM = OptimOptions(1e-2, 3e-2, 0.0, (0.9, 0.95), 0.0, 0.1, 1.0, steps=8)
HOLD = (PhaseEntry(0, "fake_quantize"), PhaseEntry(0, "freeze_codes"))
CE = LossWeights(kl=0.0, ce=1.0)
CASES = [
    ("w4a16_g32", "ste_clipped", "dynamic"),
    ("w4a8_g32", "ste_clipped", "dynamic"),
    ("w4a16_row", "ste_pass_through", "static"),
    ("w4a16_g32_asym", "lsq_plus", "learned"),
]


@pytest.fixture(scope="module")
def windows(tiny_text, tiny_tokenizer):
    return load_windows(DataConfig(path=str(tiny_text), block_size=32, eval_tokens=64), tiny_tokenizer).train


def student(folder, windows, scheme, estimator, scale):
    model = float_model(folder)
    observer = "minmax" if scale == "dynamic" else "mse"
    coverage = insert(model, plan(scheme), FakeQuantOptions(estimator, scale, observer, learns_later=True))
    calibrate(model, windows[:4], 2)
    return model, coverage


def codes_of(model) -> dict[str, torch.Tensor]:
    return {name: fake_quant.codes(weight) for name, weight, fake_quant in quantized_weights(model)}


def losses(metrics: Metrics) -> list[float]:
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "train"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spec", [QuantSpec(4, True, "group", 16), QuantSpec(3, False, "channel"), QuantSpec(8, False, "tensor")]
)
def test_gradient_of_a_scale_is_the_sum_of_its_codes(spec, dtype):
    generator = torch.Generator().manual_seed(5)
    x, grad = torch.randn(6, 32, generator=generator), torch.randn(6, 32, generator=generator).to(dtype)
    scale, zero_point = grid.choose_qparams(*grid.min_max(x, spec), spec)
    codes = grid.quantize(x, grid.QParams(scale, zero_point), spec)
    raw, zero = scale.clone().requires_grad_(), zero_point.float().requires_grad_()
    estimators.dequantize(codes, raw, zero, spec, dtype).backward(grad)
    leaf, shift = scale.double().requires_grad_(), zero_point.double().requires_grad_()
    groups = spec.groups(32) if spec.granularity != "tensor" else 1
    view = codes.double().view(6, groups, -1)
    if spec.granularity == "tensor":
        values = (codes.double() - shift) * leaf
    else:
        values = ((view - shift[..., None]) * leaf[..., None]).view(6, 32)
    values.backward(grad.double())
    torch.testing.assert_close(raw.grad, leaf.grad.float())
    torch.testing.assert_close(zero.grad, shift.grad.float())


@pytest.mark.parametrize(("scheme", "estimator", "scale"), CASES)
def test_scales_train_while_every_integer_stays(tmp_path, tiny_model_dir, windows, scheme, estimator, scale):
    model, coverage = student(tiny_model_dir, windows, scheme, estimator, scale)
    codes, before = codes_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = FitOptions(precision="fp32", max_steps=8, batch_size=4, layer_stats_every=4, trains="scales")
    metrics = Metrics(tmp_path)
    fit(model, None, windows, CE, OPTIM, HOLD, options, metrics)
    after = codes_of(model)
    assert all(torch.equal(after[name], codes[name]) for name in codes)
    assert losses(metrics)[-1] < losses(metrics)[0] - 0.02
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(re.search(r"scale_shift|zero_shift|norm|phase|fake_quant.(scale|zero_point)$", name) for name in moved)
    assert any(name.endswith("zero_shift") for name in moved) == (estimator == "lsq_plus")
    packed = pack_model(model, coverage, {}, None)
    assert all(torch.equal(packed.tensors[name].codes(), codes[name]) for name in codes)


@pytest.mark.parametrize(("scheme", "estimator", "scale"), CASES)
def test_holding_the_integers_changes_no_output(tiny_model_dir, windows, scheme, estimator, scale):
    model, _ = student(tiny_model_dir, windows, scheme, estimator, scale)
    for name, parameter in model.named_parameters():
        if name.endswith(("scale_shift", "zero_shift")) and scale == "learned":
            parameter.data.uniform_(-0.2, 0.3, generator=torch.Generator().manual_seed(1))
    codes, before = codes_of(model), logits(model.eval(), IDS)
    apply_phase(model, state_at(0, HOLD))
    assert torch.equal(logits(model, IDS), before)
    assert all(torch.equal(mine, codes[name]) for name, mine in codes_of(model).items())


def test_only_what_trains_has_optimizer_state(tmp_path, tiny_model_dir, windows, monkeypatch):
    model, _ = student(tiny_model_dir, windows, *CASES[0])
    seen = []
    configure = CausalLMModule.configure_optimizers

    def noted(self):
        made = configure(self)
        seen.append(made["optimizer"])
        return made

    monkeypatch.setattr(CausalLMModule, "configure_optimizers", noted)
    options = FitOptions(precision="fp32", max_steps=2, batch_size=2, layer_stats_every=0, trains="scales")
    fit(model, None, windows, CE, OPTIM, HOLD, options, Metrics(tmp_path))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {names[id(parameter)] for parameter in seen[0].state}
    assert held and all(name.endswith("scale_shift") or "norm" in name for name in held)


@pytest.mark.parametrize(("scheme", "estimator", "scale"), [CASES[0], CASES[3]])
def test_held_integers_resume_bit_for_bit(tmp_path, tiny_model_dir, windows, scheme, estimator, scale):
    options = FitOptions(
        precision="fp32", max_steps=8, batch_size=4, layer_stats_every=2, trains="scales", checkpoint_every=5
    )
    ends = []
    for steps in (8, 5, 8):
        model, _ = student(tiny_model_dir, windows, scheme, estimator, scale)
        store = Checkpoints(tmp_path / ("whole" if not ends else "cut"))
        fit(
            *(model, None, windows, CE, OPTIM, HOLD, replace(options, max_steps=steps), Metrics(store.folder)),
            checkpoints=store,
        )
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(ends[2][name], tensor) for name, tensor in ends[0].items())


STAGES = "stages.schedule=[{kind: blockwise, steps: 2, windows: 8}, {kind: end_to_end}, {kind: scales, steps: 3}]"
RUN = ["distill=kl_ce", "trainer.max_steps=4", "trainer.checkpoint_every=2", STAGES]


@pytest.fixture
def own_process(monkeypatch, own_signals):
    """Signals and fresh processes stay inside the test."""
    monkeypatch.setattr(pipeline, "_fresh_process", same_process)


def cut_after(calls: int, monkeypatch) -> None:
    """The process is told to end when it writes its `calls`-th line of metrics."""
    write, seen = Metrics.write, []

    def told(self, *given, **named):
        write(self, *given, **named)
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "write", told)


def test_run_of_three_stages_cut_anywhere_ends_as_the_whole_one(
    own_process, tmp_path, tiny_model_dir, tiny_text, monkeypatch
):
    whole = tiny_run(tmp_path / "whole", tiny_model_dir, tiny_text, *RUN)
    results, wanted = read(whole, "results.json"), load_file(whole / "checkpoints/final/model.safetensors")
    assert read(whole, "parity.json")["verdict"] == "equal"
    kinds = [(stage["kind"], stage["steps"], stage["tokens"]) for stage in results["stages"]]
    assert kinds == [("blockwise", 4, 128), ("end_to_end", 4, 256), ("scales", 3, 192)]
    assert results["steps"] == 11
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = {stage: {line["step"] for line in lines if line["stage"] == stage} for stage, _, _ in kinds}
    assert steps == {"blockwise": {2, 4}, "end_to_end": {5, 6, 7, 8}, "scales": {9, 10, 11}}
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["final"]
    control = [json.loads(line) for line in (whole / "control/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in control if line["event"] == "train"] == [1, 2, 3, 4]
    for place, calls in enumerate((1, 5, len(lines) - 1)):
        folder = tmp_path / f"cut{place}"
        with monkeypatch.context() as patch:
            cut_after(calls, patch)
            with pytest.raises(signals.Stopped):
                tiny_run(folder, tiny_model_dir, tiny_text, *RUN)
        signals.forget()
        fixed = [f"runs_dir={folder}", "name=run", f"model.path={tiny_model_dir}", f"data.path={tiny_text}"]
        config = compose_run(["recipe=tiny", *fixed, *RUN])
        run = pipeline.run(config, to_yaml(config), pipeline.Resume())
        mine = load_file(run / "checkpoints/final/model.safetensors")
        assert [name for name in wanted if not torch.equal(mine[name], wanted[name])] == [], calls
        again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        timed = ("seconds", "tokens_per_second", "memory_gib")
        plain = [[{k: v for k, v in line.items() if k not in timed} for line in each] for each in (lines, again)]
        assert plain[0] == plain[1], calls
        assert read(run, "results.json")["perplexity"] == results["perplexity"]


REFUSED = [
    ([], "^stages.schedule: must hold a stage"),
    ([StageConfig("block")], r"^stages.schedule.0.kind: must be one of .*Did you mean 'blockwise'\?"),
    ([StageConfig("scales"), StageConfig()], "^stages.schedule: stages stand in the order"),
    ([StageConfig(steps=0)], "^stages.schedule.0.steps: must be at least 1"),
    ([StageConfig(lr=-1.0)], "^stages.schedule.0.lr: must be finite and above 0"),
    ([StageConfig("scales", rank=4)], "^stages.schedule.0.rank: only end_to_end stages have it"),
    ([StageConfig(rank=0)], "^stages.schedule.0.rank: must be at least 1"),
    ([StageConfig(alpha=2.0)], "^stages.schedule.0.alpha: needs a rank"),
    ([StageConfig(windows=8)], "^stages.schedule.0.windows: only blockwise stages have it"),
]


def valid() -> RunConfig:
    return compose_run(["model.path=m", "data.path=d"])


@pytest.mark.parametrize(("schedule", "match"), REFUSED)
def test_check_refuses_stages(schedule, match):
    config = valid()
    assert check(config) == []
    config.stages.schedule = schedule
    assert any(re.search(match, line) for line in check(config))


def test_check_refuses_what_does_not_go_with_blocks():
    config = valid()
    config.stages.schedule = [StageConfig("blockwise"), StageConfig()]
    assert check(config) == []
    config.phases.schedule = [PhaseConfig(0, "observe"), PhaseConfig(2, "fake_quantize")]
    config.trainer.strategy, config.trainer.devices = "fsdp2", 2
    lines = check(config)
    assert any(re.search("^phases.schedule: after a blockwise stage the scales", line) for line in lines)
    assert any(re.search("^stages.schedule: blockwise stages need a whole model", line) for line in lines)


def test_check_refuses_settings_that_adafactor_ignores():
    config = compose_run(["model.path=m", "data.path=d", "optim=adafactor"])
    assert check(config) == []
    config.optim.betas = [0.9, 0.99]
    config.trainer.strategy, config.trainer.devices = "fsdp2", 2
    lines = check(config)
    assert any(re.search("^optim.betas: only optim.kind=adamw has betas", line) for line in lines)
    assert any(re.search("^optim.kind: adafactor needs whole weights", line) for line in lines)


def test_check_holds_phases_to_the_shortest_end_to_end_stage():
    config = valid()
    config.phases.schedule = [PhaseConfig(0, "fake_quantize"), PhaseConfig(9, "freeze_scales")]
    config.stages.schedule = [StageConfig(steps=8)]
    assert any("must be a step of every end_to_end stage, from 0 to 7, got 9" in line for line in check(config))
    config.stages.schedule = [StageConfig("scales")]
    assert any(re.search("^phases.schedule: phases are of end_to_end stages", line) for line in check(config))
