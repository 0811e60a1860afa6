"""The training loop on tiny models: it learns, it repeats bit for bit, and it writes down what it did."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from itertools import islice

import pytest
import torch
from quant_models import float_model, plan

from qat.checkpoints import Checkpoints
from qat.config import DataConfig
from qat.data import load_windows
from qat.errors import UserError
from qat.insert import FakeQuantOptions, insert
from qat.metrics import Metrics
from qat.nn.quant import quantized_weights
from qat.train.calibrate import calibrate
from qat.train.data import WindowSampler, train_loader
from qat.train.fit import FitOptions, as_teacher, fit
from qat.train.losses import LossWeights
from qat.train.module import CausalLMModule, OptimOptions
from qat.train.phases import PhaseEntry

OPTIM = OptimOptions(1e-2, 1e-2, 0.0, (0.9, 0.95), 0.0, 0.1, 1.0, steps=8)
OPTIONS = FitOptions(precision="fp32", max_steps=8, batch_size=4, layer_stats_every=0)
QUANTIZE = (PhaseEntry(0, "fake_quantize"),)
CE = LossWeights(kl=0.0, ce=1.0)


@pytest.fixture(scope="module")
def windows(tiny_text, tiny_tokenizer):
    return load_windows(DataConfig(path=str(tiny_text), block_size=32, eval_tokens=64), tiny_tokenizer).train


def student(folder, scheme="w4a16_g32", estimator="ste_clipped", scale="dynamic", observer="minmax"):
    model = float_model(folder)
    insert(model, plan(scheme), FakeQuantOptions(estimator, scale, observer))
    return model


@pytest.fixture
def train(windows, tmp_path, tiny_model_dir):
    """Trains a fresh student (or the given model) and returns the result with what metrics.jsonl holds."""

    def go(model=None, loss=CE, optim=OPTIM, schedule=QUANTIZE, teacher=None, data=windows, score=None, **options):
        model = model or student(tiny_model_dir)
        calibrate(model, data[:4], 2)
        chosen = replace(OPTIONS, **options)
        metrics = Metrics(tmp_path)
        metrics.path.unlink(missing_ok=True)
        optim = replace(optim, steps=chosen.max_steps)
        result = fit(
            model, teacher, data, loss, optim, schedule, chosen, metrics, score, Checkpoints(tmp_path / "checkpoints")
        )
        lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
        return result, lambda event: [line for line in lines if line["event"] == event]

    return go


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("scheme", "estimator", "scale"),
    [
        ("w4a16_g32", "ste_clipped", "dynamic"),
        ("w4a16_row", "ste_pass_through", "static"),
        ("w4a8_g32", "lsq", "learned"),
        ("w4a16_g32_asym", "lsq_plus", "learned"),
    ],
)
def test_loss_falls(train, tiny_model_dir, scheme, estimator, scale):
    observer = "minmax" if scale == "dynamic" else "mse"
    result, lines = train(student(tiny_model_dir, scheme, estimator, scale, observer), max_steps=12)
    losses = [line["loss"] for line in lines("train")]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5, "from about ln 300 = 5.7"
    assert result.steps == 12
    assert len(result.step_seconds) == 12
    assert not result.model.training


def test_kl_to_a_float_teacher_falls_and_leaves_the_teacher_alone(train, tiny_model_dir):
    teacher = as_teacher(float_model(tiny_model_dir), "fp32")
    # logits far enough from uniform for rounding to matter
    model = student(tiny_model_dir, "w2a16_g32")
    for each in (teacher, model):
        for parameter in each.parameters():
            parameter.data *= 4 if parameter.dim() >= 2 else 1
    before = state(teacher)
    slow = replace(OPTIM, lr=1e-3)
    _, lines = train(model, LossWeights(kl=1.0, ce=0.0), slow, teacher=teacher, max_steps=12)
    kl = [line["kl"] for line in lines("train")]
    assert kl[-1] < 0.7 * kl[0]
    assert [line["ce"] for line in lines("train")] == [None] * 12
    assert same(state(teacher), before)
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("folder", ["tiny_model_dir", "tiny_gpt2_dir", "tiny_mixtral_dir"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_with_one_seed_are_bit_equal(train, request, folder, precision):
    # GPT-2 has dropout
    folder = request.getfixturevalue(folder)
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        result, lines = train(student(folder), max_steps=3, precision=precision)
        results.append((state(result.model), [line["loss"] for line in lines("train")]))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_another_seed_sees_the_windows_in_another_order(train):
    losses = [[line["loss"] for line in train(max_steps=3, seed=seed)[1]("train")] for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_accumulated_half_batches_train_as_the_whole_batch(train):
    # float32 sums in another order, through Adam, whose first step is lr * sign(g): plain SGD-like eps is not offered
    models = [train(max_steps=3, batch_size=b, accumulate=a)[0] for b, a in ((4, 1), (2, 2), (1, 4))]
    assert len({(result.steps, result.tokens) for result in models}) == 1
    whole = state(models[0].model)
    for result in models[1:]:
        for name, tensor in state(result.model).items():
            far = (tensor - whole[name]).abs() > 1e-4
            assert float(far.float().mean()) < 0.01, name


@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_every_step_sees_its_number_of_windows_when_the_text_is_short(train, windows, count):
    result, lines = train(data=windows[:count], max_steps=4, batch_size=2, accumulate=2)
    assert [line["step"] for line in lines("train")] == [1, 2, 3, 4]
    assert len(result.step_seconds) == result.steps == 4
    assert result.tokens == 4 * 2 * 2 * 32


def test_gradient_norm_is_clipped_before_the_step_and_logged_before_the_clip(train, monkeypatch):
    limits, after = [], []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        norm = clip(parameters, limit)
        limits.append(limit)
        after.append(float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    _, lines = train(optim=replace(OPTIM, grad_clip=0.01), max_steps=2)
    logged = [line["grad_norm"] for line in lines("train")]
    assert all(norm > 0.02 for norm in logged)
    assert after == pytest.approx([0.01, 0.01], rel=1e-3)
    after.clear()
    _, lines = train(optim=replace(OPTIM, grad_clip=0.0), max_steps=2)
    assert after == pytest.approx([line["grad_norm"] for line in lines("train")], rel=1e-4)
    assert limits == [0.01, 0.01, float("inf"), float("inf")]


def test_learned_scales_move_at_their_own_rate_without_decay(train, tiny_model_dir):
    # a decay that would shrink anything it touches to nothing
    optim = replace(OPTIM, lr=1e-9, weight_decay=0.5 / 1e-9, scale_lr=1e-3)
    model = student(tiny_model_dir, "w4a16_g32", "lsq", "learned", "mse")
    result, _ = train(model, optim=optim, max_steps=3)
    for name, weight, fake_quant in quantized_weights(result.model):
        assert fake_quant.scale_shift.any(), name
        assert float(fake_quant.scale_shift.detach().abs().max()) < 5e-3
        assert float(weight.detach().abs().max()) < 0.2, "weights do decay"
    norm = result.model.get_submodule("model.norm").weight
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=0, atol=1e-6)


def test_optimizer_has_three_groups_with_every_parameter_once(tiny_model_dir):
    model = student(tiny_model_dir, "w4a16_g32_asym", "lsq_plus", "learned", "mse")
    optim = OptimOptions(1e-3, 1e-2, 0.1, (0.9, 0.95), 0.5, 0.1, 1.0, steps=8)
    chosen = CausalLMModule(model, None, CE, optim, QUANTIZE).configure_optimizers()
    groups = chosen["optimizer"].param_groups
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0), (1e-2, 0)]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters()})
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("_shift") for p in groups[2]["params"])
    assert all(p.dim() < 2 for p in groups[1]["params"])


def test_learning_rate_warms_up_and_ends_at_its_share(train):
    optim = replace(OPTIM, warmup_fraction=0.5, final_lr_fraction=0.1)
    _, lines = train(optim=optim, max_steps=8)
    rates = [line["lr"] for line in lines("train")]
    assert rates[:5] == pytest.approx([0.2e-2, 0.4e-2, 0.6e-2, 0.8e-2, 1e-2])
    # the cosine from 1 to 0.1, a quarter, a half and three quarters through
    assert rates[5:] == pytest.approx([0.8682e-2, 0.55e-2, 0.2318e-2], rel=1e-3)


def test_layer_lines_say_how_every_weight_is(train):
    result, lines = train(max_steps=5, layer_stats_every=2)
    layers = lines("layers")
    assert [line["step"] for line in layers] == [1, 2, 4]
    names = {name for name, _, _ in quantized_weights(result.model)}
    assert all(set(line["layers"]) == names for line in layers)
    first, last = layers[0]["layers"], layers[-1]["layers"]
    for name in names:
        assert first[name]["flip_rate"] is None
        assert first[name]["scale_drift"] == 0
        assert 0 < last[name]["flip_rate"] < 1
        assert last[name]["scale_drift"] > 0
        assert 10 < last[name]["sqnr_db"] < 60
        assert last[name]["clip_share"] == pytest.approx(0, abs=0.05)


def test_validation_lines_are_written_every_so_many_steps_in_eval_mode(train):
    modes = []

    def score(model):
        modes.append(model.training)
        return 12.5

    result, lines = train(max_steps=5, eval_every=2, score=score, accumulate=2, batch_size=2)
    assert [(line["step"], line["perplexity"]) for line in lines("validation")] == [(0, 12.5), (2, 12.5), (4, 12.5)]
    assert modes == [False, False, False]
    assert result.steps == 5


def test_phase_lines_mark_every_change(train):
    schedule = [PhaseEntry(0, "observe"), PhaseEntry(2, "fake_quantize"), PhaseEntry(3, "freeze_scales")]
    result, lines = train(schedule=schedule, max_steps=4)
    assert [(line["step"], line["phase"]) for line in lines("phase")] == [
        (1, "observe"),
        (3, "fake_quantize"),
        (4, "frozen"),
    ]
    assert all(fake_quant.now.frozen for _, _, fake_quant in quantized_weights(result.model))


def test_log_every_thins_the_train_lines(train):
    _, lines = train(max_steps=6, log_every=3)
    assert [line["step"] for line in lines("train")] == [3, 6]


def test_control_without_schedule_is_the_plain_float_model(train, tiny_model_dir):
    result, lines = train(float_model(tiny_model_dir), schedule=(), layer_stats_every=1, max_steps=3)
    assert not list(quantized_weights(result.model))
    assert {type(m).__name__ for m in result.model.modules() if "Quant" in type(m).__name__} == set()
    assert lines("layers") == []
    assert [line["phase"] for line in lines("phase")] == ["float"]
    assert set(state(result.model)) == set(state(float_model(tiny_model_dir)))


def test_steps_that_are_not_finite_are_skipped_and_then_end_the_run_with_a_way_out(train, tiny_model_dir, capsys):
    model = student(tiny_model_dir)
    model.get_submodule("model.norm").weight.data[3] = float("inf")
    before = state(model)
    wanted = (
        r"^step 3: loss and gradient must be finite, got NaN or infinity for the 3\. time in a row\. Lower optim\.lr"
    )
    with pytest.raises(UserError, match=wanted) as caught:
        train(model, max_skipped_steps=2)
    assert not caught.value.before_work
    assert capsys.readouterr().err.count("the step is skipped") == 2
    assert same(state(model), before)


def test_one_step_that_is_not_finite_is_skipped_and_the_rest_trained(train, tiny_model_dir, monkeypatch):
    honest = CausalLMModule.losses

    def sometimes(self, ids):
        loss, ce, kl = honest(self, ids)
        return (loss * float("nan") if self.global_step == 2 else loss), ce, kl

    monkeypatch.setattr(CausalLMModule, "losses", sometimes)
    result, lines = train(student(tiny_model_dir), max_steps=6, max_skipped_steps=1)
    assert all(torch.isfinite(tensor).all() for tensor in state(result.model).values())
    assert lines("train")[-1]["loss"] < lines("train")[0]["loss"]


def test_loss_that_stays_far_above_its_first_is_said_once_with_a_hint(train, tiny_model_dir, monkeypatch, capsys):
    def said() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]

    train(student(tiny_model_dir))
    assert said() == []
    honest, told = CausalLMModule.losses, (1.0, 1.9, 2.5, 2.5, 1.5, 2.5, 2.5, 2.5, 2.5)

    def rising(self, ids):
        loss, ce, kl = honest(self, ids)
        return loss, torch.full_like(ce, told[self.global_step]), kl

    monkeypatch.setattr(CausalLMModule, "losses", rising)
    train(student(tiny_model_dir), max_steps=9)
    (line,) = said()
    assert line == (
        "warning: step 8 (fake_quantize): the loss is 2.5, in the first step of this phase it was 1. "
        "Lower optim.lr, or delay fake quantization with phases=delayed."
    )


def test_interrupt_reaches_the_caller(train):
    handler = signal.getsignal(signal.SIGINT)

    def score(model):
        raise KeyboardInterrupt("control-c")

    try:
        with pytest.raises(KeyboardInterrupt, match="control-c"):
            train(max_steps=3, eval_every=1, score=score)
    finally:
        # Lightning ignores further ones while it shuts down
        signal.signal(signal.SIGINT, handler)


def test_gradient_checkpointing_trains_the_same_weights(train, tiny_model_dir):
    plain, checkpointed = (train(max_steps=2, gradient_checkpointing=on)[0] for on in (False, True))
    assert same(state(plain.model), state(checkpointed.model))


def test_teacher_under_bf16_keeps_a_tied_table_in_float32(tiny_model_dir, tiny_mixtral_dir):
    tied = as_teacher(float_model(tiny_model_dir), "bf16")
    assert tied.get_input_embeddings().weight.dtype == torch.float32
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert tied.get_submodule("model.layers.0.self_attn.q_proj").weight.dtype == torch.bfloat16
    untied = as_teacher(float_model(tiny_mixtral_dir), "bf16")
    assert untied.get_output_embeddings().weight.dtype == torch.bfloat16


def test_sampler_deals_every_window_to_one_process_in_each_epoch(windows):
    count = len(windows)
    first = [list(islice(WindowSampler(count, 5, rank, 3), count)) for rank in range(3)]
    stream = [index for turn in zip(*first, strict=True) for index in turn]
    epochs = [stream[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(islice(WindowSampler(count, 6), count)) != epochs[0]


def test_loader_gives_whole_batches_when_the_windows_do_not_divide(windows):
    batches = list(islice(train_loader(windows[:7], 3, seed=0), 7))
    assert {batch.shape for batch in batches} == {(3, 32)}
    seen = torch.cat(batches)
    assert all(int((seen == window).all(-1).sum()) == 3 for window in windows[:7])


def test_adafactor_learns_with_factored_states_and_goes_on_bit_for_bit(train, tiny_model_dir, tmp_path):
    factored = replace(OPTIM, kind="adafactor", lr=1e-2)

    def model():
        return student(tiny_model_dir, "w4a16_g32", "lsq", "learned", "mse")

    whole, lines = train(model(), optim=factored, max_steps=8, checkpoint_every=4)
    losses = [line["loss"] for line in lines("train")]
    assert losses[-1] < losses[0] - 0.3
    state_dict = state(whole.model)
    newest = Checkpoints(tmp_path / "checkpoints").newest()[0]
    states = {name: newest.shape(name) for name in newest.names if name.startswith("optim.")}
    assert states["optim.model.layers.0.mlp.up_proj.weight.row_var"] == (128, 1)
    assert sum(torch.Size(shape).numel() for shape in states.values()) < 0.1 * sum(
        parameter.numel() for parameter in whole.model.parameters()
    )
    shutil.rmtree(newest.folder)
    again, _ = train(model(), optim=factored, max_steps=8)
    assert same(state(again.model), state_dict)
