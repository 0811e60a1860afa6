"""Serving arithmetic: every kernel against the reference, the reference against integers, a served model against its
training model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from quant_models import IDS, logits, trained
from tolerances import BFLOAT16_MATMUL, FLIPPED_INPUT_CODES, FLOAT32_SUM

from qat import grid
from qat.config import KvConfig, kv_spec
from qat.convert import pack_model
from qat.errors import UserError
from qat.fake_quant import FakeQuantize
from qat.formats import FORMATS
from qat.grid import QParams
from qat.kernels import cpu, reference
from qat.kernels.dispatch import KERNELS, choose
from qat.nn.kv import install_kv
from qat.nn.packed import PackedEmbedding, PackedLinear, kernel_summary
from qat.nn.quant import QuantLinear
from qat.packing import PackedTensor, pack
from qat.scheme import QuantScheme, QuantSpec
from qat.serve.load import read_export, serve

TOKEN = QuantSpec(8, granularity="token", dynamic=True, scale_dtype="float32", is_activation=True)
INPUTS = {
    "token": TOKEN,
    "token-asym": replace(TOKEN, symmetric=False),
    "static": QuantSpec(8, True, "tensor", is_activation=True),
    "static-asym": QuantSpec(8, False, "tensor", is_activation=True),
    "tensor": replace(TOKEN, granularity="tensor"),
}
WEIGHTS = {
    "int4-g32": QuantSpec(4, True, "group", 32),
    "int4-g32-asym": QuantSpec(4, False, "group", 32),
    "int3-channel-asym": QuantSpec(3, False, "channel"),
    "int8-channel": QuantSpec(8, True, "channel"),
    "int8-tensor-asym": QuantSpec(8, False, "tensor"),
}
SIZES = [(n, k) for n in (1, 5, 64) for k in (32, 96, 33)]
ROWS = (1, 3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_weight(spec: QuantSpec, shape: tuple[int, ...], seed: int = 0) -> PackedTensor:
    weight = normal(*shape, seed=seed)
    qparams = grid.choose_qparams(*grid.min_max(weight, spec), spec)
    return pack(grid.quantize(weight, qparams, spec), qparams, spec)


def cases(op: str):
    # those that give the reference's bits; the C++ kernels have tolerances and a file of their own, test_cpu_kernels.py
    backends = [backend for known, backend in KERNELS if known == op and backend != "cpu"]
    assert backends
    return pytest.mark.parametrize("backend", backends)


def fits(spec: QuantSpec, k: int) -> bool:
    return k % (spec.group_size or 1) == 0


def expanded(q: torch.Tensor, k: int) -> np.ndarray:
    """Scale or zero point of [N, G] (or [1, 1]) as one number per weight."""
    return q.repeat_interleave(k // q.shape[-1], -1).numpy()


def static_grid(x: torch.Tensor, spec: QuantSpec) -> QParams | None:
    if spec.dynamic:
        return None
    scale, zero_point = grid.choose_qparams(*grid.min_max(x, spec), spec)
    return QParams(scale.view(1), zero_point.view(1))


def test_every_op_has_a_reference_kernel():
    assert all((op, "reference") in KERNELS for op, _ in KERNELS)


@cases("w4a16_matmul")
@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)
def test_wna16_matmul_matches_float64_and_the_reference(backend, spec):
    for n, k in SIZES:
        if not fits(spec, k):
            continue
        weight = packed_weight(spec, (n, k))
        codes = weight.codes().numpy().astype(np.float64)
        exact = (codes - expanded(weight.qparams.zero_point, k)) * expanded(weight.scale, k)
        for rows in ROWS:
            for dtype, tolerance in ((torch.float32, FLOAT32_SUM), (torch.bfloat16, BFLOAT16_MATMUL)):
                x = normal(rows, k, seed=1).to(dtype)
                kernel = choose("w4a16_matmul", weight, backend).kernel
                y = kernel.run(kernel.prepare(weight, dtype), x)
                assert y.dtype == dtype and y.shape == (rows, n) and torch.isfinite(y).all()
                wanted, size = x.double().numpy() @ exact.T, np.abs(x.double().numpy()) @ np.abs(exact.T)
                assert (np.abs(y.double().numpy() - wanted) <= tolerance * size).all()
                assert torch.equal(y, reference.wna16_matmul(x, weight))


@cases("w4a8_matmul")
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)
def test_wna8_matmul_matches_exact_integer_sums_and_the_reference(backend, spec, inputs):
    for n, k in SIZES:
        if not fits(spec, k):
            continue
        weight = packed_weight(spec, (n, k))
        w = weight.codes().numpy().astype(np.int64) - expanded(weight.qparams.zero_point, k).astype(np.int64)
        for rows in ROWS:
            x = normal(rows, k, seed=1)
            static = static_grid(x, inputs)
            kernel = choose("w4a8_matmul", weight, backend).kernel
            y = kernel.run(kernel.prepare(weight, torch.float32), x.view(1, rows, k), inputs, static)
            assert y.shape == (1, rows, n) and y.dtype == torch.float32 and torch.isfinite(y).all()
            codes, qparams = reference.quantize_input(x, inputs, static)
            c = codes.numpy().astype(np.int64) - qparams.zero_point.view(-1, 1).numpy()
            groups = weight.scale.shape[-1]
            sums = np.einsum(
                "mgs,ngs->mng", c.reshape(rows, groups, -1), np.broadcast_to(w, (n, k)).reshape(n, groups, -1)
            )
            wanted = (sums * weight.scale.double().numpy()).sum(-1) * qparams.scale.double().view(-1, 1).numpy()
            assert np.abs(y[0].double().numpy() - wanted).max() <= FLOAT32_SUM * max(1, np.abs(wanted).max())
            assert torch.equal(y[0], reference.wna8_matmul(x, weight, inputs, static))


@cases("w4a8_matmul")
@pytest.mark.parametrize("is_autocast", [False, True])
def test_wna8_matmul_sums_integers_exactly_when_every_product_is_the_largest(backend, is_autocast):
    # 255 * 255 * 256 = 16646400 and 1000 products of 127 * 128 stay below 2^24, where float32 stops counting by one
    largest = QuantSpec(8, False, "channel")
    for spec, inputs, k in ((largest, INPUTS["static-asym"], 256), (WEIGHTS["int8-channel"], INPUTS["static"], 1000)):
        codes = torch.full((5, k), 127, dtype=torch.int8)
        codes[1:, 0] = torch.arange(4)
        zero = torch.full((5, 1), 0 if spec.symmetric else -128, dtype=torch.int32)
        weight = pack(codes, QParams(torch.ones(5, 1), zero), spec)
        zero_point = 0 if inputs.symmetric else -128
        static = QParams(torch.ones(1), torch.tensor([zero_point], dtype=torch.int32))
        x = torch.full((3, k), 255.0)
        x[1], x[2] = -255.0, torch.arange(k) % 100
        c = np.clip(np.rint(x.numpy()) + zero_point, -128, 127).astype(np.int64) - zero_point
        wanted = c @ (codes.numpy().astype(np.int64) - zero.numpy()).T
        assert np.abs(wanted).max() > 2**23 and np.abs(wanted).max() < 2**24
        kernel = choose("w4a8_matmul", weight, backend).kernel
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            y = kernel.run(kernel.prepare(weight, torch.float32), x, inputs, static)
        assert torch.equal(y.long(), torch.from_numpy(wanted))


@cases("w4a8_matmul")
def test_wna8_matmul_stays_exact_when_the_sum_outgrows_float32_counting(backend):
    # beyond 2^24 a running float32 sum drops odd parts; pieces of 256 products are multiples of 256 and lose nothing
    k = 6000
    zero = torch.zeros(5, 1, dtype=torch.int32)
    weight = pack(torch.full((5, k), 127, dtype=torch.int8), QParams(torch.ones(5, 1), zero), WEIGHTS["int8-channel"])
    static = QParams(torch.ones(1), zero[0])
    kernel = choose("w4a8_matmul", weight, backend).kernel
    y = kernel.run(kernel.prepare(weight, torch.float32), torch.full((3, k), 127.0), INPUTS["static"], static)
    assert torch.equal(y.long(), torch.full((3, 5), k * 127 * 127))


@cases("w4a8_matmul")
def test_wna8_matmul_takes_bfloat16_inputs(backend):
    weight, x = packed_weight(WEIGHTS["int8-channel"], (5, 96)), normal(3, 96, seed=1).bfloat16()
    kernel = choose("w4a8_matmul", weight, backend).kernel
    state = kernel.prepare(weight, torch.float32)
    assert torch.equal(kernel.run(state, x, TOKEN, None), kernel.run(state, x.float(), TOKEN, None).bfloat16())


@cases("packed_embedding")
@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)
def test_packed_embedding_gives_rows_of_the_whole_table(backend, spec):
    for k in (32, 96, 33):
        if fits(spec, k):
            table = packed_weight(spec, (7, k))
            kernel = choose("packed_embedding", table, backend).kernel
            state = kernel.prepare(table, torch.float32)
            for ids in (torch.tensor([3]), torch.tensor([[6, 0, 0], [1, 5, 6]]), torch.zeros(2, 0, dtype=torch.long)):
                rows = kernel.run(state, ids)
                assert rows.shape == (*ids.shape, k) and torch.equal(rows, table.dequantize(torch.float32)[ids])


def test_choose_takes_the_first_backend_and_keeps_the_reasons():
    weight = packed_weight(WEIGHTS["int4-g32"], (5, 32))
    choice = choose("w4a16_matmul", weight, "as_trained")
    assert (choice.backend, choice.refused) == ("dense", {})
    no_dense = {"dense": "no dense kernel for w4a8_matmul"}
    stored = QuantSpec(8, False, "tensor", is_activation=True)
    choice = choose("w4a8_matmul", weight, "as_trained", stored)
    wanted = cpu.unavailable() or "takes off the zero points of inputs after the sum"
    assert (choice.backend, choice.refused) == ("reference", no_dense | {"cpu": wanted})
    if not cpu.unavailable():
        choice = choose("w4a8_matmul", weight, "as_trained", TOKEN)
        assert (choice.backend, choice.refused) == ("cpu", no_dense)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"C++ kernels: {cpu.unavailable()}")
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)
def test_as_trained_gives_the_bits_of_the_reference_on_the_cpp_product(spec, dtype, stored):
    input_spec = QuantSpec(8, True, "tensor", is_activation=True) if stored else TOKEN
    static = QParams(torch.tensor([0.03125]), torch.zeros(1, dtype=torch.int32)) if stored else None
    taken = 0
    for n, k in ((5, 32), (33, 576), (70, 96), (7, 33), (40, 1536)):
        if not fits(spec, k):
            continue
        weight = packed_weight(spec, (n, k))
        layers = []
        for backend in ("as_trained", "reference"):
            scheme = QuantScheme("s", weight.spec, input_spec)
            layers.append(PackedLinear(weight, scheme, None, static, backend))
        taken += layers[0].choice.backend == "cpu"
        for m in (1, 3, 30, 70):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 3
            x[0, 0] = 0
            x[-1] *= 0 if m == 3 else 1e-3
            assert torch.equal(*(layer(x.to(dtype)) for layer in layers))
    assert taken or (spec.group_size or 32) % 32


def test_choose_refuses_an_unknown_backend_and_names_the_known_ones():
    weight = packed_weight(WEIGHTS["int4-g32"], (5, 32))
    with pytest.raises(
        UserError, match=r"backend must be one of \['cpu', 'dense', 'reference'\], got refrence. Did you mean"
    ):
        choose("w4a16_matmul", weight, "refrence")
    with pytest.raises(
        UserError, match=r"kernel for w4a8_matmul: backend must be one of \['cpu', 'reference'\], got dense"
    ):
        choose("w4a8_matmul", weight, "dense")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [None, *INPUTS.values()], ids=["float", *INPUTS])
@pytest.mark.parametrize("spec", [WEIGHTS["int4-g32-asym"], WEIGHTS["int8-channel"]], ids=lambda spec: spec.describe())
def test_packed_linear_equals_the_training_layer(spec, inputs, bias):
    linear = torch.nn.Linear(96, 5, bias=bias)
    x = normal(2, 3, 96, seed=1)
    input_fq = None
    if inputs is not None:
        input_fq = FakeQuantize(inputs, (1,), _estimator(), "dynamic" if inputs.dynamic else "static", "minmax")
        if not inputs.dynamic:
            input_fq.observer.observe(x)
            input_fq.adopt_observed()
    layer = QuantLinear(linear, FakeQuantize(spec, spec.scale_shape((5, 96)), _estimator(), "dynamic"), input_fq)
    weight_fq = layer.weight_fake_quant
    packed = pack(weight_fq.codes(linear.weight), weight_fq.qparams(linear.weight), spec)
    served = PackedLinear(
        packed, QuantScheme("s", spec, inputs), linear.bias, static_grid(x, inputs) if inputs else None
    )
    assert torch.equal(served.weight, layer.fake_weight())
    torch.testing.assert_close(served(x), layer(x), rtol=FLOAT32_SUM, atol=FLOAT32_SUM * 10)
    if inputs is None:
        assert torch.equal(served(x), layer(x))


def _estimator():
    from qat.estimators import ESTIMATORS

    return ESTIMATORS["ste_clipped"]


def served_and_trained(folder, scheme: str, kv: KvConfig | None = None, tmp_path=None, **parts):
    """The served model, read back from files when `tmp_path` is given, and its training model."""
    model, coverage = trained(folder, scheme, **parts)
    spec = kv_spec(kv) if kv else None
    packed = pack_model(model, coverage, model.config.to_dict(), spec)
    if tmp_path is not None:
        FORMATS["compressed_tensors"].write(packed, tmp_path)
        packed = read_export(tmp_path)
    install_kv(model, spec)
    return serve(packed), model


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_row_asym"])
@pytest.mark.parametrize("folder", ["tiny_model_dir", "tiny_gpt2_dir", "tiny_mixtral_dir"])
def test_served_model_has_exactly_the_logits_of_training(folder, scheme, tmp_path, request):
    served, model = served_and_trained(request.getfixturevalue(folder), scheme, tmp_path=tmp_path)
    assert torch.equal(logits(served), logits(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(served), logits(model))


def test_served_model_reads_quantized_keys_and_values(tiny_model_dir, tmp_path):
    served, model = served_and_trained(tiny_model_dir, "w4a16_g32", KvConfig(8), tmp_path)
    without, _ = served_and_trained(tiny_model_dir, "w4a16_g32")
    assert torch.equal(logits(served), logits(model))
    assert not torch.equal(logits(served), logits(without))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static", "w4a8_g32"])
@pytest.mark.parametrize("folder", ["tiny_model_dir", "tiny_gpt2_dir", "tiny_mixtral_dir"])
def test_served_integer_model_is_as_near_as_float_sums_are(folder, scheme, tmp_path, request):
    served, model = served_and_trained(request.getfixturevalue(folder), scheme, tmp_path=tmp_path)
    ours, wanted = logits(served), logits(model)
    assert (ours - wanted).abs().max() <= FLIPPED_INPUT_CODES * wanted.abs().max()
    integer = "reference" if cpu.unavailable() else "cpu"
    assert kernel_summary(served)["used"][integer] > 1
    if cpu.unavailable() is None:
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    "parts", [{"embedding": None}, {"embedding": "w4a16_g32"}, {"rules": {"*.q_proj": None}}], ids=str
)
def test_served_model_keeps_float_layers_and_ties(tiny_model_dir, tmp_path, parts):
    served, model = served_and_trained(tiny_model_dir, "w4a16_g32", tmp_path=tmp_path, **parts)
    assert torch.equal(logits(served), logits(model))


def test_reference_backend_serves_the_same_logits(tiny_model_dir):
    model, coverage = trained(tiny_model_dir, "w4a16_g32")
    served = serve(pack_model(model, coverage, model.config.to_dict(), None), backend="reference")
    assert kernel_summary(served) == {"used": {"reference": 16}, "refused": {}}
    assert torch.equal(logits(served), logits(model))


def test_served_model_says_which_kernels_run(tiny_model_dir):
    model, coverage = trained(tiny_model_dir, "w8a8")
    served = serve(pack_model(model, coverage, model.config.to_dict(), None))
    assert isinstance(served.model.embed_tokens, PackedEmbedding) and isinstance(served.lm_head, PackedLinear)
    summary = kernel_summary(served)
    refused, integer = {"dense": "no dense kernel for w8a8_matmul"}, "cpu"
    if cpu.unavailable():
        refused, integer = refused | {"cpu": cpu.unavailable()}, "reference"
    assert summary == {"used": {integer: 15, "dense": 1}, "refused": refused}
    assert f"w8a8, (64, 64), kernel={integer}" in repr(served.model.layers[0].self_attn.q_proj)


@pytest.mark.parametrize(
    "name", ["transformer.ln_f.weight", "transformer.wpe.weight", "transformer.h.1.attn.c_attn.bias"], ids=str
)
def test_export_without_a_float_tensor_is_refused(tiny_gpt2_dir, name):
    model, coverage = trained(tiny_gpt2_dir, "w4a16_g32")
    packed = pack_model(model, coverage, model.config.to_dict(), None)
    floats = {key: tensor for key, tensor in packed.floats.items() if key != name}
    assert len(floats) == len(packed.floats) - 1
    with pytest.raises(UserError, match=f"export: must hold every tensor of the model, got none for {name}"):
        serve(replace(packed, floats=floats))


def test_export_with_a_float_tensor_that_has_no_place_is_refused(tiny_model_dir):
    model, coverage = trained(tiny_model_dir, "w4a16_g32")
    packed = pack_model(model, coverage, model.config.to_dict(), None)
    extra = packed.floats | {"model.layers.0.mlp.up_proj.bias": torch.ones(128)}
    with pytest.raises(UserError, match=r"export: must hold tensors of the model only, got .*up_proj\.bias"):
        serve(replace(packed, floats=extra))


def test_folder_without_an_export_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must hold an exported model, got no config\.json"):
        read_export(tmp_path)


def test_served_model_generates_what_the_training_model_does(tiny_model_dir):
    served, model = served_and_trained(tiny_model_dir, "w4a16_g32", KvConfig(8))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(served.generate(IDS[:1], **options), model.generate(IDS[:1], **options))
