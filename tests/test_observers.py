"""Observers: what each answers, and what all of them promise."""

from __future__ import annotations

import pytest
import torch

from qat import grid
from qat.errors import UserError
from qat.observers import OBSERVERS
from qat.observers.histogram import BINS
from qat.observers.mse import NORM
from qat.scheme import QuantSpec

TENSOR = QuantSpec(8, False, "tensor")
ROW = QuantSpec(4, False, "channel")
GROUP = QuantSpec(4, True, "group", 16)
WEIGHT_OBSERVERS = [name for name in OBSERVERS if name != "histogram"]
SHAPE = (5, 48)


def normal(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def watching(name: str, spec: QuantSpec, *tensors: torch.Tensor):
    observer = OBSERVERS[name](spec, (1,) if spec.granularity == "tensor" else spec.scale_shape(SHAPE))
    for tensor in tensors:
        observer.observe(tensor)
    return observer


def specs_of(name: str) -> list[QuantSpec]:
    return [TENSOR] if name == "histogram" else [TENSOR, ROW, GROUP]


@pytest.mark.parametrize("name", OBSERVERS)
def test_observer_answers_a_storable_grid_of_the_final_shape(name):
    for spec in specs_of(name):
        observer = watching(name, spec, normal(), normal(1))
        scale, zero_point = observer.qparams(spec)
        low, high = grid.code_range(spec)
        assert scale.shape == zero_point.shape == observer.low.shape
        assert torch.equal(scale, grid.round_scale(scale, spec)) and (scale > 0).all()
        assert zero_point.dtype == torch.int32
        assert low <= int(zero_point.min()) and int(zero_point.max()) <= high
        assert int(observer.count) == 2


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", OBSERVERS)
def test_observer_refuses_values_that_are_not_finite(name, poison):
    for spec in specs_of(name):
        observer = watching(name, spec, normal())
        before = {key: tensor.clone() for key, tensor in observer.state_dict().items()}
        bad = normal(1)
        bad[2, 7] = poison
        with pytest.raises(UserError, match="observer: values must be finite, got NaN or infinity"):
            observer.observe(bad)
        assert all(torch.equal(tensor, before[key]) for key, tensor in observer.state_dict().items())


@pytest.mark.parametrize("name", OBSERVERS)
def test_observer_goes_on_from_a_restored_state(name):
    for spec in specs_of(name):
        observer, restored = watching(name, spec, normal()), watching(name, spec)
        shapes = {key: tensor.shape for key, tensor in restored.state_dict().items()}
        restored.load_state_dict(observer.state_dict())
        assert {key: tensor.shape for key, tensor in restored.state_dict().items()} == shapes
        for each in (observer, restored):
            each.observe(2 * normal(1))
        for have, want in zip(restored.qparams(spec), observer.qparams(spec), strict=True):
            assert torch.equal(have, want)


@pytest.mark.parametrize("name", OBSERVERS)
def test_observer_sees_all_leading_dimensions_of_an_input(name):
    flat, batch = watching(name, TENSOR, normal(0, (6, 8))), watching(name, TENSOR, normal(0, (6, 8)).view(2, 3, 8))
    assert torch.equal(flat.low, batch.low) and torch.equal(flat.high, batch.high)


@pytest.mark.parametrize("name", OBSERVERS)
def test_observer_answers_other_widths_from_the_same_state(name):
    observer = watching(name, TENSOR, normal())
    wide, narrow = (observer.qparams(QuantSpec(bits, False, "tensor")).scale for bits in (8, 4))
    assert 5 < float(narrow / wide) <= 17.1


@pytest.mark.parametrize("spec", [TENSOR, ROW, GROUP], ids=lambda spec: spec.describe())
def test_minmax_is_the_exact_range_in_any_order(spec):
    tensors = [normal(seed) * (seed + 1) for seed in range(3)]
    forward, backward = watching("minmax", spec, *tensors), watching("minmax", spec, *reversed(tensors))
    low, high = grid.min_max(torch.stack(tensors).permute(1, 2, 0).contiguous().flatten(1), TENSOR)
    if spec is TENSOR:
        assert (float(forward.low), float(forward.high)) == (float(low), float(high))
    if spec is ROW:
        assert torch.equal(forward.low, torch.cat(tensors, 1).amin(1, keepdim=True))
        assert torch.equal(forward.high, torch.cat(tensors, 1).amax(1, keepdim=True))
    assert torch.equal(forward.low, backward.low) and torch.equal(forward.high, backward.high)


def test_minmax_does_not_hold_zero_it_has_not_seen():
    observer = watching("minmax", TENSOR, torch.tensor([[3.0, 5.0]]), torch.tensor([[4.0, 6.0]]))
    assert (float(observer.low), float(observer.high)) == (3.0, 6.0)


def test_moving_average_gives_hand_values():
    tensors = [torch.tensor([[-1.0, 2.0]]), torch.tensor([[-3.0, 12.0]]), torch.tensor([[-2.0, 0.0]])]
    observer = watching("moving_average", TENSOR, *tensors)
    assert float(observer.low) == pytest.approx(0.9 * (0.9 * -1 + 0.1 * -3) + 0.1 * -2)
    assert float(observer.high) == pytest.approx(0.9 * (0.9 * 2 + 0.1 * 12) + 0.1 * 0)


@pytest.mark.parametrize("spec", [ROW, TENSOR], ids=lambda spec: spec.describe())
def test_percentile_clips_an_outlier_and_keeps_the_rest(spec):
    x = torch.linspace(-1, 1, 2000).repeat(5, 1)
    x[:, 3] = 1000.0
    observer = watching("percentile", spec, x)
    # the outlier and the share of 0.1 % beyond it: one or two of 2000 values at the upper end
    assert float(observer.high.min()) > 0.99 and float(observer.high.max()) < 1
    assert float(observer.low.min()) > -1 and float(observer.low.max()) < -0.99


def test_percentile_of_short_groups_is_their_range():
    observer = watching("percentile", GROUP, normal())
    low, high = grid.min_max(normal(), GROUP)
    assert torch.equal(observer.low, low) and torch.equal(observer.high, high)


@pytest.mark.parametrize("spec", [QuantSpec(3, True, "tensor"), ROW, GROUP], ids=lambda spec: spec.describe())
def test_mse_is_never_worse_than_minmax_in_its_own_norm(spec):
    x = normal() ** 3
    errors = {}
    for name in ("mse", "minmax"):
        qparams = watching(name, spec, x).qparams(spec)
        error = (grid.fake_quantize(x, qparams, spec, torch.float32) - x).abs().pow(NORM)
        errors[name] = error.sum() if spec.granularity == "tensor" else grid.group_view(error, spec).sum(-1)
    assert (errors["mse"] <= errors["minmax"]).all()
    assert errors["mse"].sum() < errors["minmax"].sum()


def test_histogram_refuses_grids_with_more_than_one_range():
    with pytest.raises(UserError, match=r"one histogram per layer \(granularity=tensor\), got channel"):
        OBSERVERS["histogram"](ROW, (5, 1))


def test_histogram_keeps_every_count_when_its_reach_doubles():
    tensors = [normal(seed) * 10**seed for seed in range(4)]
    observer = watching("histogram", TENSOR, *tensors)
    assert float(observer.counts.sum()) == 4 * normal().numel()
    width = 2 * float(observer.reach) / BINS
    # the first tensor is a thousandth of the last: all of it lies in the innermost bins
    inner = observer.counts[BINS // 2 - 16 : BINS // 2 + 16].sum()
    assert float(inner) >= sum(int((tensor.abs() < 15 * width).sum()) for tensor in tensors)


def test_histogram_does_not_depend_on_the_order_of_the_tensors():
    tensors = [normal(seed) * (1 + 3 * seed) for seed in range(4)]
    forward, backward = watching("histogram", TENSOR, *tensors), watching("histogram", TENSOR, *reversed(tensors))
    for key, tensor in forward.state_dict().items():
        assert torch.equal(tensor, backward.state_dict()[key]), key
    assert torch.equal(forward.qparams(TENSOR).scale, backward.qparams(TENSOR).scale)


def test_histogram_clips_an_outlier_where_the_squared_error_says_so():
    spec = QuantSpec(4, True, "tensor", is_activation=True)
    x = torch.cat([normal(0, (1, 20000)), torch.tensor([[40.0]])], 1)
    clipped, whole = (watching(name, spec, x).qparams(spec) for name in ("histogram", "minmax"))
    errors = [(grid.fake_quantize(x, q, spec, torch.float32) - x).square().sum() for q in (clipped, whole)]
    assert float(clipped.scale) < 0.5 * float(whole.scale)
    assert errors[0] < 0.5 * errors[1]


def test_histogram_of_zeros_has_a_finite_grid_and_goes_on():
    observer = watching("histogram", TENSOR, torch.zeros(SHAPE))
    assert torch.isfinite(observer.qparams(TENSOR).scale).all()
    observer.observe(normal())
    assert float(observer.counts.sum()) == 2 * normal().numel()
