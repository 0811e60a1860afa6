"""Low-rank training: weights are held, and what is merged has the codes of training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from quant_models import IDS, float_model, logits, plan
from tiny_runs import read, same_process, tiny_run

from qat import pipeline
from qat.checkpoints import Checkpoints
from qat.checks import check
from qat.cli.compose import compose_run
from qat.config import DataConfig
from qat.data import load_windows
from qat.insert import FakeQuantOptions, insert
from qat.metrics import Metrics
from qat.nn.quant import quantized_weights
from qat.train import fit as loop
from qat.train.calibrate import calibrate
from qat.train.fit import FitOptions, fit
from qat.train.losses import LossWeights
from qat.train.low_rank import LowRank, attach, merge
from qat.train.module import CausalLMModule, OptimOptions
from qat.train.phases import PhaseEntry

OPTIM = OptimOptions(2e-2, 1e-2, 0.0, (0.9, 0.95), 0.0, 0.1, 1.0, steps=8)
OPTIONS = FitOptions(
    precision="fp32", max_steps=8, batch_size=4, layer_stats_every=4, trains="low_rank", rank=4, alpha=8.0
)
QUANTIZE = (PhaseEntry(0, "fake_quantize"),)
CE = LossWeights(kl=0.0, ce=1.0)
CASES = [
    ("tiny_model_dir", "w4a16_g32", ("ste_clipped", "dynamic", "minmax")),
    ("tiny_model_dir", "w4a8_g32", ("lsq", "learned", "mse")),
    ("tiny_gpt2_dir", "w4a16_row", ("ste_clipped", "dynamic", "minmax")),
    ("tiny_mixtral_dir", "w4a16_g32", ("ste_clipped", "dynamic", "minmax")),
]


@pytest.fixture(scope="module")
def windows(tiny_text, tiny_tokenizer):
    return load_windows(DataConfig(path=str(tiny_text), block_size=32, eval_tokens=64), tiny_tokenizer).train


def student(folder, windows, scheme="w4a16_g32", how=("ste_clipped", "dynamic", "minmax")):
    model = float_model(folder)
    insert(model, plan(scheme), FakeQuantOptions(*how))
    calibrate(model, windows[:4], 2)
    return model


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("folder", "scheme", "how"), CASES)
def test_merged_codes_are_those_of_training(request, tmp_path, windows, monkeypatch, folder, scheme, how, precision):
    model, seen = student(request.getfixturevalue(folder), windows, scheme, how), {}
    before = state(model)

    def noted(trained):
        trained.eval()
        assert any(isinstance(module, LowRank) for module in trained.modules())
        seen.update({name: fake_quant.codes(weight) for name, weight, fake_quant in quantized_weights(trained)})
        seen["logits"] = logits(trained, IDS)
        merge(trained)

    monkeypatch.setattr(loop, "merge", noted)
    metrics = Metrics(tmp_path)
    fit(model, None, windows, CE, OPTIM, QUANTIZE, replace(OPTIONS, precision=precision), metrics)
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert losses[-1] < losses[0] - 0.05
    assert set(model.state_dict()) == set(before)
    assert torch.equal(logits(model, IDS), seen.pop("logits"))
    after = {name: fake_quant.codes(weight) for name, weight, fake_quant in quantized_weights(model)}
    assert all(torch.equal(after[name], codes) for name, codes in seen.items())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith(("proj.weight", "c_attn.weight")) for name in moved)
    assert not any("embed_tokens.weight" in name and "fake_quant" not in name for name in moved)
    assert not any("experts" in name and "fake_quant" not in name for name in moved)


def test_optimizer_holds_no_state_of_the_weights(tmp_path, tiny_model_dir, windows, monkeypatch):
    model, seen = student(tiny_model_dir, windows), []
    configure = CausalLMModule.configure_optimizers

    def noted(self):
        made = configure(self)
        seen.append((made["optimizer"], dict(self.student.named_parameters())))
        return made

    monkeypatch.setattr(CausalLMModule, "configure_optimizers", noted)
    fit(model, None, windows, CE, OPTIM, QUANTIZE, replace(OPTIONS, max_steps=1), Metrics(tmp_path))
    optimizer, parameters = seen[0]
    names = {id(parameter): name for name, parameter in parameters.items()}
    held = {names[id(parameter)].rpartition(".")[2] for parameter in optimizer.state}
    assert held == {"a", "b", "weight"}, "weight: of norms"
    assert all(parameter.dim() < 2 or names[id(parameter)][-2:] in (".a", ".b") for parameter in optimizer.state)


def test_nothing_changes_before_the_first_step(tiny_model_dir, windows):
    model = student(tiny_model_dir, windows).eval()
    before, there = logits(model, IDS), state(model)
    attach(model, 4, 8.0, seed=0)
    assert torch.equal(logits(model, IDS), before)
    merge(model)
    assert all(torch.equal(tensor, there[name]) for name, tensor in model.state_dict().items())


def test_cut_training_goes_on_bit_for_bit(tmp_path, tiny_model_dir, windows):
    ends = []
    for steps, name in ((8, "whole"), (5, "cut"), (8, "cut"), (8, "whole")):
        model, store = student(tiny_model_dir, windows), Checkpoints(tmp_path / name)
        options = replace(OPTIONS, max_steps=steps, checkpoint_every=4 if name == "whole" else 5)
        fit(model, None, windows, CE, OPTIM, QUANTIZE, options, Metrics(tmp_path / name), checkpoints=store)
        ends.append(state(model))
    for again in ends[2:]:
        assert all(torch.equal(again[name], tensor) for name, tensor in ends[0].items())


def test_run_serves_what_it_merged(tmp_path, tiny_model_dir, tiny_text, monkeypatch):
    monkeypatch.setattr(pipeline, "_fresh_process", same_process)
    stages = "stages.schedule=[{kind: end_to_end, rank: 4, lr: 0.01}, {kind: scales, steps: 2}]"
    run = tiny_run(tmp_path, tiny_model_dir, tiny_text, "distill=kl_ce", stages)
    assert read(run, "parity.json")["verdict"] == "equal"
    assert [stage["steps"] for stage in read(run, "results.json")["stages"]] == [2, 2]


def test_check_refuses_a_rank_under_fsdp2():
    config = compose_run(["model.path=m", "data.path=d", "stages=low_rank"])
    assert check(config) == []
    config.trainer.strategy, config.trainer.devices = "fsdp2", 2
    assert any("a rank needs whole weights on every process" in line for line in check(config))
