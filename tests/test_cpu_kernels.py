"""The C++ kernels against the reference: every instruction set, odd shapes, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tolerances import CPU_ATTENTION, CPU_FLOAT_INPUTS, CPU_INTEGER_INPUTS, ROW_SCALE

from qat import grid
from qat.grid import QParams
from qat.kernels import cpu, reference
from qat.kernels.dispatch import choose
from qat.packing import PackedTensor, pack
from qat.scheme import QuantSpec

TOKEN = QuantSpec(8, True, "token", None, True, "float32", True)
STATIC = QuantSpec(8, True, "tensor", is_activation=True)
ISAS = ("avx512", "avxvnni", "avx2", "portable")
GRIDS = {
    **{f"int{bits}-g32": QuantSpec(bits, True, "group", 32) for bits in (2, 3, 4, 5, 8)},
    "int4-g64-asym": QuantSpec(4, False, "group", 64),
    "int4-row": QuantSpec(4),
    "int4-row-asym": QuantSpec(4, False),
    "int8-row": QuantSpec(8),
    "int8-row-asym": QuantSpec(8, False),
    "int8-tensor": QuantSpec(8, True, "tensor"),
}
# N one past half a panel of 32 rows, K = 33 and 1 not a multiple of the unit; M around the register blocks of 6 and 2
SIZES = ((1, 64), (17, 128), (33, 192), (5, 33), (40, 1))
ROWS = (1, 2, 3, 7, 13)

needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"C++ kernels: {cpu.unavailable()}")


def packed_weight(spec: QuantSpec, n: int, k: int) -> PackedTensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * 0.05 + (0 if spec.symmetric else 0.03)
    qparams = grid.choose_qparams(*grid.min_max(weight, spec), spec)
    return pack(grid.quantize(weight, qparams, spec), qparams, spec)


def inputs(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def op_of(spec: QuantSpec, inputs: int) -> str:
    return f"w{4 if spec.bits <= 4 else 8}a{inputs}_matmul"


def compare_all() -> None:
    """Every grid, shape and row count; run in this process and, with QAT_MAX_ISA, in others."""
    for spec in GRIDS.values():
        for n, k in SIZES:
            if k % (spec.group_size or 1):
                continue
            weight = packed_weight(spec, n, k)
            assert cpu.refuses(weight) is None
            laid_out = cpu.prepack([weight])
            exact = weight.dequantize(torch.float32)
            assert torch.equal(cpu.embedding(torch.arange(n), laid_out), exact)
            exact = exact.double()
            for m in ROWS:
                x = inputs(m, k)
                y = cpu.matmul(op_of(spec, 8), x, laid_out)
                wanted = reference.wna8_matmul(x, weight, TOKEN, None)
                size = x.abs() @ exact.abs().float().t() + 1e-12
                assert torch.isfinite(y).all() and ((y - wanted).abs() <= CPU_INTEGER_INPUTS * size).all()
                for static_spec in (STATIC, replace(STATIC, symmetric=False)):
                    scale, zero = grid.choose_qparams(*grid.min_max(x + 0.5, static_spec), static_spec)
                    static = QParams(scale.view(1), zero.view(1))
                    y = cpu.matmul(op_of(spec, 8), x, laid_out, static)
                    wanted = reference.wna8_matmul(x, weight, static_spec, static)
                    bound = CPU_INTEGER_INPUTS * (256 * static.scale) * exact.abs().sum(-1).float() + 1e-12
                    assert ((y - wanted).abs() <= bound).all()
                fine = cpu.matmul(op_of(spec, 16), x, laid_out)
                bound = CPU_FLOAT_INPUTS * x.abs().amax(-1, keepdim=True) * exact.abs().sum(-1).float() + 1e-12
                assert ((fine - x.double() @ exact.t()).abs() <= bound).all()
                compare_top(x, weight, laid_out)
    compare_rows()


def compare_top(x: torch.Tensor, head: PackedTensor, laid_out: cpu.CpuWeight) -> None:
    """The k best are those of the logits that the matmul gives, and near the reference's."""
    n = head.shape[0]
    for int8_inputs, input_spec in ((True, TOKEN), (False, None)):
        logits = cpu.matmul(op_of(head.spec, 8 if int8_inputs else 16), x, laid_out)
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        wanted, _ = reference.lm_head_top(x, head, n, input_spec)
        largest = x.abs().amax(-1, keepdim=True) * head.dequantize(torch.float32).abs().sum(-1).amax()
        limit = (CPU_INTEGER_INPUTS if int8_inputs else CPU_FLOAT_INPUTS) * largest + 1e-12
        for k in {1, (n + 1) // 2, n}:
            found, tokens = cpu.lm_head_top(x, laid_out, k, int8_inputs)
            assert torch.equal(found, values[:, :k]) and torch.equal(tokens, order[:, :k])
            # the k-th largest moves by no more than the largest error
            assert ((found - wanted[:, :k]).abs() <= limit).all()


def compare_rows() -> None:
    """The ops beside matmuls."""
    for m, k in ((1, 1), (3, 33), (5, 576)):
        x, other = inputs(m, k) * 3, inputs(m + 7, k)[:m]
        weight = inputs(1, k)[0].abs()
        for found, wanted in (
            (torch.ops.qat.rmsnorm_quantize(x, weight, 1e-5), reference.rmsnorm_quantize(x, weight, 1e-5)),
            (torch.ops.qat.silu_mul_quantize(x, other), reference.silu_mul_quantize(x, other)),
        ):
            assert torch.allclose(found[1], wanted[1], rtol=ROW_SCALE)
            # sums in another order can move a value over the border of two codes
            assert (found[0].int() - wanted[0].int()).abs().max() <= 1
    for is_int8 in (True, False):
        for d, heads, kv in ((16, 1, 1), (64, 9, 3), (96, 7, 1), (128, 8, 2)):
            compare_attention(is_int8, d, heads, kv)


def compare_attention(is_int8: bool, d: int, heads: int, kv: int, length: int = 304, m: int = 2) -> None:
    generator = torch.Generator().manual_seed(d)
    draw = partial(torch.randn, generator=generator)
    angles = torch.outer(torch.arange(length), 1.0 / 100 ** (torch.arange(d // 2) / d))
    cos, sin = angles.cos(), angles.sin()
    width = d if is_int8 else 2 * d
    keys, values = (torch.zeros(m, kv, length, width, dtype=torch.uint8) for _ in range(2))
    scales = [torch.zeros(m, kv, length) if is_int8 else torch.empty(0, 0, 0) for _ in range(2)]
    all_k, all_v = draw(m, kv, length, d), draw(m, kv, length, d)
    for p in range(300):  # past one split of the positions, not a multiple of a block
        q = draw(m, heads, d)
        position = torch.full((m,), p)
        k, v = all_k[:, :, p].contiguous(), all_v[:, :, p].contiguous()
        out = torch.ops.qat.decode_attention(q, k, v, cos, sin, position, keys, scales[0], values, scales[1])
        if p in (0, 1, 15, 16, 255, 256, 299):
            turned = reference.rotate(all_k[:, :, : p + 1], cos[: p + 1], sin[: p + 1])
            query = reference.rotate(q, cos[p], sin[p])
            wanted = reference.decode_attention(query, turned, all_v[:, :, : p + 1], is_int8)
            assert torch.allclose(out, wanted, **CPU_ATTENTION)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_serving_ops_match_the_reference_on_every_instruction_set(isa):
    if isa == "avx512":
        compare_all()
        return
    code = "import test_cpu_kernels; test_cpu_kernels.compare_all()"
    subprocess.run([sys.executable, "-c", code], env=limited(isa), check=True)


def limited(isa: str) -> dict[str, str]:
    return {**os.environ, "QAT_MAX_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}


@needs_library
def test_integer_sums_are_the_same_bits_on_every_instruction_set(tmp_path):
    code = (
        "import sys, torch, test_cpu_kernels as t; from safetensors.torch import save_file; "
        "x = t.inputs(5, 128); made = lambda spec: t.cpu.prepack([t.packed_weight(spec, 33, 128)]); "
        "out = {name: t.cpu.matmul(t.op_of(spec, 8), x, made(spec)) for name, spec in t.GRIDS.items()}; "
        "out['codes'], out['scale'] = torch.ops.qat.silu_mul_quantize(x, x.flip(0).contiguous()); "
        "save_file(out, sys.argv[1])"
    )
    results = []
    for isa in ISAS:
        file = tmp_path / isa
        subprocess.run([sys.executable, "-c", code, str(file)], env=limited(isa), check=True)
        results.append(load_file(file))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@needs_library
def test_merged_weights_equal_the_weights_one_by_one():
    parts = [packed_weight(GRIDS["int4-g32"], n, 64) for n in (33, 16, 5)]
    x = inputs(3, 64)
    merged = cpu.matmul("w4a8_matmul", x, cpu.prepack(parts))
    apart = torch.cat([cpu.matmul("w4a8_matmul", x, cpu.prepack([part])) for part in parts], -1)
    assert torch.equal(merged, apart)


@needs_library
def test_matmul_is_the_same_with_any_number_of_threads():
    before = torch.get_num_threads()
    weight = cpu.prepack([packed_weight(GRIDS["int4-g32"], 2048, 256)])
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(cpu.matmul("w4a16_matmul", inputs(4, 256), weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_library
def test_ops_pass_opcheck_and_know_their_shapes_on_meta():
    weight = cpu.prepack([packed_weight(GRIDS["int4-g32"], 17, 64)])
    wide = cpu.prepack([packed_weight(GRIDS["int8-row"], 17, 64)])
    x, ids = inputs(3, 64), torch.tensor([0, 16])
    ops = torch.ops.qat
    for op, arguments in (
        (ops.w4a8_matmul, (x, weight.blob, *weight.grid)),
        (ops.w8a8_matmul, (x, wide.blob, *wide.grid, torch.tensor([0.1, 3.0]))),
        (ops.w4a16_matmul, (x, weight.blob, *weight.grid)),
        (ops.w8a16_matmul, (x, wide.blob, *wide.grid)),
        (ops.packed_embedding, (ids, weight.blob, *weight.grid)),
        (ops.lm_head_top, (x, weight.blob, list(weight.grid), 3, False)),
        (ops.rmsnorm_quantize, (x, torch.ones(64), 1e-5)),
        (ops.silu_mul_quantize, (x, x.flip(0).contiguous())),
    ):
        torch.library.opcheck(op.default, arguments)


def grid_of(**changes: int) -> list[int]:
    return list(({"n": 17, "k": 64, "group": 32, "bits": 4, "zeros": 0} | changes).values())


@needs_library
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, blob: (x.double(), blob, *grid_of()), "x .M, K. float32"),
        (lambda x, blob: (x.t().contiguous().t(), blob, *grid_of()), "x .M, K. float32"),
        (lambda x, blob: (x[:, :32].contiguous(), blob, *grid_of()), "must have K = 64, got 32"),
        (lambda x, blob: (x, blob[:-64].contiguous(), *grid_of()), "does not hold a weight"),
        (lambda x, blob: (x, blob, *grid_of(n=170)), "does not hold a weight"),
        (lambda x, blob: (x, blob, *grid_of(zeros=1)), "does not hold a weight"),
        (lambda x, blob: (x, blob, *grid_of(group=31)), "grid out of range"),
        (lambda x, blob: (x, blob, *grid_of(bits=9)), "grid out of range"),
        (lambda x, blob: (x, blob, *grid_of(bits=8)), "does not hold a weight"),
        (lambda x, blob: (x, blob.char(), *grid_of()), "blob .bytes. uint8"),
    ],
)
def test_op_refuses_what_would_read_outside_its_arguments(change, match):
    blob = cpu.prepack([packed_weight(GRIDS["int4-g32"], 17, 64)]).blob
    with pytest.raises(RuntimeError, match=match):
        torch.ops.qat.w4a16_matmul(*change(inputs(3, 64), blob))


@needs_library
def test_lm_head_top_puts_the_lower_token_first_among_equals_and_skips_nan():
    head = packed_weight(GRIDS["int8-row"], 7, 64)
    # every row seven times, in panels that different threads multiply
    rows = torch.arange(7).repeat(7)
    many = PackedTensor(head.packed[rows], head.scale[rows], None, head.spec, (49, 64))
    x, state = inputs(3, 64), cpu.prepack([many])
    x[1, 5] = torch.nan
    for int8_inputs, input_spec in ((True, TOKEN), (False, None)):
        for k in (1, 10, 49):
            values, tokens = cpu.lm_head_top(x, state, k, int8_inputs)
            wanted = reference.lm_head_top(x, many, k, input_spec)
            for found, truth in zip((values[1], tokens[1]), (wanted[0][1], wanted[1][1]), strict=True):
                assert torch.equal(found, truth) and found.unique().tolist() in ([-1], [-torch.inf])
            # equal rows give equal logits: groups of seven, in order
            full = tokens[::2, : k // 7 * 7].view(2, -1, 7)
            assert torch.equal(full, full[..., :1] + 7 * torch.arange(7)) and (full[..., 0] < 7).all()
            if int8_inputs:  # sums of integers: the reference's float sums of equal rows may differ
                assert torch.equal(values, wanted[0]) and torch.equal(tokens, wanted[1])
    compiled = torch.compile(lambda x: cpu.lm_head_top(x, state, 10, False)[1] + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), cpu.lm_head_top(x, state, 10, False)[1] + 1)


@needs_library
def test_lm_head_top_takes_heads_in_bfloat16_and_refuses_impossible_k():
    weight = inputs(33, 70).bfloat16()
    head, x = cpu.prepack_floats([weight]), inputs(2, 70)
    values, tokens = cpu.lm_head_top(x, head, 33, False)
    wanted = (x @ weight.float().t()).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(tokens, wanted.indices) and torch.allclose(values, wanted.values, atol=1e-4)
    assert cpu.lm_head_top(x[:0], head, 2, False)[1].shape == (0, 2)
    for k in (0, 34, 2000):
        with pytest.raises(RuntimeError, match=r"k must be in \[1, 33\], got"):
            cpu.lm_head_top(x, head, k, False)


@needs_library
def test_embedding_refuses_ids_outside_the_table():
    table = cpu.prepack([packed_weight(GRIDS["int4-g32"], 17, 64)])
    for bad in (-1, 17):
        with pytest.raises(RuntimeError, match=r"ids must be in \[0, 17\)"):
            cpu.embedding(torch.tensor([0, bad]), table)


@needs_library
def test_zero_rows_and_an_all_zero_input_are_no_special_case():
    weight = cpu.prepack([packed_weight(GRIDS["int4-g32"], 17, 64)])
    assert cpu.matmul("w4a8_matmul", torch.empty(0, 64), weight).shape == (0, 17)
    assert torch.equal(cpu.matmul("w4a16_matmul", torch.zeros(2, 64), weight), torch.zeros(2, 17))
    assert cpu.embedding(torch.empty(0, dtype=torch.long), weight).shape == (0, 64)


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("op", ["w4a8_matmul", "w4a16_matmul"])
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(op, bad):
    weight = cpu.prepack([packed_weight(GRIDS["int4-g32"], 17, 64)])
    x = inputs(3, 64)
    clean = cpu.matmul(op, x, weight)
    x[1, 5] = bad
    y = cpu.matmul(op, x, weight)
    assert torch.isnan(y[1]).all() and torch.equal(y[[0, 2]], clean[[0, 2]])


@needs_library
def test_float_weights_are_laid_out_as_bfloat16():
    weight = inputs(33, 70)
    laid_out = cpu.prepack_floats([weight])
    assert torch.equal(cpu.embedding(torch.arange(33), laid_out), weight.bfloat16().float())


def test_cpu_backend_says_what_it_cannot_take():
    narrow = packed_weight(QuantSpec(4, True, "group", 16), 8, 64)
    assert "multiple of 32, got 16" in str(cpu.refuses(narrow))
    tensor = QuantSpec(8, True, "tensor", None, True, is_activation=True)
    choice = choose("w8a8_matmul", packed_weight(GRIDS["int8-row"], 8, 64), "auto", tensor)
    assert choice.backend == "reference" and choice.refused["dense"] == "no dense kernel for w8a8_matmul"
    assert choice.refused["cpu"].startswith("inputs must be int8 sym per token") or cpu.unavailable()


def test_blobs_in_huge_pages_are_the_same_bytes_and_a_shared_one_stays_shared():
    made = [torch.randint(0, 256, (size * 64,), dtype=torch.uint8) for size in (40000, 3, 30000)]
    blobs = [*made, made[0]]
    cpu.in_huge_pages(blobs)
    assert all(torch.equal(blob, before) for blob, before in zip(blobs, [*made, made[0]], strict=True))
    assert blobs[3].data_ptr() == blobs[0].data_ptr() and all(blob.data_ptr() % 64 == 0 for blob in blobs)
