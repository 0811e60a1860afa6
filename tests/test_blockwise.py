"""Training block by block: errors fall, the best weights are kept, and a stopped training goes on bit for bit."""

from __future__ import annotations

import json
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
from qat.train import blockwise
from qat.train.blockwise import BlockOptions, fit_blocks
from qat.train.calibrate import calibrate
from qat.train.module import OptimOptions

OPTIM = OptimOptions(3e-3, 1e-2, 0.0, (0.9, 0.95), 0.1, 0.05, 1.0, steps=16)
OPTIONS = BlockOptions(precision="fp32", batch_size=4, windows=48)
LEARNED = ("lsq", "learned", "mse")


@pytest.fixture(scope="module")
def windows(tiny_text, tiny_tokenizer):
    return load_windows(DataConfig(path=str(tiny_text), block_size=32, eval_tokens=64), tiny_tokenizer).train


def pair(folder, windows, scheme="w2a16_g32", how=("ste_clipped", "dynamic", "minmax")):
    """A student and the float model it comes from, with activations large enough for rounding to matter."""
    floating = float_model(folder)
    for parameter in floating.parameters():
        parameter.data *= 4 if parameter.dim() >= 2 else 1
    student = float_model(folder)
    student.load_state_dict(floating.state_dict())
    insert(student, plan(scheme), FakeQuantOptions(*how))
    calibrate(student, windows[:4], 2)
    return student, floating


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(one: dict, other: dict) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def lines_of(metrics: Metrics) -> list[dict]:
    return [json.loads(line) for line in metrics.path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("folder", "scheme", "how", "share"),
    [
        ("tiny_model_dir", "w2a16_g32", ("ste_clipped", "dynamic", "minmax"), 0.8),
        ("tiny_model_dir", "w4a8_g32", LEARNED, 1.0),
        ("tiny_gpt2_dir", "w2a16_g32", LEARNED, 0.6),
        ("tiny_mixtral_dir", "w2a16_g32", ("ste_clipped", "dynamic", "minmax"), 0.8),
    ],
)
def test_error_of_every_block_falls_and_the_model_comes_nearer(request, tmp_path, windows, folder, scheme, how, share):
    student, floating = pair(request.getfixturevalue(folder), windows, scheme, how)
    before, theirs = state(student), state(floating)
    with torch.no_grad():
        wanted = floating(windows[:8], output_hidden_states=True).hidden_states[-1]
        first = (student(windows[:8], output_hidden_states=True).hidden_states[-1] - wanted).square().mean()
    metrics = Metrics(tmp_path)
    optim = OPTIM if scheme == "w2a16_g32" else replace(OPTIM, lr=5e-4, scale_lr=2e-3)
    result = fit_blocks(student, floating, windows, optim, OPTIONS, metrics)
    lines = lines_of(metrics)
    assert [(line["event"], line["block"], line["step"]) for line in lines] == [("block", 0, 16), ("block", 1, 32)]
    assert all(line["error_after"] < share * line["error_before"] for line in lines)
    with torch.no_grad():
        last = (result.model(windows[:8], output_hidden_states=True).hidden_states[-1] - wanted).square().mean()
    assert last < first
    assert not changed(state(floating), theirs)
    outside = {name for name in changed(state(student), before) if ".0." not in name and ".1." not in name}
    assert not outside, "embeddings, head and last norm belong to no block"
    assert (result.steps, result.tokens, len(result.step_seconds)) == (32, 16 * 4 * 32, 32)


def test_weights_that_do_worse_are_not_kept(tmp_path, tiny_model_dir, windows):
    student, floating = pair(tiny_model_dir, windows)
    before = state(student)
    wild = replace(OPTIM, lr=10.0, scale_lr=10.0)
    metrics = Metrics(tmp_path)
    fit_blocks(student, floating, windows, wild, OPTIONS, metrics)
    assert [line["best_step"] for line in lines_of(metrics)] == [0, 0]
    assert not changed(state(student), before)


@pytest.mark.parametrize("how", [("ste_clipped", "dynamic", "minmax"), LEARNED])
@pytest.mark.parametrize("step", [5, 20])
def test_stopped_training_goes_on_bit_for_bit(tmp_path, tiny_model_dir, windows, monkeypatch, step, how):
    whole, floating = pair(tiny_model_dir, windows, how=how)
    fit_blocks(whole, floating, windows, OPTIM, OPTIONS, Metrics(tmp_path / "whole"))
    asked, stop = signals.requested, []

    def requested():
        stop.append(1)
        return signals.PREEMPTED if len(stop) >= step else asked()

    store, metrics = Checkpoints(tmp_path / "cut"), Metrics(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(signals, "requested", requested)
        student, _ = pair(tiny_model_dir, windows, how=how)
        with pytest.raises(signals.Stopped):
            fit_blocks(student, floating, windows, OPTIM, OPTIONS, metrics, store)
    assert store.newest()[0].facts["step"] == step // 16
    student, _ = pair(tiny_model_dir, windows, how=how)
    fit_blocks(student, floating, windows, OPTIM, OPTIONS, metrics, store)
    assert not changed(state(student), state(whole))
    ends = [[{**line, "seconds": 0} for line in lines_of(Metrics(tmp_path / name))] for name in ("whole", "cut")]
    assert ends[0] == ends[1]


def test_gradient_that_is_not_finite_too_often_ends_the_training(tmp_path, tiny_model_dir, windows, monkeypatch):
    student, floating = pair(tiny_model_dir, windows)
    monkeypatch.setattr(blockwise, "_average_and_clip", lambda parameters, limit: float("nan"))
    with pytest.raises(UserError, match="block 0, step 3: loss and gradient must be finite"):
        fit_blocks(student, floating, windows, OPTIM, replace(OPTIONS, max_skipped_steps=2), Metrics(tmp_path))


def test_too_few_windows_are_refused(tmp_path, tiny_model_dir, windows):
    student, floating = pair(tiny_model_dir, windows)
    with pytest.raises(UserError, match="needs 8 windows, two batches for every process, got 6"):
        fit_blocks(student, floating, windows[:6], OPTIM, OPTIONS, Metrics(tmp_path))


def test_model_whose_blocks_want_more_than_hidden_states_is_refused(tmp_path, tiny_model_dir, windows):
    student, floating = pair(tiny_model_dir, windows)
    base, ids = floating.model, []

    def with_ids(module, given, named):
        return (given[0] + sum(base.embed_tokens(each) for each in ids), *given[1:]), named

    base.register_forward_pre_hook(lambda module, given: ids.append(given[0]))
    base.register_forward_hook(lambda module, given, out: ids.clear(), always_call=True)
    base.layers[1].register_forward_pre_hook(with_ids, with_kwargs=True)
    with pytest.raises(UserError, match="blocks of LlamaForCausalLM must depend on hidden states"):
        fit_blocks(student, floating, windows, OPTIM, OPTIONS, Metrics(tmp_path))
