"""KERNELS: (op, backend) -> kernel, and the choice among them, made once when a layer is built.

A kernel has `refuses(weight) -> reason or None`, `prepare(weight, dtype) -> state` (private to it, in memory only; the
canonical bytes stay in the PackedTensor) and `run`. Backends are tried in the order of PREFERENCE; the reasons of those
refused are kept on the layer and shown by `qat doctor` and `qat inspect`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import UserError, nearest, problem
from qat.kernels import cpu, reference
from qat.packing import PackedTensor
from qat.scheme import QuantSpec

# `auto` is for speed; `as_trained` is the arithmetic of the fake-quantized forward, for comparing logits with it, so it
# passes over kernels that differ in their bits
PREFERENCE = {"auto": ("cpu", "dense", "reference"), "as_trained": ("dense", "cpu", "reference")}


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op; `run(state, x, *rest)` with the arguments of the reference after the weight.

    `differs` says where its results are not those of training, bit for bit.
    """

    refuses: Callable[[PackedTensor, QuantSpec | None], str | None]
    prepare: Callable[[PackedTensor, torch.dtype], Any]
    run: Callable[..., Tensor]
    differs: Callable[[QuantSpec | None], str | None] = lambda input_spec: None


@dataclass(frozen=True)
class Choice:
    """The kernel a layer runs on, and why the others were refused."""

    backend: str
    kernel: Kernel
    refused: dict[str, str]


def _never(weight: PackedTensor, input_spec: QuantSpec | None) -> str | None:
    return None


def _cpu_refuses(weight: PackedTensor, input_spec: QuantSpec | None) -> str | None:
    return cpu.refuses(weight) or (cpu.refuses_input(input_spec) if input_spec else None)


def _cpu_differs(input_spec: QuantSpec | None) -> str | None:
    if input_spec is None:
        return "carries float inputs as two int8 planes"
    if not input_spec.symmetric:
        return "takes off the zero points of inputs after the sum"
    return None


def _cpu_prepare(weight: PackedTensor, dtype: torch.dtype) -> cpu.CpuWeight:
    laid_out = cpu.prepack([weight])
    blobs = [laid_out.blob]
    cpu.in_huge_pages(blobs)
    return replace(laid_out, blob=blobs[0])


def _cpu_matmul(op: str) -> Callable[..., Tensor]:
    def run(state: cpu.CpuWeight, x: Tensor, input_spec: Any = None, static: Any = None) -> Tensor:
        return cpu.matmul(op, x, state, static)

    return run


def _cpu_embedding(state: cpu.CpuWeight, ids: Tensor) -> Tensor:
    return cpu.embedding(ids, state)


def _keep(weight: PackedTensor, dtype: torch.dtype) -> PackedTensor:
    return weight


def _dense(weight: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Dequantized once, [..., N, K]: the memory of a float model, the speed of torch's matmul, the same values."""
    return weight.dequantize(dtype)


def _dense_matmul(state: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, state if torch.is_autocast_enabled(x.device.type) else state.to(x.dtype))


def _reference_embedding(state: PackedTensor, ids: Tensor) -> Tensor:
    return reference.packed_embedding(ids, state)


def _reference_a16(state: PackedTensor, x: Tensor) -> Tensor:
    return reference.wna16_matmul(x, state)


def _reference_a8(state: PackedTensor, x: Tensor, input_spec: Any, static: Any) -> Tensor:
    return reference.wna8_matmul(x, state, input_spec, static)


# matmuls are named by what a weight is stored in (w4: 2 to 4 bits, w8: 5 to 8) and what its inputs are
KERNELS: dict[tuple[str, str], Kernel] = {
    ("w4a16_matmul", "cpu"): Kernel(_cpu_refuses, _cpu_prepare, _cpu_matmul("w4a16_matmul"), _cpu_differs),
    ("w8a16_matmul", "cpu"): Kernel(_cpu_refuses, _cpu_prepare, _cpu_matmul("w8a16_matmul"), _cpu_differs),
    ("w4a8_matmul", "cpu"): Kernel(_cpu_refuses, _cpu_prepare, _cpu_matmul("w4a8_matmul"), _cpu_differs),
    ("w8a8_matmul", "cpu"): Kernel(_cpu_refuses, _cpu_prepare, _cpu_matmul("w8a8_matmul"), _cpu_differs),
    ("w4a16_matmul", "dense"): Kernel(_never, _dense, _dense_matmul),
    ("w8a16_matmul", "dense"): Kernel(_never, _dense, _dense_matmul),
    ("w4a16_matmul", "reference"): Kernel(_never, _keep, _reference_a16),
    ("w8a16_matmul", "reference"): Kernel(_never, _keep, _reference_a16),
    ("w4a8_matmul", "reference"): Kernel(_never, _keep, _reference_a8),
    ("w8a8_matmul", "reference"): Kernel(_never, _keep, _reference_a8),
    ("packed_embedding", "cpu"): Kernel(_cpu_refuses, _cpu_prepare, _cpu_embedding),
    ("packed_embedding", "reference"): Kernel(_never, _keep, _reference_embedding),
}


def matmul_op(weight: PackedTensor, has_input_grid: bool) -> str:
    """The op that multiplies with `weight`: w4a16_matmul, w4a8_matmul, w8a16_matmul or w8a8_matmul."""
    return f"w{4 if weight.spec.bits <= 4 else 8}a{8 if has_input_grid else 16}_matmul"


def choose(op: str, weight: PackedTensor, backend: str = "auto", input_spec: QuantSpec | None = None) -> Choice:
    """The first backend that takes `weight`, or the named one.

    `as_trained` takes kernels only where they give the bits of training.
    Raises UserError when the named backend does not exist for `op` or refuses the weight.
    """
    refused: dict[str, str] = {}
    candidates = PREFERENCE.get(backend, (backend,))
    for name in candidates:
        kernel = KERNELS.get((op, name))
        reason = f"no {name} kernel for {op}" if kernel is None else kernel.refuses(weight, input_spec)
        if kernel is not None and backend == "as_trained":
            reason = reason or kernel.differs(input_spec)
        if kernel is not None and reason is None:
            return Choice(name, kernel, refused)
        refused[name] = str(reason)
    known = [name for known_op, name in KERNELS if known_op == op]
    raise UserError(problem(f"kernel for {op}", f"backend must be one of {known}", backend, nearest(backend, known)))
