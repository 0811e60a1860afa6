"""Gradients of fake quantization against hand values and against plain autograd."""

from __future__ import annotations

import pytest
import torch
from tolerances import FLOAT32_SUM

from qat import grid
from qat.estimators import ESTIMATORS, fake_quantize
from qat.scheme import QuantSpec

GRIDS = {
    "tensor": QuantSpec(4, False, "tensor"),
    "channel": QuantSpec(4, False, "channel"),
    "group": QuantSpec(3, False, "group", 16),
    "sym-group": QuantSpec(4, True, "group", 16),
    "sym-tensor": QuantSpec(8, True, "tensor"),
}
SHAPES = [(1, 16), (5, 48), (2, 3, 32)]


def inputs(spec: QuantSpec, shape: tuple[int, ...]):
    """x with about a tenth of its values clipped, raw (unrounded) scale and zero point, and a gradient."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator)
    qparams = grid.choose_qparams(*(0.6 * end for end in grid.min_max(x, spec)), spec)
    scale = qparams.scale * (1 + 0.1 * torch.rand(qparams.scale.shape, generator=generator))
    zero_point = qparams.zero_point.float()
    if not spec.symmetric:
        zero_point = zero_point + 0.3 * torch.rand(scale.shape, generator=generator)
    tensors = [tensor.requires_grad_() for tensor in (x, scale, zero_point)]
    return *tensors, torch.randn(shape, generator=generator)


def straight(rounded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`rounded` in value, x in gradient."""
    return x + (rounded - x).detach()


def by_autograd(x, scale, zero_point, spec, name):
    """The same function from torch operations and detach alone; dscale and dzero_point follow from the chain rule."""
    estimator = ESTIMATORS[name]
    scale = scale if estimator.learns_scale else scale.detach()
    zero_point = zero_point if estimator.learns_zero_point else zero_point.detach()
    low, high = grid.code_range(spec)
    scale_G = straight(grid.round_scale(scale, spec), scale).unsqueeze(-1)
    zero_G = straight(torch.round(zero_point).clamp(low, high), zero_point).unsqueeze(-1)
    v = grid.group_view(x, spec) / scale_G
    y = ((straight(torch.round(v), v) + zero_G).clamp(low, high) - zero_G) * scale_G
    y = y.reshape(x.shape)
    return y if estimator.clipped else straight(y, x)


def gradients(function, x, scale, zero_point, grad, *rest):
    y = function(x, scale, zero_point, *rest)
    return y, torch.autograd.grad(y, (x, scale, zero_point), grad, allow_unused=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_matches_plain_autograd(name, spec, shape):
    x, scale, zero_point, grad = inputs(spec, shape)
    y, ours = gradients(fake_quantize, x, scale, zero_point, grad, spec, ESTIMATORS[name], torch.float32)
    expected, wanted = gradients(by_autograd, x, scale, zero_point, grad, spec, name)
    assert torch.equal(y, expected)
    assert torch.equal(ours[0] == 0, wanted[0] == 0)
    for have, want in zip(ours, wanted, strict=True):
        assert (have is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(have, want, rtol=FLOAT32_SUM, atol=FLOAT32_SUM * 10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_gives_hand_values(name):
    spec = QuantSpec(4, symmetric=False)
    x = torch.tensor([[0.15, 10.0, -10.0, 0.8]], requires_grad=True)
    scale, zero_point = torch.tensor([[0.5]]).requires_grad_(), torch.tensor([[2.0]]).requires_grad_()
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    args = (x, scale, zero_point, grad, spec, ESTIMATORS[name], torch.float32)
    y, (dx, dscale, dzero) = gradients(fake_quantize, *args)
    assert y.tolist() == [[0.0, 2.5, -5.0, 1.0]]  # codes 2, 7, -8, 4
    assert dx.tolist() == [[1.0, 0.0, 0.0, 4.0]] if name != "ste_pass_through" else torch.equal(dx, grad)
    # codes minus zero point 5 and -10 where clipped, round(v) - v where not: v = 0.3 and 1.6
    hand = 1 * (0 - 0.3) + 2 * 5 + 3 * -10 + 4 * (2 - 1.6)
    assert dscale is None or float(dscale) == pytest.approx(hand, rel=FLOAT32_SUM)
    assert dzero is None or float(dzero) == -(2 + 3) * 0.5
    assert (dscale is not None, dzero is not None) == (name.startswith("lsq"), name == "lsq_plus")


def test_clipped_gradient_is_zero_at_a_tie_that_rounds_out_of_the_range():
    # 7.5 rounds to 8 and is clamped to 7; -8.5 rounds to -8, which is a code. Largest weights of symmetric groups
    # sit at 7.5 whenever their magnitude divided by 7.5 is exact in bfloat16.
    x = torch.tensor([[7.5, -8.5, 6.5, -7.5]], requires_grad=True)
    scale = torch.ones(1, 1, requires_grad=True)
    y = fake_quantize(x, scale, torch.zeros(1, 1), QuantSpec(4), ESTIMATORS["lsq"], torch.float32)
    dx, dscale = torch.autograd.grad(y.sum(), (x, scale))
    assert y.tolist() == [[7.0, -8.0, 6.0, -8.0]]
    assert dx.tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert float(dscale) == 7 + 0.5 - 0.5 - 0.5


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_keep_their_parameters_dtype_under_autocast(name):
    spec = GRIDS["group"]
    x, scale, zero_point, grad = inputs(spec, (5, 48))
    args = (x, scale, zero_point, grad.bfloat16(), spec, ESTIMATORS[name], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, ours = gradients(fake_quantize, *args)
    _, wanted = gradients(by_autograd, x, scale, zero_point, grad.bfloat16().float(), spec, name)
    assert y.dtype == torch.bfloat16
    for have, want in zip(ours, wanted, strict=True):
        if want is not None:
            assert have.dtype == torch.float32
            torch.testing.assert_close(have, want, rtol=FLOAT32_SUM, atol=FLOAT32_SUM * 10)


def test_gradient_of_a_bfloat16_input_is_bfloat16():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y = fake_quantize(x, torch.full((3, 1), 0.1), torch.zeros(3, 1), QuantSpec(4), ESTIMATORS["ste_clipped"], x.dtype)
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == torch.bfloat16
    assert set(dx.float().unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_backward_holds_the_inputs_and_no_mask(name):
    spec = GRIDS["group"]
    x, scale, zero_point, _ = inputs(spec, (5, 48))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(x, scale, zero_point, spec, ESTIMATORS[name], torch.float32)
    assert [tuple(t.shape) for t in saved] == [(5, 48), (5, 3), (5, 3)]
    assert saved[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
def test_gradients_do_not_depend_on_block_size_or_strides(spec, monkeypatch):
    x, scale, zero_point, grad = inputs(spec, (33, 48))
    rest = (spec, ESTIMATORS["lsq_plus"], torch.float32)
    _, wanted = gradients(fake_quantize, x, scale, zero_point, grad, *rest)
    monkeypatch.setattr(grid, "CPU_BLOCK", 64)
    strided, grad = x.detach().t().contiguous().t().requires_grad_(), grad.t().contiguous().t()
    _, ours = gradients(fake_quantize, strided, scale, zero_point, grad, *rest)
    assert torch.equal(ours[0], wanted[0])
    torch.testing.assert_close(ours[1:], wanted[1:], rtol=FLOAT32_SUM, atol=FLOAT32_SUM * 10)
