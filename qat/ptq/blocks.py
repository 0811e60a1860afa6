"""Decoder blocks one at a time: what enters a block is cached, the block is quantized, its outputs feed the next one.

Held beside the model: the hidden states that enter the present block (float32, on the CPU) and what the method needs
for that block. What a block is given besides hidden states (masks, rotary tables) is recorded once for each shape of
batch. No method is here, and nothing rounds.

Letters: B windows, T tokens per window, M = B * T rows, K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError, problem
from qat.grid import QParams
from qat.nn.quant import QuantConv1D, QuantLinear
from qat.scheme import QuantSpec

# A block run alone against the same block inside its model: the same float32 operations.
REPLAY_TOLERANCE = 1e-4


class _Stop(Exception):
    """Ends a forward pass whose rest nobody needs."""


@dataclass(frozen=True)
class Target:
    """A training layer of a block whose weight is to be quantized."""

    name: str
    module: QuantLinear | QuantConv1D

    @property
    def spec(self) -> QuantSpec:
        """The weight's grid."""
        return self.module.weight_fake_quant.spec

    def weight(self) -> Tensor:
        """The weight as it stands, [N, K] float32, a copy."""
        return self.module.quantized_weights()["weight"][0].detach().float().clone()

    @torch.no_grad()
    def put(self, weight: Tensor | None = None, qparams: QParams | None = None) -> None:
        """Replace the weight [N, K], the grid's scale and zero point [N, G], or both."""
        if weight is not None:
            self.module.weight.copy_(weight.t() if isinstance(self.module, QuantConv1D) else weight)
        if qparams is not None:
            self.module.weight_fake_quant.adopt(qparams)

    def quantizing(self, on: bool) -> None:
        """Whether the layer multiplies with its weight on the grid, or with the float weight."""
        fake_quant = self.module.weight_fake_quant
        fake_quant.set_phase(replace(fake_quant.now, quantizing=on))


