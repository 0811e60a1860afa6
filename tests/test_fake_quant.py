"""FakeQuantize: what forward does is what codes and qparams say, in every mode and phase, and after a restart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qat import grid
from qat.errors import UserError
from qat.estimators import ESTIMATORS
from qat.fake_quant import FakeQuantize, Phase
from qat.scheme import QuantSpec

SPECS = {
    "tensor": QuantSpec(8, False, "tensor"),
    "channel": QuantSpec(4, True, "channel"),
    "group": QuantSpec(4, False, "group", 16),
}
TOKEN = QuantSpec(8, False, "token", dynamic=True, scale_dtype="float32", is_activation=True)
MODES = [("dynamic", "ste_clipped"), ("static", "ste_pass_through"), ("learned", "lsq"), ("learned", "lsq_plus")]
SHAPE = (5, 48)


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) + 0.3


def made(spec: QuantSpec, mode: str, estimator: str = "ste_clipped", shape: tuple[int, ...] = SHAPE) -> FakeQuantize:
    """Calibrated on `weight()` where the mode needs it; learned parameters moved off their start."""
    scale_shape = (1,) if spec.granularity == "token" else spec.scale_shape(shape)
    fake_quant = FakeQuantize(spec, scale_shape, ESTIMATORS[estimator], mode, "mse")
    if fake_quant.observer is not None:
        fake_quant.observer.observe(weight())
        fake_quant.adopt_observed()
    for shift in (fake_quant.scale_shift, fake_quant.zero_shift):
        if shift is not None:
            shift.data.uniform_(-0.3, 0.9, generator=torch.Generator().manual_seed(1))
    return fake_quant


def modes():
    return pytest.mark.parametrize(("mode", "estimator"), MODES, ids=[f"{m}-{e}" for m, e in MODES])


def specs():
    return pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@specs()
@modes()
def test_forward_is_exactly_what_codes_and_qparams_say(spec, mode, estimator):
    fake_quant, x = made(spec, mode, estimator), weight()
    for bits in (spec.bits, 8):
        fake_quant.set_phase(Phase(bits=bits))
        now, qparams = replace(spec, bits=bits), fake_quant.qparams(x)
        assert torch.equal(grid.round_scale(qparams.scale, spec), qparams.scale)
        for dtype in (torch.float32, torch.bfloat16):
            served = grid.dequantize(fake_quant.codes(x), qparams, now, dtype)
            assert torch.equal(fake_quant(x, dtype), served)


def test_dynamic_per_token_grid_stores_nothing():
    fake_quant = made(TOKEN, "dynamic")
    before = {key: tensor.clone() for key, tensor in fake_quant.state_dict().items()}
    x = torch.stack([weight(), 50 * weight(1)])
    y = fake_quant(x)
    fake_quant.freeze(None)
    assert not fake_quant.now.frozen
    assert torch.equal(fake_quant(x), y)
    assert torch.equal(fake_quant(x[1, 3:4]), y[1, 3:4])
    assert fake_quant.observer is None and not list(fake_quant.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in fake_quant.state_dict().items())


@specs()
@modes()
def test_state_dict_restores_grid_and_phase(spec, mode, estimator):
    fake_quant, x = made(spec, mode, estimator), weight()
    fake_quant.freeze(x)
    fake_quant.set_phase(replace(fake_quant.now, observing=fake_quant.observer is not None, bits=8))
    restored = FakeQuantize(spec, spec.scale_shape(SHAPE), ESTIMATORS[estimator], mode, "mse")
    restored.load_state_dict(fake_quant.state_dict())
    assert restored.now == fake_quant.now == Phase(fake_quant.observer is not None, True, True, 8)
    assert torch.equal(restored.codes(2 * x), fake_quant.codes(2 * x))


@specs()
@modes()
def test_frozen_grid_stays_when_the_weight_moves(spec, mode, estimator):
    fake_quant, x = made(spec, mode, estimator), weight()
    codes, qparams = fake_quant.codes(x), fake_quant.qparams(x)
    fake_quant.freeze(x)
    assert torch.equal(fake_quant.codes(x), codes)
    moved = fake_quant.qparams(3 * x)
    assert torch.equal(moved.scale, qparams.scale) and torch.equal(moved.zero_point, qparams.zero_point)
    assert not torch.equal(fake_quant.codes(3 * x), codes)


@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus"])
def test_frozen_learned_grid_stays_when_the_optimizer_moves_it_after_a_restart(estimator):
    spec = SPECS["group"]
    fake_quant, x = made(spec, "learned", estimator), weight()
    fake_quant.freeze(x)
    restored = FakeQuantize(spec, spec.scale_shape(SHAPE), ESTIMATORS[estimator], "learned", "mse")
    restored.load_state_dict(fake_quant.state_dict())
    for each in (fake_quant, restored):
        codes = each.codes(x)
        each(x).square().sum().backward()
        for shift in each.parameters():
            assert shift.grad is not None and not shift.grad.any()  # in the graph, as DDP demands of every parameter
            shift.data += 0.5  # momentum from before
        assert torch.equal(each.codes(x), codes)


@specs()
@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus"])
def test_learned_grid_gets_gradients_relative_to_the_scale(spec, estimator):
    fake_quant, x = made(spec, "learned", estimator), 3 * weight()
    fake_quant(x).square().sum().backward()
    raw = (fake_quant.scale * (1 + fake_quant.scale_shift)).detach().requires_grad_()
    zero = fake_quant.zero_point + (0 if fake_quant.zero_shift is None else fake_quant.zero_shift.detach())
    from qat.estimators import fake_quantize

    fake_quantize(x, raw, zero, spec, ESTIMATORS[estimator], torch.float32).square().sum().backward()
    torch.testing.assert_close(fake_quant.scale_shift.grad, raw.grad * fake_quant.scale)
    assert fake_quant.scale_shift.grad.any()
    if fake_quant.zero_shift is not None:
        assert fake_quant.zero_shift.grad.any()


def test_symmetric_grid_has_no_zero_point_to_learn():
    fake_quant, x = made(SPECS["channel"], "learned", "lsq_plus"), 3 * weight()
    assert fake_quant.zero_shift is None and [name for name, _ in fake_quant.named_parameters()] == ["scale_shift"]
    fake_quant(x).square().sum().backward()
    other = made(SPECS["channel"], "learned", "lsq")
    other.load_state_dict(fake_quant.state_dict())
    other(x).square().sum().backward()
    assert torch.equal(fake_quant.scale_shift.grad, other.scale_shift.grad)


@modes()
def test_observing_without_quantizing_passes_values_through(mode, estimator):
    fake_quant, x = made(SPECS["channel"], mode, estimator), weight()
    fake_quant.set_phase(Phase(observing=True, quantizing=False, bits=4))
    assert torch.equal(fake_quant(10 * x), 10 * x)
    assert fake_quant(x, torch.bfloat16).dtype == torch.bfloat16
    if fake_quant.observer is not None:
        assert int(fake_quant.observer.count) == 3


def test_forward_answers_in_the_type_of_the_next_matmul():
    fake_quant, x = made(SPECS["channel"], "dynamic"), weight()
    assert fake_quant(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fake_quant(x), fake_quant(x, torch.float32).bfloat16())


def test_narrower_bits_use_the_narrower_range():
    fake_quant, x = made(SPECS["channel"], "dynamic"), weight()
    seen = {}
    for bits in (8, 6, 4):
        fake_quant.set_phase(Phase(bits=bits))
        codes = fake_quant.codes(x)
        low, high = grid.code_range(fake_quant.current_spec)
        assert low <= int(codes.min()) and int(codes.max()) <= high
        seen[bits] = (int(codes.abs().max()), float((fake_quant(x) - x).square().sum()))
    assert seen[8][0] > seen[6][0] > seen[4][0]
    assert seen[8][1] < seen[6][1] < seen[4][1]


@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus"])
@pytest.mark.parametrize("shift", [-1.0, -5.0, -1e30, 1e30])
@specs()
def test_learned_scale_that_leaves_its_range_stays_a_grid(spec, estimator, shift):
    """A shift below -1 would make the scale negative: it stops at the smallest one, and its gradient is finite."""
    fake_quant, x = made(spec, "learned", estimator), weight()
    fake_quant.scale_shift.data.fill_(shift)
    qparams = fake_quant.qparams(x)
    assert (qparams.scale >= grid.SCALE_MIN).all() and (qparams.scale <= grid.SCALE_MAX).all()
    y = fake_quant(x)
    assert torch.isfinite(y).all()
    assert torch.equal(y, grid.dequantize(fake_quant.codes(x), qparams, spec))
    y.square().sum().backward()
    assert torch.isfinite(fake_quant.scale_shift.grad).all()


def test_adopting_a_range_needs_data_first():
    fake_quant = FakeQuantize(SPECS["tensor"], (1,), ESTIMATORS["ste_clipped"], "static", "minmax")
    with pytest.raises(UserError, match="calibration: an observer must see data, got none"):
        fake_quant.adopt_observed()


@modes()
def test_meta_device_construction_has_final_shapes_and_loads_by_assignment(mode, estimator):
    spec = SPECS["group"]
    real = made(spec, mode, estimator)
    real.set_phase(Phase(bits=6))
    with torch.device("meta"):
        empty = FakeQuantize(spec, spec.scale_shape(SHAPE), ESTIMATORS[estimator], mode, "mse")
    want = {key: (tensor.shape, tensor.dtype) for key, tensor in real.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in empty.state_dict().items()} == want
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(real.state_dict(), assign=True)
    assert empty.now == real.now
    assert torch.equal(empty.codes(weight()), real.codes(weight()))
