"""The C++ kernels: loading the library, laying weights out for it, and the two matmul ops.

The library stands beside this file when it was built (see CMakeLists.txt); one binary holds AVX-512 VNNI, AVX2 and
portable code and chooses when it is first used (QAT_MAX_ISA=avx2 or portable limits it, for tests). Without it
`unavailable()` says why and the other backends serve.

    qat::packed_matmul(x [M, K] float32, blob, n, k, group, bits, planes) -> [M, N] float32

planes = 1: inputs rounded to int8 per token, as schemes with int8 inputs train them. planes = 2: float inputs, carried
as two int8 rows, x = s1 q1 + s2 q2, with an error of about 2^-15 of the largest input.
The layout of `blob` is drawn in csrc/matmul.h.

Letters: M input rows, N out_features, K in_features, G groups per row, S group size, B blocks of 16 rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qat.packing import PackedTensor
from qat.scheme import QuantSpec

LIBRARY = Path(__file__).parent / "qat_cpu.so"
ROWS = 16  # weight rows per block
UNIT = 32  # inputs a group is padded to


@cache
def unavailable() -> str | None:
    """None when the library is loaded, else the reason why not. Loads it the first time."""
    library = next((path for path in _places() if path.is_file()), None)
    if library is None:
        return "not built (no C++ compiler at installation; run `make setup` where there is one)"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"does not load: {error}"
    torch.library.register_fake("qat::packed_matmul", _packed_matmul_shape)
    return None


def _places() -> list[Path]:
    """Beside this file, or, in an editable installation, where the build put it."""
    from importlib.util import find_spec

    spec = find_spec("qat.kernels.cpu")
    folders = list(spec.submodule_search_locations or []) if spec else []
    other = os.environ.get("QAT_CPU_LIBRARY")  # another build, such as that of `make test-sanitize`
    if other:
        return [Path(other)]
    return [LIBRARY, *(Path(folder) / LIBRARY.name for folder in folders)]


def _packed_matmul_shape(x: Tensor, blob: Tensor, n: int, k: int, group: int, bits: int, planes: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


@dataclass(frozen=True)
class CpuWeight:
    """A weight in the kernels' own layout: `blob` uint8, logical [n, k], padded group size, bits."""

    blob: Tensor
    n: int
    k: int
    group: int
    bits: int


def refuses(weight: PackedTensor) -> str | None:
    """Why the kernels cannot take this weight, or None."""
    size = weight.spec.group_size
    if len(weight.shape) != 2:
        return f"needs a matrix, got {len(weight.shape)} dimensions"
    if size and size != weight.shape[-1] and size % UNIT:
        return f"group size must be a multiple of {UNIT}, got {size}"
    return unavailable()


def refuses_input(spec: QuantSpec) -> str | None:
    """Why the kernels cannot quantize inputs on this grid, or None: they take one symmetric scale per token."""
    if spec.symmetric and spec.dynamic and spec.bits == 8:
        return None
    return f"inputs must be int8 sym per token, got {spec.describe()}"


def prepack(weights: list[PackedTensor]) -> CpuWeight:
    """Lay out one or several weights [N_i, K] of the same grid, stacked along N (merged q, k, v or gate, up)."""
    spec, k = weights[0].spec, weights[0].shape[-1]
    assert all(weight.spec == spec and weight.shape[-1] == k for weight in weights)
    codes_NK = torch.cat([weight.codes() for weight in weights])
    n = codes_NK.shape[0]
    groups = spec.groups(k)
    size = k // groups
    padded = -(-size // UNIT) * UNIT
    blocks = -(-n // ROWS)
    offset = 1 << (spec.bits - 1)
    # padding is the code whose unsigned value is the offset: it adds nothing, for its inputs are zero
    unsigned = torch.full((blocks * ROWS, groups, padded), offset, dtype=torch.uint8)
    unsigned[:n, :, :size] = (codes_NK.to(torch.int16) + offset).to(torch.uint8).view(n, groups, size)
    if spec.bits <= 4:
        pairs = unsigned.view(blocks, ROWS, groups, padded // 8, 2, 4)
        lines = pairs[..., 0, :] | (pairs[..., 1, :] << 4)
    else:
        lines = unsigned.view(blocks, ROWS, groups, padded // 4, 4)
    lines_BG = lines.permute(0, 2, 3, 1, 4).reshape(blocks, groups, -1)
    scale = torch.zeros(blocks * ROWS, groups, dtype=torch.bfloat16)
    zero = torch.zeros(blocks * ROWS, groups, dtype=torch.int8)
    scale[:n] = torch.cat([w.scale.expand(w.shape[0], groups) for w in weights]).bfloat16()
    if not spec.symmetric:
        zero[:n] = torch.cat([w.zero_point.expand(w.shape[0], groups) for w in weights if w.zero_point is not None])
    tail = [t.view(blocks, ROWS, groups).transpose(1, 2).contiguous().view(torch.uint8) for t in (scale, zero)]
    blob = torch.cat([lines_BG, *(t.view(blocks, groups, -1) for t in tail)], -1)
    return CpuWeight(blob.flatten().contiguous(), n, k, padded, spec.bits)


def packed_matmul(x: Tensor, weight: CpuWeight, planes: int) -> Tensor:
    """x [..., K] of any float dtype times a laid-out weight: [..., N] in x's dtype."""
    x_MK = x.reshape(-1, x.shape[-1]).float().contiguous()
    y_MN = torch.ops.qat.packed_matmul(x_MK, weight.blob, weight.n, weight.k, weight.group, weight.bits, planes)
    return y_MN.to(x.dtype).view(*x.shape[:-1], weight.n)
