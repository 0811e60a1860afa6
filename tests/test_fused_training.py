"""The fused training ops against the plain torch code: codes, scales, values and products bit for bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tolerances import BFLOAT16_MATMUL, FLOAT32_SUM
from torch import nn
from torch.utils.checkpoint import checkpoint

from qat import estimators, grid
from qat.estimators import ESTIMATORS
from qat.fake_quant import FakeQuantize, Phase
from qat.grid import QParams
from qat.kernels import cpu, reference
from qat.kernels.cpu import train as fused
from qat.nn.quant import QuantLinear
from qat.scheme import QuantSpec

TOKEN = QuantSpec(8, True, "token", None, True, "float32", True)
GRIDS = {
    **{f"int{bits}-g32": QuantSpec(bits, True, "group", 32) for bits in (2, 3, 4, 8)},
    "int4-g64-asym": QuantSpec(4, False, "group", 64),
    "int4-g4": QuantSpec(4, True, "group", 4),
    "int4-row": QuantSpec(4),
    "int8-row-asym": QuantSpec(8, False),
    "int8-tensor": QuantSpec(8, True, "tensor"),
    "int8-tensor-asym": QuantSpec(8, False, "tensor"),
    "token": TOKEN,
}
# one past a panel of 32 rows, one past a tile of 6; K = 1 and 33 not a multiple of anything
SHAPES = ((1, 64), (33, 128), (7, 192), (5, 33), (3, 1))

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"C++ kernels: {cpu.unavailable()}")


def values(rows: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows from 2^-40 to 2^40, some zero, some all on rounding ties of their own grid."""
    generator = torch.Generator().manual_seed(rows * k)
    x = torch.randn(rows, k, generator=generator) * 2.0 ** torch.randint(-40, 40, (rows, 1), generator=generator)
    x[rows // 2] = torch.arange(k) % 16 - 7.5
    x[-1, : k // 2] = 0
    return x.to(dtype)


def own_grid(x: torch.Tensor, spec: QuantSpec) -> QParams:
    return grid.choose_qparams(*grid.min_max(x, spec), spec)


def compare_grids() -> None:
    """Every grid, shape and dtype; run in this process and, with QAT_MAX_ISA, in others."""
    for spec in GRIDS.values():
        for rows, k in SHAPES:
            if k % (spec.group_size or 1):
                continue
            for dtype in fused.DTYPES:
                x = values(rows, k, dtype)
                qparams = own_grid(x, spec)
                for given in (None, qparams):
                    for out in fused.DTYPES:
                        there = fused.on_grid(x, given, spec, out, codes=True)
                        assert torch.equal(there.scale.flatten(), qparams.scale.flatten())
                        if not spec.symmetric:
                            assert torch.equal(there.zero_point.flatten(), qparams.zero_point.flatten())
                        assert torch.equal(there.codes, grid.quantize(x, qparams, spec))
                        assert torch.equal(there.values, grid.fake_quantize(x, qparams, spec, out))


def compare_products() -> None:
    """The integer product against the reference, bit for bit, at row counts around the tile of 6 and its rests."""
    for spec in GRIDS.values():
        for n, k in ((1, 64), (33, 128), (70, 192)):
            if spec.is_activation or k % (spec.group_size or 1):
                continue
            weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
            there = fused.on_grid(weight, None, spec, None, codes=True)
            size = k // there.scale.shape[-1]
            for m in (1, 2, 3, 4, 5, 6, 13, 50):
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
                _, codes, sums, scale, _ = fused._quantize(x, None, TOKEN, 0, True, size)
                wanted = reference.integer_matmul(codes, own_grid(x, TOKEN), there.codes, own_grid(weight, spec), spec)
                grids = own_grid(x, TOKEN), there.codes, own_grid(weight, spec)
                assert fused.product_refuses(*grids) is None
                assert torch.equal(fused.integer_product(codes, *grids, spec), wanted)
                for narrow in (False, True):
                    arguments = (codes, sums, scale, there.codes, there.scale, there.zero_point, spec.bits, narrow)
                    y = torch.ops.qat.integer_linear(*arguments)
                    assert torch.equal(y, wanted.bfloat16() if narrow else wanted)


@pytest.mark.parametrize("isa", ["avx512", "avxvnni", "avx2", "portable"])
def test_fused_ops_give_the_bits_of_plain_torch_on_every_instruction_set(isa):
    code = "import test_fused_training as t; t.compare_grids(); t.compare_products()"
    environment = {**os.environ, "QAT_MAX_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_reference_adds_groups_with_one_rounding():
    # The exact results lie 2^-54 beside the middle of two float32 values; float64 rounds them to the middle itself, and
    # from there to the even neighbour, the wrong one: 2^30 + 1 = 1047553 * 1025, 2^30 - 1 = 32767 * 32769.
    a, b = torch.tensor([1047553.0, 32767.0]) * 2.0**-54, torch.tensor([1025.0, 32769.0])
    c = torch.tensor([1.0, 1 + 2.0**-23])
    assert (a.double() * b.double() + c.double()).float().tolist() == [1.0, 1 + 2.0**-22]
    assert reference.fused_multiply_add(a, b, c).tolist() == [1 + 2.0**-23, 1 + 2.0**-23]
    assert reference.fused_multiply_add(-a, b, -c).tolist() == [-1 - 2.0**-23, -1 - 2.0**-23]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fake_quantize_propagates_what_is_not_finite_as_plain_torch_does(bad):
    x = torch.randn(3, 64)
    x[1, 40] = bad
    for name in ("int4-g32", "int8-row-asym"):
        spec = GRIDS[name]
        there = fused.on_grid(x, None, spec, torch.float32, codes=False)
        wanted = grid.fake_quantize(x, own_grid(x, spec), spec, torch.float32)
        assert torch.equal(there.values.isnan(), wanted.isnan())
        assert torch.equal(there.values.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize("grid_name", ["int4-g32", "int4-g64-asym", "int8-tensor", "int4-row"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_match_those_of_plain_torch(estimator, grid_name, dtype):
    spec, rule = GRIDS[grid_name], ESTIMATORS[estimator]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 128, generator=generator)
    qparams = own_grid(x, spec)
    raw = QParams(qparams.scale * 0.7, qparams.zero_point + 0.3)  # clips some
    grad = torch.randn(9, 128, generator=generator).to(dtype)

    def gradients(function) -> list[torch.Tensor | None]:
        leaves = [t.clone().requires_grad_() for t in (x, *raw)]
        function(*leaves).backward(grad)
        return [leaf.grad for leaf in leaves]

    def run_fused(x, scale, zero):
        rounded = QParams(grid.round_scale(scale, spec), grid.round_zero_point(zero, spec))
        there = fused.on_grid(x, rounded, spec, dtype, codes=False)
        flow = fused.Gradients(rule.clipped, rule.learns_scale, rule.learns_zero_point)
        return fused.fake_quantize(x, QParams(scale, zero), there, spec, flow)

    ours = gradients(run_fused)
    theirs = gradients(lambda *leaves: estimators.fake_quantize(*leaves, spec, rule, dtype))
    assert torch.equal(ours[0], theirs[0])
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            # each sum has up to 9 * 128 terms of size below 8 * 3
            assert (own - other).abs().max() <= FLOAT32_SUM * 24 * 128 * qparams.scale.max().clamp(min=1)


def layer(spec: QuantSpec, with_inputs: bool = True, estimator: str = "ste_clipped", bias: bool = True) -> QuantLinear:
    torch.manual_seed(0)
    linear = nn.Linear(64, 40, bias=bias)
    scale = "learned" if ESTIMATORS[estimator].learns_scale else "dynamic"
    shape = spec.scale_shape((40, 64))
    weight_fq = FakeQuantize(spec, shape, ESTIMATORS[estimator], scale, "minmax")
    if scale == "learned":
        weight_fq._store(own_grid(linear.weight, spec))
    input_fq = FakeQuantize(TOKEN, (1,), ESTIMATORS["ste_clipped"], "dynamic") if with_inputs else None
    return QuantLinear(linear, weight_fq, input_fq)


def refuse(monkeypatch) -> None:
    monkeypatch.setattr(fused, "unavailable", lambda: "for this test")


@pytest.mark.parametrize("estimator", ["ste_clipped", "lsq"])
def test_integer_training_agrees_with_the_simulated_one(monkeypatch, estimator):
    x = torch.randn(3, 5, 64)

    def run() -> list[torch.Tensor]:
        trained = layer(GRIDS["int4-g32"], estimator=estimator)
        inputs = x.clone().requires_grad_()
        y = trained(inputs)
        y.square().sum().backward()
        return [y.detach(), inputs.grad, *(p.grad for p in trained.parameters())]

    ours = run()
    refuse(monkeypatch)
    for own, other in zip(ours, run(), strict=True):
        assert (own - other).abs().max() <= BFLOAT16_MATMUL * other.abs().max()
        assert own.dtype == other.dtype and own.shape == other.shape


def test_training_and_evaluation_give_the_bits_that_are_served(monkeypatch):
    trained = layer(GRIDS["int4-g64-asym"])
    x = torch.randn(7, 64)
    y = trained(x).detach()
    with torch.no_grad():
        assert torch.equal(trained.eval()(x), y)
        refuse(monkeypatch)
        assert torch.equal(trained(x), y)


@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_input_grid_is_evaluated_on_the_integer_product_with_the_bits_of_the_reference(monkeypatch, symmetric):
    stored = FakeQuantize(
        QuantSpec(8, symmetric, "tensor", is_activation=True), (1,), ESTIMATORS["ste_clipped"], "static", "minmax"
    )
    x = torch.randn(7, 64) + 0.3
    stored.observer.observe(x)
    stored.adopt_observed()
    own = layer(GRIDS["int4-g64-asym"])
    own.input_fake_quant = stored
    calls = []
    product = fused.integer_product
    monkeypatch.setattr(fused, "integer_product", lambda *args: calls.append(1) or product(*args))
    with torch.no_grad():
        y = own.eval()(x)
        # zero points of inputs are the reference's
        assert len(calls) == int(symmetric)
        monkeypatch.setattr(fused, "product_refuses", lambda *_: "no")
        assert torch.equal(own(x), y) and len(calls) == int(symmetric)


def change_by_optimizer(own: QuantLinear) -> None:
    own.weight.grad = torch.ones_like(own.weight)
    torch.optim.SGD([own.weight], lr=0.1).step()


def change_by_data(own: QuantLinear) -> None:
    own.weight.data.add_(0.1)


def change_by_new_storage(own: QuantLinear) -> None:
    own.weight.data = own.weight.data + 0.1


def change_by_state(own: QuantLinear) -> None:
    own.load_state_dict({name: t + 0.1 if name == "weight" else t for name, t in own.state_dict().items()})


def change_by_phase(own: QuantLinear) -> None:
    own.weight_fake_quant.set_phase(Phase(bits=3))


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize(
    "change", [change_by_optimizer, change_by_data, change_by_new_storage, change_by_state, change_by_phase]
)
def test_kept_weight_is_never_stale(change, with_inputs):
    own = layer(GRIDS["int4-g32"], with_inputs)
    x = torch.randn(2, 64)
    before = own(x).detach()
    change(own)
    fresh = copy.deepcopy(own)
    assert fresh.weight_fake_quant._kept is None
    after = own(x).detach()
    assert torch.equal(after, fresh(x)) and not torch.equal(after, before)


def test_kept_weight_follows_a_learned_scale_changed_behind_autograd():
    own = layer(GRIDS["int4-g32"], estimator="lsq")
    x = torch.randn(2, 64)
    before = own(x).detach()
    own.weight_fake_quant.scale_shift.data.fill_(0.3)
    assert torch.equal(own(x), copy.deepcopy(own)(x)) and not torch.equal(own(x), before)


def test_kept_weight_is_reused_while_gradients_accumulate_and_freed_in_evaluation(monkeypatch):
    calls = []
    on_grid = fused.on_grid
    monkeypatch.setattr(fused, "on_grid", lambda *given: calls.append(1) or on_grid(*given))
    own = layer(GRIDS["int4-g32"], with_inputs=False)
    for _ in range(3):
        own(torch.randn(2, 64)).sum().backward()
    assert len(calls) == 1
    own.eval()
    assert own.weight_fake_quant._kept is None
    with torch.no_grad():
        own(torch.randn(2, 64))
    assert own.weight_fake_quant._kept is None


def test_checkpointed_layer_has_the_same_gradients():
    grads = []
    for use_reentrant in (None, False, True):
        own = layer(GRIDS["int4-g32"])
        x = torch.ones(2, 64).cumsum(-1).requires_grad_()
        y = own(x) if use_reentrant is None else checkpoint(own, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
        grads.append(torch.cat([own.weight.grad.flatten(), x.grad.flatten()]))
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_fused_ops_are_the_same_with_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, weight = values(300, 256), values(500, 256)
            there = fused.on_grid(weight, None, GRIDS["int4-g32"], torch.bfloat16, codes=True)
            _, codes, sums, scale, _ = fused._quantize(x, None, TOKEN, 0, True, 32)
            y = torch.ops.qat.integer_linear(codes, sums, scale, there.codes, there.scale, there.zero_point, 4, False)
            results.append((there.values, there.codes, y))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ops_pass_opcheck():
    x, spec = torch.randn(5, 64), GRIDS["int4-g64-asym"]
    assert fused.unavailable() is None
    there = fused.on_grid(x, None, spec, torch.float32, codes=True)
    none, no_zero = torch.empty(0, 0), torch.empty(0, 0, dtype=torch.int32)
    ops = torch.ops.qat
    torch.library.opcheck(ops.grid_quantize.default, (x, none, no_zero, 4, False, 64, 15.0, True, 2, True, 64))
    gradient = (x, x, there.scale, there.zero_point, 4, 64, True, True)
    torch.library.opcheck(ops.grid_gradient.default, gradient)
    torch.library.opcheck(ops.grid_dequantize.default, (there.codes, there.scale, there.zero_point, 64, True))
    sums, scale = there.codes.sum(-1, dtype=torch.int32, keepdim=True), torch.ones(5, 1)
    arguments = (there.codes, sums, scale, there.codes, there.scale, there.zero_point, 4, True)
    torch.library.opcheck(ops.integer_linear.default, arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, w: {0: x.t()}, "x_codes"),
        (lambda x, w: {0: x.int()}, "x_codes .M, K. int8: wrong dtype"),
        (lambda x, w: {3: w[:, :32].contiguous()}, "same K"),
        (lambda x, w: {1: torch.zeros(4, 2, dtype=torch.int32)}, "M rows"),
        (lambda x, w: {1: torch.zeros(5, 0, dtype=torch.int32)}, "same K"),
        (lambda x, w: {4: torch.ones(6, 2)}, "scale must be"),
        (lambda x, w: {5: torch.zeros(1, 2, dtype=torch.int32)}, "shaped like the scale"),
        (lambda x, w: {6: 9}, "bits must be"),
    ],
)
def test_integer_linear_refuses_what_would_read_outside_its_arguments(change, match):
    x, w = torch.ones(5, 64, dtype=torch.int8), torch.ones(7, 64, dtype=torch.int8)
    no_zero = torch.empty(0, 2, dtype=torch.int32)
    sums = torch.full((5, 2), 32, dtype=torch.int32)
    arguments = [x, sums, torch.ones(5, 1), w, torch.ones(7, 2), no_zero, 4, False]
    assert torch.equal(torch.ops.qat.integer_linear(*arguments), torch.full((5, 7), 64.0))
    for index, value in change(x, w).items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=match):
        torch.ops.qat.integer_linear(*arguments)


@pytest.mark.parametrize(
    ("x", "group", "bits", "match"),
    [
        (torch.ones(2, 64).double(), 32, 4, "float32 or bfloat16"),
        (torch.ones(64, 2).t(), 32, 4, "memory layout"),
        (torch.ones(2, 64), 33, 4, "multiple of group"),
        (torch.ones(2, 64), 0, 4, "multiple of group"),
        (torch.ones(2, 64), 32, 1, "bits must be"),
    ],
)
def test_grid_quantize_refuses_bad_input(x, group, bits, match):
    none, no_zero = torch.empty(0, 0), torch.empty(0, 0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.qat.grid_quantize(x, none, no_zero, bits, True, group, 7.5, True, 1, False, 0)


def test_refusals_say_why_and_zero_tokens_pass():
    x = torch.ones(2, 64)
    assert "plain CPU tensor" in str(fused.refuses(x.to("meta"), torch.float32))
    assert "float32 or bfloat16" in str(fused.refuses(x.double(), torch.float32))
    asym = replace(TOKEN, symmetric=False)
    assert "int8 sym token" in str(fused.linear_refuses(x, x, GRIDS["int4-row"], asym, torch.float32))
    narrow = torch.ones(2, 33)
    assert "multiple of 4" in str(fused.linear_refuses(narrow, narrow, GRIDS["int4-row"], TOKEN, torch.float32))
    assert layer(GRIDS["int4-g32"])(torch.empty(0, 64)).shape == (0, 40)
