"""A method on a whole model: check first, then block after block, each fed by the quantized ones before it.

The model is one that `insert` has put training layers into and `calibrate` has given its first scales; afterwards the
layers of its decoder blocks stand on the method's grids. Token table and head keep the plan's own grid.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.errors import UserError, nearest, problem
from qat.insert import Coverage
from qat.progress import bar
from qat.ptq import PTQ_METHODS
from qat.ptq.blocks import Block, enter, find_blocks, outside
from qat.ptq.options import PtqOptions
from qat.ptq.text import batches


@dataclass(frozen=True)
class PtqReport:
    """What was done: tokens shown, seconds, decoder layers quantized, and layers outside the blocks."""

    method: str
    tokens: int
    seconds: float
    layers: int
    outside: list[str]


def check(model: nn.Module, coverage: Coverage, windows: Tensor, options: PtqOptions) -> None:
    """Refuse what cannot work before any work is done.

    Args:
        windows: [n, block] token ids of the training text.
    Raises:
        UserError: an unknown method, a scheme or layer kind that the method has no answer for, no decoder blocks, or
            fewer calibration tokens than the widest layer has inputs.
    """
    method = PTQ_METHODS.get(options.method)
    if method is None:
        hint = nearest(options.method, list(PTQ_METHODS))
        raise UserError(problem("ptq.method", f"must be one of {', '.join(PTQ_METHODS)}", options.method, hint))
    blocks = find_blocks(model)
    targets = [target for block in blocks for target in block.targets.values()]
    problems = []
    if not targets:
        fix = "Use a model whose decoder blocks stand in one list, and a plan that quantizes their linear layers."
        problems.append(problem(type(model).__name__, f"ptq={options.method} needs decoder blocks", "none", fix))
    for block in blocks:
        reason = method.refusal(block, {name: coverage.schemes[f"{name}.weight"] for name in block.targets})
        if reason:
            fix = "Use another scheme or method."
            problems.append(problem(block.name, f"ptq={options.method} {reason}", type(block.module).__name__, fix))
            break
    experts = [layer.name for layer in coverage.layers if layer.kind == "experts" and layer.scheme]
    if experts and method.NEEDS_TEXT:
        fix = "Keep them by a plan rule, or use ptq=none."
        given = f"fused experts, {experts[0]}"
        problems.append(problem(f"ptq={options.method}", "quantizes linear layers", given, fix))
    tokens = min(options.windows, len(windows)) * windows.shape[1]
    widest = max(targets, key=lambda target: target.module.weight.shape[-1], default=None)
    if widest is not None and method.NEEDS_TEXT and tokens < widest.weight().shape[-1]:
        wanted = f"calibration needs at least {widest.weight().shape[-1]} tokens, the inputs of {widest.name}"
        fix = "Give more text, or raise ptq.windows or data.block_size."
        got = f"{tokens} ({min(options.windows, len(windows))} windows of {windows.shape[1]})"
        problems.append(problem("ptq.windows", wanted, got, fix))
    if problems:
        raise UserError(*problems)


@torch.no_grad()
def apply(model: nn.Module, windows: Tensor, options: PtqOptions) -> PtqReport:
    """Quantize the decoder blocks of a checked model in place; `windows` [n, block] is training text.

    With `keep=scales` the weights are what they were, and only the grids are the method's.
    Raises UserError when calibration meets values that are not finite.
    """
    started = time.perf_counter()
    method, blocks = PTQ_METHODS[options.method], find_blocks(model)
    was_training = model.training
    model.eval()
    for block in blocks:
        for target in block.targets.values():
            target.quantizing(False)
    shown = batches(windows, options.windows, options.short_fraction, options.seed) if method.NEEDS_TEXT else []
    if shown:
        device = next(model.parameters()).device
        enter(model, blocks, [batch.to(device) for batch in shown])
    with bar(options.method, len(blocks)) as advance:
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            _quantize(block, after, options)
            advance("")
    model.train(was_training)
    tokens = sum(batch.numel() for batch in shown)
    layers = sum(len(block.targets) for block in blocks)
    return PtqReport(options.method, tokens, time.perf_counter() - started, layers, outside(model, blocks))


def _quantize(block: Block, after: Block | None, options: PtqOptions) -> None:
    """One block: quantize it, hand its outputs on, forget what was cached for it."""
    method = PTQ_METHODS[options.method]
    before = {name: target.weight() for name, target in block.targets.items()} if options.keep == "scales" else {}
    method.quantize_block(block, options)
    for target in block.targets.values():
        target.quantizing(True)
    if after is not None and method.NEEDS_TEXT:
        after.inputs = block.outputs()
    block.inputs, block.arguments = [], {}
    for name, weight in before.items():
        block.targets[name].put(weight)
