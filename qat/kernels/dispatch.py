"""KERNELS: (op, backend) -> kernel, and the choice among them, made once when a layer is built.

A kernel has `refuses(weight) -> reason or None`, `prepare(weight, dtype) -> state` (private to it, in memory only; the
canonical bytes stay in the PackedTensor) and `run`. Backends are tried in the order of PREFERENCE; the reasons of those
refused are kept on the layer and shown by `qat doctor` and `qat inspect`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import UserError, nearest, problem
from qat.kernels import reference
from qat.packing import PackedTensor

PREFERENCE = ("dense", "reference")


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op; `run(state, x, *rest)` with the arguments of the reference after the weight."""

    refuses: Callable[[PackedTensor], str | None]
    prepare: Callable[[PackedTensor, torch.dtype], Any]
    run: Callable[..., Tensor]


@dataclass(frozen=True)
class Choice:
    """The kernel a layer runs on, and why the others were refused."""

    backend: str
    kernel: Kernel
    refused: dict[str, str]


def _never(weight: PackedTensor) -> str | None:
    return None


def _keep(weight: PackedTensor, dtype: torch.dtype) -> PackedTensor:
    return weight


def _dense(weight: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Dequantized once, [..., N, K]: the memory of a float model, the speed of torch's matmul, the same values."""
    return weight.dequantize(dtype)


def _dense_matmul(state: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, state if torch.is_autocast_enabled(x.device.type) else state.to(x.dtype))


def _reference_embedding(state: PackedTensor, ids: Tensor) -> Tensor:
    return reference.packed_embedding(ids, state)


def _reference_wna16(state: PackedTensor, x: Tensor) -> Tensor:
    return reference.wna16_matmul(x, state)


def _reference_wna8(state: PackedTensor, x: Tensor, input_spec: Any, static: Any) -> Tensor:
    return reference.wna8_matmul(x, state, input_spec, static)


KERNELS: dict[tuple[str, str], Kernel] = {
    ("wna16_matmul", "dense"): Kernel(_never, _dense, _dense_matmul),
    ("wna16_matmul", "reference"): Kernel(_never, _keep, _reference_wna16),
    ("wna8_matmul", "reference"): Kernel(_never, _keep, _reference_wna8),
    ("packed_embedding", "reference"): Kernel(_never, _keep, _reference_embedding),
}


def choose(op: str, weight: PackedTensor, backend: str = "auto") -> Choice:
    """The first backend that takes `weight`, or the named one.

    Raises UserError when the named backend does not exist for `op` or refuses the weight.
    """
    refused: dict[str, str] = {}
    candidates = PREFERENCE if backend == "auto" else (backend,)
    for name in candidates:
        kernel = KERNELS.get((op, name))
        reason = f"no {name} kernel for {op}" if kernel is None else kernel.refuses(weight)
        if kernel is not None and reason is None:
            return Choice(name, kernel, refused)
        refused[name] = str(reason)
    known = [name for known_op, name in KERNELS if known_op == op]
    raise UserError(problem(f"kernel for {op}", f"backend must be one of {known}", backend, nearest(backend, known)))