@dataclass
class Block:
    """One decoder block while it is being quantized.

    `inputs` are hidden states [B, T, H], as the blocks before it (quantized) put them out; `arguments` what the model
    passes besides them, by (B, T).
    """

    name: str
    module: nn.Module
    targets: dict[str, Target]
    inputs: list[Tensor] = field(default_factory=list)
    arguments: dict[tuple[int, int], tuple[tuple, dict]] = field(default_factory=dict)

    def run(self, hidden: Tensor) -> Tensor:
        """The block's output [B, T, H] for hidden states [B, T, H]."""
        rest, named = self.arguments[(hidden.shape[0], hidden.shape[1])]
        out = self.module(hidden, *rest, **named)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """The output [B, T, H] for every input."""
        return [self.run(hidden) for hidden in self.inputs]

    def sample(self) -> list[Tensor]:
        """The first input [B, T, H] of every length."""
        return list({hidden.shape[1]: hidden for hidden in reversed(self.inputs)}.values())

    @torch.no_grad()
    def stages(self) -> list[list[str]]:
        """Targets in the order they are called; those that are given one and the same tensor form a stage.

        Raises:
            UserError: a layer that the calibration text never reaches.
        """
        seen: list[tuple[str, Tensor]] = []  # holds the tensors, so that no address is used twice
        with self._watched(self.targets, lambda name, x: seen.append((name, x))):
            self.run(self.inputs[0])
        stages: list[list[str]] = []
        for place, (name, x) in enumerate(seen):
            if place and x.data_ptr() == seen[place - 1][1].data_ptr() and x.shape == seen[place - 1][1].shape:
                stages[-1].append(name)
            else:
                stages.append([name])
        never = sorted(set(self.targets) - {name for name, _ in seen})
        if never:
            fix = "Keep it by a plan rule, or use ptq=rtn_mse, which needs no text."
            got = "no call of the layer"
            raise UserError(problem(", ".join(never), "calibration must reach it", got, fix), before_work=False)
        return stages

    @torch.no_grad()
    def rows(self, names: Sequence[str]) -> Iterator[Tensor]:
        """Inputs [M, K] of the stage `names`, batch by batch, on the layer's own input grid if it has one.

        The forward pass ends there. Raises UserError when they are not finite.
        """
        target = self.targets[names[0]]
        for hidden in self.inputs:
            kept: list[Tensor] = []

            def keep(name: str, x: Tensor, kept: list[Tensor] = kept) -> None:
                kept.append(x)
                raise _Stop

            with self._watched([names[0]], keep), suppress(_Stop):
                self.run(hidden)
            x = kept[0].flatten(0, -2)
            input_fq = target.module.input_fake_quant
            x = x if input_fq is None else input_fq(x)
            if not torch.isfinite(x).all():
                fix = "Look for a layer before it that overflows, or text that the model cannot take."
                wanted = "inputs must be finite while calibrating"
                raise UserError(problem(target.name, wanted, "NaN or infinity", fix), before_work=False)
            yield x.float()

    def gram(self, names: Sequence[str]) -> Tensor:
        """2/M sum x x^T over all rows x of the stage's inputs: [K, K] float32, the Hessian of the squared error."""
        total, count = None, 0
        for x in self.rows(names):
            product = x.t() @ x
            total = product if total is None else total.add_(product)
            count += x.shape[0]
        assert total is not None
        return total.mul_(2 / count)

    @contextmanager
    def _watched(self, names: Any, see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call `see(name, input)` before each call of the named layers."""

        def hook(name: str) -> Callable[[nn.Module, tuple], None]:
            return lambda module, args: see(name, args[0])

        handles = [self.targets[name].module.register_forward_pre_hook(hook(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks: the children of the ModuleList that holds most training layers, with their targets."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]

    def targets(module: nn.Module, prefix: str) -> dict[str, Target]:
        found = {}
        for name, layer in module.named_modules(prefix=prefix):
            if isinstance(layer, QuantLinear | QuantConv1D):
                found[name] = Target(name, layer)
        return found

    counted = [(len(targets(module, name)), name, module) for name, module in lists]
    most = max((count for count, _, _ in counted), default=0)
    if most == 0:
        return []
    # of nested lists that hold the same layers, the outermost
    _, name, outer = next(entry for entry in counted if entry[0] == most)
    return [Block(f"{name}.{i}", module, targets(module, f"{name}.{i}")) for i, module in enumerate(outer)]


def outside(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    """Names of training layers that are in no block (an untied output head): they keep their calibrated range."""
    inside = {name for block in blocks for name in block.targets}
    found = [n for n, module in model.named_modules() if isinstance(module, QuantLinear | QuantConv1D)]
    return [name for name in found if name not in inside]


@torch.no_grad()
def enter(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor]) -> None:
    """Fill the first block's inputs from token ids [B, T], and every block's arguments; proves that blocks run alone.

    Raises:
        UserError: a model whose blocks do not simply feed each other.
    """
    shapes: set[tuple[int, int]] = set()
    entered: dict[str, Tensor] = {}

    def record(block: Block, is_known: bool) -> Callable:
        def hook(module: nn.Module, args: tuple, named: dict) -> None:
            hidden = args[0] if args else named["hidden_states"]
            entered[block.name] = hidden
            if block is blocks[0]:
                block.inputs.append(hidden)
            if is_known:
                raise _Stop
            rest = {key: value for key, value in named.items() if key != "hidden_states"}
            block.arguments[(hidden.shape[0], hidden.shape[1])] = (args[1:], rest)

        return hook

    for batch in sorted(batches, key=lambda b: b.numel()):
        shape = (batch.shape[0], batch.shape[1])
        hooks = [b.module.register_forward_pre_hook(record(b, shape in shapes), with_kwargs=True) for b in blocks]
        try:
            with suppress(_Stop):
                model(input_ids=batch, use_cache=False)
        finally:
            for handle in hooks:
                handle.remove()
        if not shapes:
            _check_replay(model, blocks, entered)
        shapes.add(shape)
        entered.clear()


def _check_replay(model: nn.Module, blocks: Sequence[Block], entered: dict[str, Tensor]) -> None:
    for block, after in pairwise(blocks):
        alone, there = block.run(entered[block.name]), entered[after.name]
        gap = float((alone - there).abs().max()) if alone.shape == there.shape else float("inf")
        if not gap <= REPLAY_TOLERANCE * max(1.0, float(there.abs().max())):
            fix = "Use ptq=rtn or rtn_mse, which need no calibration."
            wanted = f"{type(model).__name__} must feed each block with the output of the one before"
            raise UserError(problem(after.name, wanted, f"a difference of {gap:.2g}", fix))
