"""What a run that goes on needs to be the run that never stopped, as named tensors and plain facts.

    model.NAME          parameters and buffers of the student (scales, observers, phases), ties once
    optim.NAME.KEY      what the optimizer holds for the parameter NAME
    rng.RANK.KIND       torch, CUDA, numpy and Python generators of every process
    seen.LAYER.KEY      what the next `layers` line is compared with
    facts               step, schedule, tokens, step seconds, phase

States are taken between optimizer steps, so there is no half accumulated gradient. The order of windows is a function
of the seed (`data.window_order`), so the next sample of every process follows from the step. Under FSDP2 every process
gives and takes its own rows; files are in `checkpoints.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from qat import ranks
from qat.checkpoints import Checkpoint, Piece
from qat.errors import UserError, problem
from qat.fake_quant import FakeQuantize


def begin_at(trainer: L.Trainer, step: int) -> None:
    """Let Lightning count on from `step` optimizer steps; before `fit`."""
    done = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    done.ready = done.completed = step


def capture(trainer: L.Trainer, student: nn.Module, seen: dict[str, Tensor]) -> tuple[list[Piece], dict[str, Any]]:
    """This process's pieces, and the facts, of the state between two optimizer steps."""
    pieces = model_pieces(student)
    pieces += [_piece(name, tensor) for name, tensor in _optimizer_tensors(trainer.optimizers[0], student)]
    pieces += [_piece(f"seen.{name}", tensor) for name, tensor in seen.items()]
    mine = own_pieces(pieces)
    generators = [_piece(f"rng.{ranks.rank()}.{kind}", tensor) for kind, tensor in _generators().items()]
    schedule = trainer.lr_scheduler_configs[0].scheduler.state_dict()
    return mine + generators, {"step": trainer.global_step, "world": trainer.world_size, "schedule": schedule}


def model_pieces(model: nn.Module) -> list[Piece]:
    """All of a model's state that this process holds."""
    return [_piece(f"model.{name}", tensor) for name, tensor in state_tensors(model).items()]


def own_pieces(pieces: list[Piece]) -> list[Piece]:
    """Those that this process is to save: what every process holds whole, rank 0 does."""
    return [piece for piece in pieces if ranks.rank() == 0 or piece.rows.shape != piece.shape]


def restore(checkpoint: Checkpoint, trainer: L.Trainer, student: nn.Module) -> dict[str, Tensor]:
    """Put a state back, after Lightning has set up model and optimizer; returns what was `seen`.

    Raises:
        UserError: the checkpoint's tensors are not those of this model.
    """
    restore_model(checkpoint, student)
    optimizer = trainer.optimizers[0]
    _restore_optimizer(checkpoint, optimizer, student)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    schedule.load_state_dict(dict(checkpoint.facts["schedule"]))  # it takes the dictionary apart
    for group, rate in zip(optimizer.param_groups, checkpoint.facts["schedule"]["_last_lr"], strict=True):
        group["lr"] = rate
    _restore_generators(checkpoint)
    return {name[5:]: checkpoint.read(name) for name in checkpoint.names if name.startswith("seen.")}


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, every shared one under its first name only."""
    parameters = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    persistent = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent - every}
    return parameters | buffers


def _piece(name: str, tensor: Tensor) -> Piece:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        return Piece(name, tensor.to_local(), own_rows(tensor)[0], tuple(tensor.shape))
    return Piece(name, tensor, 0, tuple(tensor.shape))


def own_rows(tensor: DTensor) -> tuple[int, int]:
    """First row and number of rows that this process holds of a tensor that FSDP2 shards along its rows."""
    assert tensor.placements == (Shard(0),), tensor.placements
    share = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(tensor.device_mesh.get_local_rank() * share, tensor.shape[0]), tensor.to_local().shape[0]


def _read(checkpoint: Checkpoint, name: str, like: Tensor) -> Tensor:
    """The rows of a stored tensor that belong into `like`, as a plain tensor."""
    if isinstance(like, DTensor):
        start, count = own_rows(like)
        return checkpoint.read(name, start, start + count)
    return checkpoint.read(name)


@torch.no_grad()
def restore_model(checkpoint: Checkpoint, student: nn.Module) -> None:
    """Parameters and buffers alone; raises UserError when they are not those of this model."""
    wanted = {f"model.{name}": tensor for name, tensor in state_tensors(student).items()}
    there = {name for name in checkpoint.names if name.startswith("model.")}
    wrong = sorted(there ^ set(wanted)) or [n for n, t in wanted.items() if checkpoint.shape(n) != tuple(t.shape)]
    if wrong:
        fix = "It belongs to another model, scheme or plan: train under another name=..."
        raise UserError(problem(str(checkpoint.folder), "must fit the model", ", ".join(wrong[:10]), fix))
    for name, tensor in wanted.items():
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        here.copy_(_read(checkpoint, name, tensor))
    for module in student.modules():
        if isinstance(module, FakeQuantize):
            module.state_changed()


def _optimizer_tensors(optimizer: torch.optim.Optimizer, student: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"optim.{name}.{key}", value


def _restore_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, student: nn.Module) -> None:
    stored = [name for name in checkpoint.names if name.startswith("optim.")]
    parameters = dict(student.named_parameters())
    for full in stored:
        name, _, key = full.removeprefix("optim.").rpartition(".")
        parameter = parameters[name]
        if checkpoint.shape(full) != tuple(parameter.shape):
            value = checkpoint.read(full).to(parameter.device)
        elif isinstance(parameter, DTensor):
            local = _read(checkpoint, full, parameter).to(parameter.device)
            value = DTensor.from_local(
                *(local, parameter.device_mesh, parameter.placements),
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        else:
            value = checkpoint.read(full).to(parameter.device)
        optimizer.state[parameter][key] = value


def _generators() -> dict[str, Tensor]:
    """The state of every random generator of this process."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(checkpoint: Checkpoint) -> None:
    prefix = f"rng.{ranks.rank()}."
    states = {name[len(prefix) :]: checkpoint.read(name) for name in checkpoint.names if name.startswith(prefix)}
    if not states:  # more processes than before: the new ones keep the seed's
        return
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    numpy_state = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(states["numpy_gauss"]))
    np.random.set_state(numpy_state)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
