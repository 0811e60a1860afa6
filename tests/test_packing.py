"""The bytes of PackedTensor: every code at every width survives, and the words are those of compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from qat import grid
from qat.errors import UserError
from qat.formats.compressed_tensors import to_words
from qat.grid import QParams
from qat.packing import PackedTensor, pack, pack_rows, packed_width, unpack_rows
from qat.scheme import QuantSpec

WIDTHS = range(2, 9)


def all_codes(bits: int, rows: int, length: int) -> torch.Tensor:
    """int8 [rows, length] that runs through every code of the width, each row starting elsewhere."""
    counter = torch.arange(rows * length).view(rows, length) + 6 * torch.arange(rows).view(-1, 1)
    return (counter % (1 << bits) - (1 << (bits - 1))).to(torch.int8)


@pytest.mark.parametrize("length", [1, 31, 33, 48])
@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_rows_roundtrips_every_code(bits, length):
    codes = all_codes(bits, 256, length)
    packed = pack_rows(codes, bits)
    assert codes.unique().numel() == 1 << bits
    assert packed.dtype == torch.uint8
    assert packed.shape == (256, packed_width(length, bits))
    assert torch.equal(unpack_rows(packed, bits, length), codes)


@pytest.mark.parametrize("length", [1, 31, 33, 48])
@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_words_equal_those_of_compressed_tensors(bits, length):
    codes = all_codes(bits, 37, length)
    assert torch.equal(to_words(pack_rows(codes, bits)), pack_to_int32(codes, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_columns_equal_the_zero_point_words_of_compressed_tensors(bits):
    codes = all_codes(bits, 37, 3)
    ours = to_words(pack_rows(codes.t().contiguous(), bits)).t()
    assert torch.equal(ours, pack_to_int32(codes, bits, packed_dim=0))


def test_pack_rows_lays_out_bits_as_drawn():
    # Unsigned 0..7 at 3 bits, element 0 in the lowest bits: 0b111_110_101_100_011_010_001_000.
    assert pack_rows(torch.arange(-4, 4, dtype=torch.int8).view(1, 8), 3).tolist() == [[0x88, 0xC6, 0xFA]]
    assert pack_rows(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4).tolist() == [[0xF0, 0x08]]


def test_pack_rows_takes_strided_codes():
    codes = all_codes(4, 33, 6)
    assert torch.equal(unpack_rows(pack_rows(codes.t(), 4), 4, 33), codes.t())


def packed(spec: QuantSpec, shape: tuple[int, ...] = (6, 96)) -> PackedTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    qparams = grid.choose_qparams(*grid.min_max(weight, spec), spec)
    return pack(grid.quantize(weight, qparams, spec), qparams, spec)


@pytest.mark.parametrize("shape", [(6, 96), (3, 5, 48)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_tensor_dequantizes_to_the_fake_quantized_weight(shape, granularity, symmetric):
    spec = QuantSpec(3, symmetric, granularity, 48 if granularity == "group" else None)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    qparams = grid.choose_qparams(*grid.min_max(weight, spec), spec)
    tensor = pack(grid.quantize(weight, qparams, spec), qparams, spec)
    tensor.check("w")
    assert (tensor.zero_point is None) == symmetric
    assert torch.equal(tensor.codes(), grid.quantize(weight, qparams, spec))
    assert torch.equal(tensor.dequantize(torch.float32), grid.fake_quantize(weight, qparams, spec, torch.float32))


def test_nbytes_counts_codes_scales_and_zero_points():
    symmetric, asymmetric = QuantSpec(4, True, "group", 48), QuantSpec(4, False, "group", 48)
    assert packed(symmetric).nbytes == 6 * 48 + 12 * 2
    assert packed(asymmetric).nbytes == 6 * 48 + 12 * 2 + 6


def with_part(tensor: PackedTensor, **parts) -> PackedTensor:
    fields = {key: getattr(tensor, key) for key in ("packed", "scale", "zero_point", "spec", "shape")}
    return PackedTensor(**(fields | parts))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_check_refuses_a_scale_that_is_not_finite_and_positive(value):
    tensor = packed(QuantSpec(4))
    tensor.scale[3] = value
    with pytest.raises(UserError, match=f"layer: scales must be finite and positive, got {value}"):
        tensor.check("layer")


def test_check_refuses_a_scale_that_bfloat16_would_change():
    tensor = with_part(packed(QuantSpec(4)), scale=torch.full((6, 1), 0.1))
    with pytest.raises(UserError, match="layer: scales must be exact in bfloat16"):
        tensor.check("layer")


def test_check_refuses_a_zero_point_outside_the_code_range():
    tensor = packed(QuantSpec(4, False))
    tensor.zero_point[0] = 8
    with pytest.raises(UserError, match=r"layer: zero points must be in \[-8, 7\], got 8"):
        tensor.check("layer")


def test_check_refuses_set_padding_bits():
    spec = QuantSpec(3)
    tensor = pack(torch.zeros(2, 5, dtype=torch.int8), QParams(torch.ones(2, 1), torch.zeros(2, 1)), spec)
    tensor.packed[1, -1] |= 0x80
    with pytest.raises(UserError, match="layer: bits behind the last code of a row must be 0"):
        tensor.check("layer")


def test_check_refuses_shapes_that_do_not_follow_from_the_logical_one():
    tensor = packed(QuantSpec(4, True, "group", 48))
    with pytest.raises(UserError, match=r"packed must be uint8 \[6, 48\], got uint8 \[6, 47\]"):
        with_part(tensor, packed=tensor.packed[:, :-1]).check("layer")
    with pytest.raises(UserError, match=r"scale must be float32 \[6, 2\], got float32 \[6, 1\]"):
        with_part(tensor, scale=tensor.scale[:, :1]).check("layer")
    with pytest.raises(UserError, match="row length must be a multiple of group_size=48, got 95"):
        with_part(tensor, shape=(6, 95)).check("layer")
    with pytest.raises(UserError, match="int4 sym g48 has no zero point, got one"):
        with_part(tensor, zero_point=torch.zeros(6, 2, dtype=torch.int8)).check("layer")
    with pytest.raises(UserError, match=r"shape must be \[..., N, K\]"):
        with_part(tensor, shape=(96,)).check("layer")


@pytest.mark.parametrize("code", [-9, 8])
def test_pack_rows_refuses_a_code_that_would_spill_into_its_neighbour(code):
    with pytest.raises(AssertionError, match="a code does not fit in 4 bits"):
        pack_rows(torch.tensor([[code]], dtype=torch.int8), 4)
