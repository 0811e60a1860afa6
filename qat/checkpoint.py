"""A training model's whole state as safetensors: weights, scales, observers, phases. Ties are stored once.

This is what `qat export`, `qat evaluate` and `qat verify` rebuild a finished run from, and what a run that goes on
takes in place of a training that had ended. Checkpoints with optimizer and position are in `checkpoints.py`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.checkpoints import Damaged, check, sha256, write_manifest
from qat.errors import UserError, problem
from qat.paths import atomic_dir

WEIGHTS = "model.safetensors"


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shared tensor under its first name only."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.untyped_storage().data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor.detach().contiguous()
    return state


def save_final(model: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    """Publish the end of a training: model.safetensors, and a manifest with `facts` and checksums."""
    with atomic_dir(folder, overwrite=True) as temporary:
        save_state(model, temporary / WEIGHTS)
        path = temporary / WEIGHTS
        files = {WEIGHTS: {"bytes": path.stat().st_size, "sha256": sha256(path)}}
        write_manifest(temporary, {"facts": facts}, files)


def read_final(folder: Path) -> dict[str, Any] | None:
    """The facts of a training that had ended, when its files are whole; None otherwise."""
    try:
        return check(folder)["facts"]
    except Damaged:
        return None


def save_state(model: nn.Module, path: Path) -> None:
    """Write beside, then rename. Raises UserError when a float tensor is not finite: such a state is never saved."""
    from safetensors.torch import save_file

    state = unique_state(model)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            fix = "Lower optim.lr; nothing was written, an earlier checkpoint is untouched."
            raise UserError(problem(name, "must be finite to be saved", "NaN or infinity", fix), before_work=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def load_state(model: nn.Module, path: Path) -> None:
    """Load a state into a model of the same structure; raises UserError naming what is missing, extra or misshapen."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        fix = "Train the run first, or name another run folder."
        raise UserError(problem(str(path), "must exist", "no such file", fix))
    try:
        state = load_file(path)
    except SafetensorError as error:
        fix = "The file is damaged: restore it from a copy, or train again."
        raise UserError(problem(str(path), "must be a whole safetensors file", str(error), fix)) from None
    wanted = unique_state(model)
    wrong = [n for n in wanted if n not in state or state[n].shape != wanted[n].shape]
    wrong += [n for n in state if n not in wanted]
    if wrong:
        fix = "The checkpoint belongs to another scheme, plan or model."
        raise UserError(problem(str(path), "must fit the model", ", ".join(wrong[:10]), fix))
    model.load_state_dict(state, strict=False)


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 of names, shapes and 256 values spread over every parameter: tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
