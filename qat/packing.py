"""PackedTensor: the canonical bytes of a quantized weight, its QParams, its QuantSpec and its logical shape.

A row of K codes is one little-endian bit stream of b bits per element: element i lies at bits [i b, i b + b), stored as
the unsigned value `code + 2^(b-1)`, dense at every width from 2 to 8, and the row ends on a whole byte (zero bits fill
it up). At 4 bits and at 3 bits:

    byte        0                 1                     byte   0                 1                 2
    bits    7654 3210         7654 3210                 bits   76 543 210        7 654 321 0       765 432 10
    element  1    0            3    2                           2  1   0         5  4   3  2        7   6  5

Eight elements always fill exactly b bytes. Four bytes read as a little-endian int32 are the words that the
compressed-tensors format stores. Layouts that a kernel likes better are made by the kernel, in memory, never here; how
a float becomes a code is in `grid.py`.

Letters: R rows (all leading dimensions flattened), K row length, G groups per row, P packed bytes per row, b bits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qat import grid
from qat.errors import UserError, problem
from qat.grid import QParams
from qat.scheme import QuantSpec

LANES = 8  # elements that fill whole bytes together, at any width


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A quantized weight of logical shape [..., N, K].

    `packed` is uint8 [R, P]; `scale` float32 [..., G] (ones for `tensor`), every value exact in bfloat16; `zero_point`
    int8 shaped like the scale, None when symmetric.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]

    def codes(self) -> Tensor:
        """The integers, int8 [..., N, K]."""
        return unpack_rows(self.packed, self.spec.bits, self.shape[-1]).view(self.shape)

    @property
    def qparams(self) -> QParams:
        """Scale float32 and zero point int32, both [..., G]."""
        if self.zero_point is None:
            return QParams(self.scale, torch.zeros_like(self.scale, dtype=torch.int32))
        return QParams(self.scale, self.zero_point.to(torch.int32))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(codes - zero_point) * scale, computed in float32: [..., N, K]."""
        return grid.dequantize(self.codes(), self.qparams, self.spec, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales at two bytes each, and zero points at `bits` bits each."""
        return self.spec.packed_bytes(self.shape)

    def check(self, name: str) -> None:
        """Prove that the bytes, the grid and the shape belong together.

        Raises:
            UserError: wrong packed or scale shape, set padding bits, a scale that is not finite, positive and exact in
                bfloat16, or a zero point outside the code range; all problems at once.
        """
        problems = shape_problems(name, self) or padding_problems(name, self) + qparams_problems(name, self)
        if problems:
            raise UserError(*problems)


def packed_width(elements: int, bits: int) -> int:
    """P: bytes that `elements` codes take."""
    return (elements * bits + 7) // 8


def pack(codes: Tensor, qparams: QParams, spec: QuantSpec) -> PackedTensor:
    """PackedTensor of int8 codes [..., N, K]; `qparams` as `grid.choose_qparams` gives them for that tensor."""
    shape = tuple(codes.shape)
    scale = qparams.scale.detach().float().reshape(spec.scale_shape(shape))
    zero_point = None
    if not spec.symmetric:
        zero_point = qparams.zero_point.detach().to(torch.int8).reshape(scale.shape)
    return PackedTensor(pack_rows(codes.reshape(-1, shape[-1]), spec.bits), scale, zero_point, spec, shape)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [R, K] to uint8 [R, P]; each code must fit in `bits`."""
    assert sys.byteorder == "little" and codes.dtype == torch.int8
    rows, length = codes.shape
    groups = -(-length // LANES)
    offset = 1 << (bits - 1)
    fits = codes.numel() == 0 or (-offset <= int(codes.min()) and int(codes.max()) < offset)
    assert fits, f"a code does not fit in {bits} bits and would spill into its neighbour"
    stored = torch.zeros(rows, groups * LANES, dtype=torch.uint8, device=codes.device)
    stored[:, :length] = codes.view(torch.uint8) + offset  # wraps around: two's complement plus the offset, mod 256
    lanes = stored.view(rows, groups, LANES)
    # Eight elements of at most 8 bits fit one 64-bit integer, whose first b bytes are the packed ones.
    words = torch.zeros(rows, groups, dtype=torch.int64, device=codes.device)
    for lane in range(LANES):
        words |= lanes[:, :, lane].to(torch.int64) << (lane * bits)
    packed = words.view(torch.uint8).view(rows, groups, LANES)[:, :, :bits].reshape(rows, groups * bits)
    return tight(packed[:, : packed_width(length, bits)])


def unpack_rows(packed: Tensor, bits: int, length: int) -> Tensor:
    """uint8 [R, P] back to int8 codes [R, length]; inverse of `pack_rows`."""
    rows, width = packed.shape
    assert sys.byteorder == "little" and width == packed_width(length, bits)
    groups = -(-length // LANES)
    padded = torch.zeros(rows, groups * bits, dtype=torch.uint8, device=packed.device)
    padded[:, :width] = packed
    lanes_of_bytes = torch.zeros(rows, groups, LANES, dtype=torch.uint8, device=packed.device)
    lanes_of_bytes[:, :, :bits] = padded.view(rows, groups, bits)
    words = lanes_of_bytes.view(torch.int64).squeeze(-1)
    mask, offset = (1 << bits) - 1, 1 << (bits - 1)
    lanes = torch.empty(rows, groups, LANES, dtype=torch.int8, device=packed.device)
    for lane in range(LANES):
        lanes[:, :, lane] = ((words >> (lane * bits)) & mask) - offset
    return tight(lanes.view(rows, groups * LANES)[:, :length])


def tight(x: Tensor) -> Tensor:
    """A copy of x [...] with the strides of its shape. `contiguous` keeps any stride of a dimension of size 1, and a
    view as a wider type then fails."""
    return x.clone(memory_format=torch.contiguous_format)


def shape_problems(name: str, tensor: PackedTensor) -> list[str]:
    """A line for each part whose shape or dtype does not follow from the logical shape."""
    spec, shape = tensor.spec, tensor.shape
    fix = "The file is damaged or was not written by qat: export again."
    if len(shape) < 2 or min(shape) < 1:
        return [problem(name, "shape must be [..., N, K] with positive sizes", shape, fix)]
    if spec.group_size and shape[-1] % spec.group_size:
        return [problem(name, f"row length must be a multiple of group_size={spec.group_size}", shape[-1], fix)]
    packed_shape = (prod(shape[:-1]), packed_width(shape[-1], spec.bits))
    parts: list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = [
        ("packed", tensor.packed, torch.uint8, packed_shape),
        ("scale", tensor.scale, torch.float32, spec.scale_shape(shape)),
    ]
    problems = []
    if spec.symmetric != (tensor.zero_point is None):
        wanted = f"{spec.describe()} {'has no' if spec.symmetric else 'needs a'} zero point"
        problems.append(problem(name, wanted, "none" if tensor.zero_point is None else "one", fix))
    elif tensor.zero_point is not None:
        parts.append(("zero point", tensor.zero_point, torch.int8, spec.scale_shape(shape)))
    for part, given, dtype, wanted_shape in parts:
        if given.dtype != dtype or tuple(given.shape) != wanted_shape:
            wanted = f"{part} must be {str(dtype).removeprefix('torch.')} {list(wanted_shape)}"
            got = f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
            problems.append(problem(name, wanted, got, fix))
    return problems


def padding_is_clear(packed: Tensor, bits: int, length: int) -> bool:
    """Every bit behind the last of `length` codes is 0; rows [R, P or wider] may go on in whole bytes."""
    width, used = packed_width(length, bits), length * bits % 8
    return not bool(packed[:, width:].any()) and not (used and bool((packed[:, width - 1] >> used).any()))


def padding_problems(name: str, tensor: PackedTensor) -> list[str]:
    """A line when a bit behind the last code of a row is set."""
    if padding_is_clear(tensor.packed, tensor.spec.bits, tensor.shape[-1]):
        return []
    return [
        problem(name, "bits behind the last code of a row must be 0", "others", "The file is damaged: export again.")
    ]


def qparams_problems(name: str, tensor: PackedTensor) -> list[str]:
    """A line each for scales that cannot be stored or divided by, and for zero points that are no codes."""
    problems = scale_problems(name, tensor.scale)
    if tensor.zero_point is not None:
        low, high = grid.code_range(tensor.spec)
        outside = tensor.zero_point[(tensor.zero_point < low) | (tensor.zero_point > high)]
        if outside.numel():
            fix = "The file is damaged: export again."
            problems.append(problem(name, f"zero points must be in [{low}, {high}]", int(outside[0]), fix))
    return problems


def scale_problems(name: str, scale: Tensor) -> list[str]:
    """A line when a scale [..., G] is not finite, positive and exact in bfloat16."""
    bad = scale[~(torch.isfinite(scale) & (scale > 0))]
    if bad.numel():
        fix = "The file is damaged, or training diverged: look at the loss, then export again."
        return [problem(name, "scales must be finite and positive", float(bad[0]), fix)]
    inexact = scale[scale.bfloat16().float() != scale]
    if inexact.numel():
        fix = "Train with scale_dtype=bfloat16, so that the file holds the scale that was trained."
        return [problem(name, "scales must be exact in bfloat16", float(inexact[0]), fix)]
    return []
