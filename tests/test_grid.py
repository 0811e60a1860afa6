"""The contract of the grid: who knows this file can predict every integer that is ever stored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerances import HALF_STEP

from qat import grid
from qat.grid import QParams
from qat.scheme import QuantSpec

GRANULARITIES = {
    "tensor": {"granularity": "tensor"},
    "channel": {"granularity": "channel"},
    "group": {"granularity": "group", "group_size": 16},
    "token": {"granularity": "token", "dynamic": True, "scale_dtype": "float32", "is_activation": True},
}
SPECS = [
    pytest.param(QuantSpec(bits, symmetric, **fields), id=f"{bits}-{'sym' if symmetric else 'asym'}-{name}")
    for bits in range(2, 9)
    for symmetric in (True, False)
    for name, fields in GRANULARITIES.items()
]
WIDE = [param for param in SPECS if param.values[0].bits in (4, 8)]
SHAPES = {"one-row": (1, 16), "odd": (7, 48), "experts": (3, 5, 32), "one-past-a-block": (33, 16), "one-value": (2, 1)}


def values(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes and both signs, some all zero, some of one sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** torch.linspace(-3, 2, shape[-2]).unsqueeze(-1)
    rows = x.flatten(0, -2)
    if len(rows) > 4:
        rows[1], rows[2], rows[3] = 0, rows[2].abs() + 1, -rows[3].abs() - 1
    return x


def grid_of(x: torch.Tensor, spec: QuantSpec) -> QParams:
    return grid.choose_qparams(*grid.min_max(x, spec), spec)


def spread(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A per-group quantity as one value per element of x."""
    return q.expand(*x.shape[:-1], q.shape[-1]).repeat_interleave(x.shape[-1] // q.shape[-1], -1)


def numpy_codes(x: torch.Tensor, qparams: QParams, spec: QuantSpec) -> torch.Tensor:
    """The formula written once more, in NumPy."""
    scale, zero = spread(qparams.scale, x).numpy(), spread(qparams.zero_point, x).numpy()
    codes = np.rint(x.numpy().astype(np.float32) / scale).astype(np.int64) + zero
    return torch.from_numpy(np.clip(codes, -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1).astype(np.int8))


def fits(spec: QuantSpec, shape: tuple[int, ...]) -> bool:
    return shape[-1] % (spec.group_size or 1) == 0


@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_those_of_the_formula_in_numpy(spec):
    for shape in SHAPES.values():
        if fits(spec, shape):
            x = values(shape)
            qparams = grid_of(x, spec)
            codes = grid.quantize(x, qparams, spec)
            assert codes.dtype == torch.int8
            assert torch.equal(codes, numpy_codes(x, qparams, spec))
            low, high = grid.code_range(spec)
            assert low <= int(qparams.zero_point.min()) and int(qparams.zero_point.max()) <= high
            assert not spec.symmetric or not qparams.zero_point.any()


@pytest.mark.parametrize("spec", SPECS)
def test_fake_quantize_equals_dequantized_codes_bit_for_bit(spec):
    for shape in SHAPES.values():
        if fits(spec, shape):
            x = values(shape)
            qparams = grid_of(x, spec)
            codes = grid.quantize(x, qparams, spec)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                fake = grid.fake_quantize(x, qparams, spec, dtype)
                assert fake.dtype == dtype
                assert torch.equal(fake, grid.dequantize(codes, qparams, spec, dtype))


@pytest.mark.parametrize("spec", SPECS)
def test_quantize_returns_every_code_that_was_dequantized(spec):
    low, high = grid.code_range(spec)
    codes = torch.arange(7 * 256).view(7, 256) % (high - low + 1) + low
    codes = codes.to(torch.int8)
    qparams = grid_of(values((7, 256)), spec)
    assert codes.unique().numel() == high - low + 1
    assert torch.equal(grid.quantize(grid.dequantize(codes, qparams, spec), qparams, spec), codes)


@pytest.mark.parametrize("spec", SPECS)
def test_zero_is_a_code_exactly_when_values_have_one_sign(spec):
    x = values((7, 48))
    for shifted in (x, x.abs() + 3, -x.abs() - 3):
        qparams = grid_of(shifted, spec)
        zeros = torch.zeros_like(x)
        assert torch.equal(grid.fake_quantize(zeros, qparams, spec, torch.float32), zeros)


@pytest.mark.parametrize("spec", SPECS)
def test_error_is_at_most_half_a_step_inside_the_range(spec):
    x = values((7, 48))
    qparams = grid_of(x, spec)
    scale, zero = spread(qparams.scale, x), spread(qparams.zero_point, x)
    low, high = grid.code_range(spec)
    inside = (x >= (low - zero) * scale) & (x <= (high - zero) * scale)
    error = (grid.fake_quantize(x, qparams, spec, torch.float32) - x).abs() / scale
    assert inside.float().mean() > 0.5
    assert error[inside].max() <= HALF_STEP


@pytest.mark.parametrize("spec", SPECS)
def test_all_zero_group_has_a_finite_scale_and_zero_output(spec):
    x = torch.zeros(3, 32)
    qparams = grid_of(x, spec)
    assert torch.isfinite(qparams.scale).all() and (qparams.scale > 0).all()
    assert torch.equal(grid.fake_quantize(x, qparams, spec, torch.float32), x)


@pytest.mark.parametrize("spec", WIDE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_input_gives_the_codes_of_its_float32_copy(spec, dtype):
    x = values((7, 48)).to(dtype)
    qparams, same = grid_of(x, spec), grid_of(x.float(), spec)
    assert torch.equal(qparams.scale, same.scale) and torch.equal(qparams.zero_point, same.zero_point)
    assert torch.equal(grid.quantize(x, qparams, spec), grid.quantize(x.float(), qparams, spec))


@pytest.mark.parametrize("spec", WIDE)
def test_codes_do_not_change_under_autocast(spec):
    x = values((7, 48))
    qparams = grid_of(x, spec)
    codes, fake = grid.quantize(x, qparams, spec), grid.fake_quantize(x, qparams, spec, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        again = grid_of(x, spec)
        assert torch.equal(again.scale, qparams.scale) and torch.equal(again.zero_point, qparams.zero_point)
        assert torch.equal(grid.quantize(x, again, spec), codes)
        assert torch.equal(grid.fake_quantize(x, again, spec, torch.float32), fake)


@pytest.mark.parametrize("spec", WIDE)
def test_results_do_not_depend_on_the_block_size(spec, monkeypatch):
    x = values((65, 48))
    qparams = grid_of(x, spec)
    codes, fake = grid.quantize(x, qparams, spec), grid.fake_quantize(x, qparams, spec, torch.float32)
    monkeypatch.setattr(grid, "CPU_BLOCK", 64)
    assert grid.blocks(x) == 1
    assert torch.equal(grid.quantize(x, qparams, spec), codes)
    assert torch.equal(grid.fake_quantize(x, qparams, spec, torch.float32), fake)
    assert torch.equal(grid.dequantize(codes, qparams, spec), fake)


@pytest.mark.parametrize("spec", WIDE)
def test_strided_input_gives_the_codes_of_its_copy(spec):
    strided = [values((48, 7)).t(), values((7, 96))[:, ::2], values((1, 48)).expand(7, 48), values((7, 49))[:, 1:]]
    for x in strided:
        assert not x.is_contiguous() or x.storage_offset()
        qparams, same = grid_of(x, spec), grid_of(x.clone(), spec)
        assert torch.equal(qparams.scale, same.scale)
        codes = grid.quantize(x, qparams, spec)
        assert torch.equal(codes, grid.quantize(x.clone(), qparams, spec))
        rewritten = torch.empty(48, 7, dtype=torch.int8).t().copy_(codes)
        assert torch.equal(
            grid.dequantize(rewritten, qparams, spec), grid.fake_quantize(x, qparams, spec, torch.float32)
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_group_size_k_equals_per_channel(bits, symmetric):
    x = values((7, 48))
    channel, group = QuantSpec(bits, symmetric), QuantSpec(bits, symmetric, "group", 48)
    one, other = grid_of(x, channel), grid_of(x, group)
    assert torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point)
    assert torch.equal(grid.quantize(x, one, channel), grid.quantize(x, other, group))


@pytest.mark.parametrize("spec", WIDE)
def test_each_expert_has_the_codes_it_has_alone(spec):
    x = values((3, 5, 32))
    if spec.granularity == "tensor":
        assert grid_of(x, spec).scale.shape == (1, 1, 1)
        return
    codes = grid.quantize(x, grid_of(x, spec), spec)
    for expert, alone in zip(codes, x, strict=True):
        assert torch.equal(expert, grid.quantize(alone, grid_of(alone, spec), spec))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_stored_scale_is_exact_in_bfloat16_and_float16_for_any_magnitude(bits, symmetric):
    spec = QuantSpec(bits, symmetric)
    sizes = [0.0, 1e-45, 1e-40, 2.0**-126, 1e-8, 2.0**-17, 1e-3, 0.7, 1.0, 333.3, 65504.0, 1e6, 1e30, 3.4e38]
    sizes += torch.rand(500, generator=torch.Generator().manual_seed(bits)).mul(40).sub(20).exp().tolist()
    high = torch.tensor(sizes).view(-1, 1)
    for low in (-high, torch.zeros_like(high), -high / 3):
        scale = grid.choose_qparams(low, high, spec).scale
        assert torch.equal(scale.bfloat16().float(), scale)
        assert torch.equal(scale.half().float(), scale)
        assert float(scale.min()) >= 2.0**-17 and float(scale.max()) <= 65504


def test_int4_weights_have_sixteen_codes_and_divide_by_seven_and_a_half():
    spec = QuantSpec(4)
    assert grid.code_range(spec) == (-8, 7)
    assert float(grid.choose_qparams(torch.tensor([-7.5]), torch.tensor([3.0]), spec).scale) == 1.0
    qparams = QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
    x = torch.tensor([[-100.0, -8.4, -7.6, 6.6, 7.4, 100.0]])
    assert grid.quantize(x, qparams, spec).tolist() == [[-8, -8, -8, 7, 7, 7]]


def test_int8_activations_divide_by_127_without_rounding_the_scale():
    spec = QuantSpec(8, granularity="token", dynamic=True, scale_dtype="float32", is_activation=True)
    scale = grid.choose_qparams(torch.tensor([[-1.0]]), torch.tensor([[0.5]]), spec).scale
    assert torch.equal(scale, torch.ones(1, 1) / 127)
    assert grid.quantize(torch.tensor([[-1.0, 1.0]]), QParams(scale, torch.zeros(1, 1)), spec).tolist() == [[-127, 127]]
    static = replace(spec, granularity="tensor", dynamic=False, scale_dtype="bfloat16")
    assert float(grid.choose_qparams(torch.tensor([-127.0]), torch.tensor([1.0]), static).scale) == 1.0


def test_rounding_is_half_to_even_and_before_the_zero_point():
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    even = [-2, -2, 0, 0, 2, 2]
    for zero_point in (0, 1):
        qparams = QParams(torch.ones(1, 1), torch.full((1, 1), zero_point, dtype=torch.int32))
        codes = grid.quantize(x, qparams, QuantSpec(4, symmetric=False))
        assert codes.tolist() == [[code + zero_point for code in even]]


def test_asymmetric_grid_of_one_sign_starts_or_ends_at_zero():
    spec = QuantSpec(4, symmetric=False)
    above = grid.choose_qparams(torch.tensor([5.0]), torch.tensor([15.0]), spec)
    below = grid.choose_qparams(torch.tensor([-15.0]), torch.tensor([-5.0]), spec)
    assert (float(above.scale), int(above.zero_point)) == (1.0, -8)
    assert (float(below.scale), int(below.zero_point)) == (1.0, 7)


def test_learned_zero_point_is_rounded_into_the_code_range():
    learned = torch.tensor([-99.0, -7.6, 0.5, 1.5, 7.4, 99.0])
    assert grid.round_zero_point(learned, QuantSpec(4, False)).tolist() == [-8, -8, 0, 2, 7, 7]


def test_is_inside_is_false_exactly_where_the_clamp_changed_the_code():
    v = torch.arange(-40, 40).div(2).view(1, -1)
    for zero_point in (None, -8, -3, 0, 2, 7):
        spec = QuantSpec(4, symmetric=zero_point is None)
        shift = None if zero_point is None else torch.tensor([[float(zero_point)]])
        unclamped = torch.round(v) + (zero_point or 0)
        assert torch.equal(grid.is_inside(v, shift, spec), grid.codes_(v.clone(), shift, spec) == unclamped)
