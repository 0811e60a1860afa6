"""The C++ kernels: loading the library, laying weights out for it, and its ops.

The library stands beside this file when it was built (see CMakeLists.txt); one binary holds AVX-512 VNNI, AVX-VNNI,
AVX2 and portable code and chooses when it is first used (QAT_MAX_ISA=avxvnni, avx2 or portable limits it, for tests).
Without it `unavailable()` says why and the other backends serve.

Each op has the name of its reference in `kernels/reference.py`: `torch.ops.qat.w4a8_matmul` and so on. `w4` takes
weights of 2 to 4 bits, `w8` of 5 to 8; `a8` rounds inputs to int8 per token, or to a stored grid, as schemes with int8
inputs train them; `a16` takes float inputs, carried as two int8 rows x = s1 q1 + s2 q2 with an error of about 2^-15 of
the largest. A row of inputs that is not finite gives a row of NaN. The layout of a weight is drawn in csrc/matmul.h.

Letters: M input rows, N out_features, K in_features, G groups per row, S group size, P panels of 32 rows, D head size.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch._ops import OpOverload

from qat.grid import QParams
from qat.packing import PackedTensor
from qat.scheme import QuantSpec

LIBRARY = Path(__file__).parent / "qat_cpu.so"
PANEL = 32  # weight rows
UNIT = 32  # inputs a group is padded to
HUGE_PAGE = 1 << 21  # bytes


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
    for op in ("w4a8_matmul", "w8a8_matmul", "w4a16_matmul", "w8a16_matmul"):
        torch.library.register_fake(f"qat::{op}", _matmul_shape)
    torch.library.register_fake("qat::packed_embedding", _embedding_shape)
    torch.library.register_fake("qat::lm_head_top", _top_shapes)
    torch.library.register_fake("qat::rmsnorm_quantize", _quantized_shapes)
    torch.library.register_fake("qat::silu_mul_quantize", _quantized_shapes)
    torch.library.register_fake("qat::decode_attention", _attention_shape)
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


def _matmul_shape(x: Tensor, blob: Tensor, n: int, *_rest: int | Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], n)


def _embedding_shape(ids: Tensor, blob: Tensor, n: int, k: int, *_rest: int) -> Tensor:
    return ids.new_empty(ids.shape[0], k, dtype=torch.float32)


def _top_shapes(hidden: Tensor, blob: Tensor, grid: list[int], k: int, int8_inputs: bool) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape[0], k), hidden.new_empty(hidden.shape[0], k, dtype=torch.int64)


def _quantized_shapes(x: Tensor, other: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1)


def _attention_shape(q: Tensor, *_rest: Tensor) -> Tensor:
    return torch.empty_like(q)


@dataclass(frozen=True)
class CpuWeight:
    """A weight in the kernels' own layout: `blob` uint8, logical [n, k], padded group size, bits (16: bfloat16), and
    whether it has zero points."""

    blob: Tensor
    n: int
    k: int
    group: int
    bits: int
    zeros: bool = False

    @cached_property
    def grid(self) -> tuple[int, int, int, int, int]:
        """What the ops want after the blob: n, k, group, bits, zeros."""
        return self.n, self.k, self.group, self.bits, int(self.zeros)


def refuses(weight: PackedTensor) -> str | None:
    """Why the kernels cannot take this weight, or None."""
    size = weight.spec.group_size
    if len(weight.shape) != 2:
        return f"needs a matrix, got {len(weight.shape)} dimensions"
    if size and size != weight.shape[-1] and size % UNIT:
        return f"group size must be a multiple of {UNIT}, got {size}"
    return unavailable()


def refuses_input(spec: QuantSpec) -> str | None:
    """Why the kernels cannot quantize inputs on this grid, or None: int8, one scale a token or a stored grid."""
    if spec.bits == 8 and (not spec.dynamic or (spec.symmetric and spec.granularity == "token")):
        return None
    return f"inputs must be int8 sym per token or static, got {spec.describe()}"


def prepack(weights: list[PackedTensor]) -> CpuWeight:
    """Lay out one or several weights [N_i, K] of the same grid, stacked along N (merged q, k, v or gate, up)."""
    spec, k = weights[0].spec, weights[0].shape[-1]
    assert all(weight.spec == spec and weight.shape[-1] == k for weight in weights)
    codes_NK = torch.cat([weight.codes() for weight in weights])
    n, groups = codes_NK.shape[0], spec.groups(k)
    size = k // groups
    padded, panels = -(-size // UNIT) * UNIT, -(-n // PANEL)
    offset = 1 << (spec.bits - 1)
    # padding is the code whose unsigned value is the offset: it adds nothing, for its inputs are zero
    unsigned = torch.full((panels * PANEL, groups, padded), offset, dtype=torch.uint8)
    unsigned[:n, :, :size] = (codes_NK.to(torch.int16) + offset).to(torch.uint8).view(n, groups, size)
    scale = torch.zeros(panels * PANEL, groups, dtype=torch.bfloat16)
    scale[:n] = torch.cat([w.scale.expand(w.shape[0], groups) for w in weights]).bfloat16()
    parts = [_lines(unsigned, _container(spec.bits)), _by_panel(scale).view(torch.uint8)]
    blob_P = torch.cat([part.view(panels, groups, -1) for part in parts], -1).view(panels, -1)
    if not spec.symmetric:
        zero = torch.zeros(panels * PANEL, groups, dtype=torch.int8)
        zero[:n] = torch.cat([w.zero_point.expand(w.shape[0], groups) for w in weights if w.zero_point is not None])
        blob_P = torch.cat([blob_P, _by_panel(zero).view(torch.uint8).view(panels, -1)], -1)
        blob_P = torch.nn.functional.pad(blob_P, (0, -blob_P.shape[-1] % 64))
    return CpuWeight(blob_P.flatten().contiguous(), n, k, padded, spec.bits, not spec.symmetric)


def prepack_floats(weights: list[Tensor]) -> CpuWeight:
    """Lay out float weights [N_i, K], stacked along N, as bfloat16."""
    weight = torch.cat([w.detach() for w in weights]).bfloat16()
    n, k = weight.shape
    panels, padded = -(-n // PANEL), -(-k // UNIT) * UNIT
    full = torch.zeros(panels * PANEL, padded, dtype=torch.bfloat16)
    full[:n, :k] = weight
    lines = full.view(panels, 2, 16, padded // 2, 2).permute(0, 3, 1, 2, 4).contiguous()
    return CpuWeight(lines.view(torch.uint8).flatten(), n, k, padded, 16)


def in_huge_pages(blobs: list[Tensor]) -> None:
    """Replace blobs one after the other by copies that stand together in memory of 2 MB pages, where Linux gives such.

    A row of inputs reads all weights once: one thread reads 33 GB/s from 4 KB pages and 39 GB/s from 2 MB pages (EPYC,
    4096 x 4096 at 4 bits out of cache). A tensor that is listed twice is copied once. Sizes are whole cache lines; less
    than two large pages together stay where they are.
    """
    size = sum(blob.numel() for blob in blobs)
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < 2 * HUGE_PAGE:
        return
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the same bytes in small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    room, start, moved = torch.frombuffer(memory, dtype=torch.uint8), 0, dict[int, Tensor]()
    for i, blob in enumerate(blobs):
        key = blob.data_ptr()
        if key not in moved:
            moved[key] = room[start : start + blob.numel()].copy_(blob)
            start += blob.numel()
        blobs[i] = moved[key]


def _container(bits: int) -> int:
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def _lines(unsigned: Tensor, container: int) -> Tensor:
    """Unsigned codes [32 P, G, S] as the lines of csrc/matmul.h: [P, G, bytes]."""
    rows, groups, size = unsigned.shape
    together = 8 // container  # values that share a byte
    parts = unsigned.view(rows // PANEL, 2, 16, groups, size // (4 * together), together, 4)
    lines = torch.zeros_like(parts[..., 0, :])
    for i in range(together):
        lines |= parts[..., i, :] << (container * i)
    return lines.permute(0, 3, 4, 1, 2, 5).reshape(rows // PANEL, groups, -1)


def _by_panel(q: Tensor) -> Tensor:
    """A value per row and group [32 P, G] as [P, G, 32]."""
    return q.view(-1, PANEL, q.shape[-1]).transpose(1, 2).contiguous()


def matmul(op: str, x: Tensor, weight: CpuWeight, *static: QParams | None) -> Tensor:
    """x [..., K] of any float dtype through the op named `op`: [..., N] in x's dtype.

    Args:
        static: the stored input grid of a8 ops; None or absent for one scale per token, and for a16 ops.
    """
    grid = static[0] if static else None
    stored = () if grid is None else (torch.cat([q.float().flatten() for q in grid]),)
    if x.dtype is torch.float32 and x.dim() == 2 and x.is_contiguous():  # a view costs as much as a small matmul
        return _overload(op)(x, weight.blob, *weight.grid, *stored)
    x_MK = x.reshape(-1, x.shape[-1]).float().contiguous()
    y_MN = _overload(op)(x_MK, weight.blob, *weight.grid, *stored)
    return y_MN.to(x.dtype).view(*x.shape[:-1], weight.n)


@cache
def _overload(op: str) -> OpOverload:
    """Looked up once: the packet of overloads that `torch.ops` gives resolves it in every call."""
    return getattr(torch.ops.qat, op).default


def embedding(ids: Tensor, table: CpuWeight) -> Tensor:
    """Rows `ids` [...] of a laid-out table: [..., K] float32."""
    rows = torch.ops.qat.packed_embedding(ids.reshape(-1).long(), table.blob, *table.grid)
    return rows.view(*ids.shape, table.k)


def lm_head_top(hidden: Tensor, head: CpuWeight, k: int, int8_inputs: bool) -> tuple[Tensor, Tensor]:
    """The k largest logits of hidden [..., K] and their tokens, [..., k] float32 and int64, as the engine finds them.

    Args:
        k: at most 1024.
        int8_inputs: inputs rounded to int8 per token, else taken as floats.
    """
    rows = hidden.reshape(-1, hidden.shape[-1]).float().contiguous()
    values, tokens = torch.ops.qat.lm_head_top(rows, head.blob, list(head.grid), k, int8_inputs)
    return values.view(*hidden.shape[:-1], k), tokens.view(*hidden.shape[:-1], k)
