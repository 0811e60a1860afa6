"""The C++ kernels against the reference: every instruction set, odd shapes, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tolerances import CPU_FLOAT_INPUTS, CPU_INTEGER_INPUTS

from qat import grid
from qat.kernels import cpu, reference
from qat.kernels.dispatch import choose
from qat.packing import PackedTensor, pack
from qat.scheme import QuantSpec

TOKEN = QuantSpec(8, True, "token", None, True, "float32", True)
GRIDS = {
    **{f"int{bits}-g32": QuantSpec(bits, True, "group", 32) for bits in (2, 3, 4, 5, 8)},
    "int4-g64-asym": QuantSpec(4, False, "group", 64),
    "int4-row": QuantSpec(4),
    "int4-row-asym": QuantSpec(4, False),
    "int8-row": QuantSpec(8),
    "int8-row-asym": QuantSpec(8, False),
    "int8-tensor": QuantSpec(8, True, "tensor"),
}
# N one past a block of 16 rows, K = 33 and 1 not a multiple of the unit; M around the register blocks of 6 and 2
SIZES = ((1, 64), (17, 128), (16, 192), (5, 33), (40, 1))
ROWS = (1, 2, 3, 7, 13)

needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"C++ kernels: {cpu.unavailable()}")


def packed_weight(spec: QuantSpec, n: int, k: int) -> PackedTensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * 0.05 + (0 if spec.symmetric else 0.03)
    qparams = grid.choose_qparams(*grid.min_max(weight, spec), spec)
    return pack(grid.quantize(weight, qparams, spec), qparams, spec)


def inputs(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def compare_all() -> None:
    """Every grid, shape and row count; run in this process and, with QAT_MAX_ISA, in others."""
    for spec in GRIDS.values():
        for n, k in SIZES:
            if k % (spec.group_size or 1):
                continue
            weight = packed_weight(spec, n, k)
            assert cpu.refuses(weight) is None
            laid_out = cpu.prepack([weight])
            exact = weight.dequantize(torch.float32).double()
            for m in ROWS:
                x = inputs(m, k)
                y = cpu.packed_matmul(x, laid_out, planes=1)
                wanted = reference.wna8_matmul(x, weight, TOKEN, None)
                size = x.abs() @ exact.abs().float().t() + 1e-12
                assert torch.isfinite(y).all() and ((y - wanted).abs() <= CPU_INTEGER_INPUTS * size).all()
                fine = cpu.packed_matmul(x, laid_out, planes=2)
                bound = CPU_FLOAT_INPUTS * x.abs().amax(-1, keepdim=True) * exact.abs().sum(-1).float() + 1e-12
                assert ((fine - x.double() @ exact.t()).abs() <= bound).all()


@needs_library
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_packed_matmul_matches_the_reference_on_every_instruction_set(isa):
    if isa == "avx512":
        compare_all()
        return
    code = "import test_cpu_kernels; test_cpu_kernels.compare_all()"
    environment = {**os.environ, "QAT_MAX_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@needs_library
def test_integer_sums_are_the_same_bits_on_every_instruction_set(tmp_path):
    # scale 1 and inputs that are their own codes: the result is the int32 sum itself
    code = (
        "import sys, torch, test_cpu_kernels as t; w = t.packed_weight(t.GRIDS['int4-g32'], 33, 128); "
        "x = torch.randint(-127, 128, (5, 128), generator=torch.Generator().manual_seed(0)).float(); x[:, 0] = 127; "
        "torch.save(t.cpu.packed_matmul(x, t.cpu.prepack([w]), 1), sys.argv[1])"
    )
    results = []
    for isa in ("avx512", "avx2", "portable"):
        environment = {**os.environ, "QAT_MAX_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
        file = tmp_path / isa
        subprocess.run([sys.executable, "-c", code, str(file)], env=environment, check=True)
        results.append(torch.load(file, weights_only=True))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_library
def test_merged_weights_equal_the_weights_one_by_one():
    parts = [packed_weight(GRIDS["int4-g32"], n, 64) for n in (33, 16, 5)]
    x = inputs(3, 64)
    merged = cpu.packed_matmul(x, cpu.prepack(parts), 1)
    apart = torch.cat([cpu.packed_matmul(x, cpu.prepack([part]), 1) for part in parts], -1)
    assert torch.equal(merged, apart)


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_packed_matmul_is_the_same_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    weight = cpu.prepack([packed_weight(GRIDS["int4-g32"], 2048, 256)])
    x = inputs(4, 256)
    torch.set_num_threads(threads)
    try:
        y = cpu.packed_matmul(x, weight, 2)
    finally:
        torch.set_num_threads(before)
    torch.set_num_threads(1)
    try:
        assert torch.equal(y, cpu.packed_matmul(x, weight, 2))
    finally:
        torch.set_num_threads(before)


@needs_library
def test_op_passes_opcheck_and_knows_its_shape_on_meta():
    weight = cpu.prepack([packed_weight(GRIDS["int4-g32"], 17, 64)])
    arguments = (inputs(3, 64), weight.blob, weight.n, weight.k, weight.group, weight.bits, 1)
    torch.library.opcheck(torch.ops.qat.packed_matmul.default, arguments)


@needs_library
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, blob: (x.double(), blob, 17, 64, 32, 4, 1), "x .M, K. float32"),
        (lambda x, blob: (x.t().contiguous().t(), blob, 17, 64, 32, 4, 1), "x .M, K. float32"),
        (lambda x, blob: (x[:, :32].contiguous(), blob, 17, 64, 32, 4, 1), "must have K"),
        (lambda x, blob: (x, blob[:-1], 17, 64, 32, 4, 1), "does not hold a weight"),
        (lambda x, blob: (x, blob, 170, 64, 32, 4, 1), "does not hold a weight"),
        (lambda x, blob: (x, blob, 17, 64, 31, 4, 1), "grid out of range"),
        (lambda x, blob: (x, blob, 17, 64, 32, 9, 1), "grid out of range"),
    ],
)
def test_op_refuses_what_would_read_outside_its_arguments(change, match):
    blob = cpu.prepack([packed_weight(GRIDS["int4-g32"], 17, 64)]).blob
    with pytest.raises(RuntimeError, match=match):
        torch.ops.qat.packed_matmul(*change(inputs(3, 64), blob))


@needs_library
def test_zero_rows_and_an_all_zero_input_are_no_special_case():
    weight = cpu.prepack([packed_weight(GRIDS["int4-g32"], 17, 64)])
    assert cpu.packed_matmul(torch.empty(0, 64), weight, 1).shape == (0, 17)
    assert torch.equal(cpu.packed_matmul(torch.zeros(2, 64), weight, 2), torch.zeros(2, 17))


def test_cpu_backend_says_what_it_cannot_take():
    narrow = packed_weight(QuantSpec(4, True, "group", 16), 8, 64)
    assert "multiple of 32, got 16" in str(cpu.refuses(narrow))
    static = QuantSpec(8, False, "tensor", is_activation=True)
    choice = choose("wna8_matmul", packed_weight(GRIDS["int8-row"], 8, 64), "auto", static)
    assert choice.backend == "reference" and choice.refused["dense"] == "no dense kernel for wna8_matmul"
    assert choice.refused["cpu"].startswith("inputs must be int8 sym per token") or cpu.unavailable()
