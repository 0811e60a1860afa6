"""FSDP2: a model whose weights only rank 0 has, dealt out by rows over all processes.

The other processes build the same structure on the meta device. Rank 0 sends tensor by tensor, everyone keeps its own
rows, and nothing may be left that came from nowhere: every parameter, buffer, scale and observer is received, those
outside the state dict (rotary frequencies) too. Parameters stay float32, so that codes are those of one process; the
bf16 of training is autocast's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qat import ranks
from qat.errors import UserError, problem
from qat.fake_quant import FakeQuantize
from qat.models import is_tied
from qat.train.state import own_rows


def empty_copy(model: nn.Module) -> nn.Module:
    """The same structure and ties with every parameter and buffer on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the modules of its longest ModuleList."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def shard(root: nn.Module, model: Any, mesh: Any, device: torch.device, source: nn.Module) -> None:
    """Shard `root`, which holds `model` as an `empty_copy` of `source`, and fill it from rank 0's `source`.

    Each decoder block is a unit, an untied token table another, the rest (head, last norm) belongs to `root`. Vectors
    are kept whole where a unit's matrices have another dtype, which FSDP2 does not mix.

    Raises:
        UserError: on every process, when they disagree about what the model is made of.
    """
    from torch.distributed.fsdp import fully_shard

    units = decoder_blocks(model)
    units += [] if is_tied(model) else [model.get_input_embeddings()]
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=_odd(list(unit.parameters())))
    inside = {id(p) for unit in units for p in unit.parameters()}
    rest = [p for p in root.parameters() if id(p) not in inside]
    # the root's tables stay gathered after its forward pass: the loss multiplies with the head outside of it
    fully_shard(root, mesh=mesh, ignored_params=_odd(rest), reshard_after_forward=False)
    root._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    _fill(model, source)


def _odd(parameters: list[nn.Parameter]) -> set[nn.Parameter]:
    """Vectors whose dtype is not that of the matrices."""
    widths = {p.dtype for p in parameters if p.dim() >= 2}
    return {p for p in parameters if p.dim() < 2 and widths and widths != {p.dtype}}


@torch.no_grad()
def _fill(model: nn.Module, source: nn.Module) -> None:
    target, there = _tensors(model), _tensors(source)
    shapes = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in there.items()}
    everyone = ranks.gather(shapes)
    differing = sorted({name for one in everyone for name, _ in set(one.items()) ^ set(shapes.items())})
    if differing:
        fix = "Start every process from the same configuration, model files and versions."
        wanted = "every process must build the same model"
        raise UserError(problem("trainer.strategy=fsdp2", wanted, ", ".join(differing[:10]), fix))
    for name, tensor in target.items():
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        sent = there[name].to(own.device).contiguous() if ranks.rank() == 0 else None
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=own.device) if sent is None else sent
        dist.broadcast(whole, src=0)
        if isinstance(tensor, DTensor):
            start, count = own_rows(tensor)
            whole = whole[start : start + count]
        own.copy_(whole)
    left = [name for name, tensor in target.items() if tensor.is_meta]
    assert not left, f"nothing was sent for {left}"
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.state_changed()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, shared ones once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def gathered(model: nn.Module, whole: nn.Module) -> nn.Module:
    """`whole`, on rank 0 with the values of the sharded `model`; all processes take part, the others' stays empty."""
    target = _tensors(whole)
    for name, tensor in _tensors(model).items():
        values = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ranks.rank() == 0:
            target[name].copy_(values)
    if ranks.rank() == 0:
        for module in whole.modules():
            if isinstance(module, FakeQuantize):
                module.state_changed()
    return whole


@contextmanager
def tables_gathered(root: nn.Module) -> Iterator[None]:
    """While the model is called past `root`: the root's own tables stand whole. Nothing for a model that is whole."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()
