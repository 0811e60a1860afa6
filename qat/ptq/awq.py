"""AWQ: input channels with large activations are scaled up before rounding, and the layer before scales them down.

For each pair of an operation and the linear layers that read it, s = mean|x|^a with a from 0 to 0.95 in 20 steps; the
a kept is the one with which the whole block's output, weights rounded, is nearest to the float block's. s moves into
the weights and 1/s into the operation before: nothing changes in float, and that is checked. Then each group's range
is shrunk while its share of the layer's output error falls (not for queries and keys, whose error grows inside the
softmax). Weights stay float and are rounded by their grid.

The pairs are those of a Llama block. Where query heads share a value head, they share its scales as well: values are
scaled once for all heads that read them.
Source: Lin et al. 2023, arXiv:2306.00978; ranges as in `ranges.py`.

Letters: N rows, K in_features, V outputs of the layer before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat import grid
from qat.errors import UserError, problem
from qat.ptq.blocks import Block
from qat.ptq.options import PtqOptions
from qat.ptq.ranges import from_extremes, search
from qat.scheme import QuantScheme

NEEDS_TEXT = True
MOVES_WEIGHTS = True
STEPS = 20
# (what is scaled down, what reads it and is scaled up), names inside the block
PAIRS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
NOT_CLIPPED = ("q_proj", "k_proj")
LEAST_MEAN = 1e-4  # of the largest channel's; keeps the scale of a silent channel finite
FOLD_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Pair:
    before: Any  # a norm, or a linear layer, training or float
    readers: dict[str, Any]
    rep: int  # readers' inputs for each output of `before`

    def tensors(self) -> list[Tensor]:
        """Everything that scaling changes."""
        found = [self.before.weight, *(reader.weight for reader in self.readers.values())]
        return found if self.before.bias is None else [*found, self.before.bias]

    def fold(self, scale: Tensor, head: int) -> None:
        """Multiply the readers' columns by scale [V] and divide what comes before; `head` outputs belong together."""
        down = scale[:, None] if self.before.weight.dim() == 2 else scale
        self.before.weight.div_(down)
        if self.before.bias is not None:
            self.before.bias.div_(scale)
        for reader in self.readers.values():
            reader.weight.mul_(shared(scale, self.rep, head))


def refusal(block: Block, schemes: dict[str, QuantScheme]) -> str | None:
    """Why the method cannot quantize the block; None when it can. `schemes` are those of its targets, by name."""
    names = {name for name, _ in block.module.named_modules()}
    missing = [name for before, readers in PAIRS for name in (before, *readers) if name not in names]
    if missing:
        return f"needs blocks with the layers of Llama, and {', '.join(missing)} is missing"
    norms = [block.module.get_submodule(before) for before, _ in PAIRS if "norm" in before]
    if any(getattr(norm, "weight", None) is None for norm in norms):
        return "needs norms with a weight, which takes the scales"
    if any(scheme.input is not None and not scheme.input.dynamic for scheme in schemes.values()):
        return "moves the ranges of inputs, so that static input grids would not fit"
    return None


@torch.no_grad()
def quantize_block(block: Block, options: PtqOptions) -> None:
    """Scale, then choose the grids, stage by stage."""
    head = getattr(block.module.get_submodule("self_attn"), "head_dim", 1)
    sample = block.sample()
    wanted = [block.run(hidden) for hidden in sample]
    for before, readers in PAIRS:
        _scale(block, _pair(block, before, readers), head, sample, wanted)
    _check_fold(block, sample[0], wanted[0])
    for names in block.stages():
        hessian = block.gram(names)
        for name in names:
            target = block.targets[name]
            weight = target.weight()
            is_clipped = not name.endswith(NOT_CLIPPED)
            target.put(
                qparams=search(weight, target.spec, hessian) if is_clipped else from_extremes(weight, target.spec)
            )
            target.quantizing(True)


def _pair(block: Block, before: str, readers: tuple[str, ...]) -> _Pair:
    module: Any = block.module.get_submodule(before)
    found: dict[str, Any] = {f"{block.name}.{name}": block.module.get_submodule(name) for name in readers}
    outputs = module.weight.shape[0]
    width = next(iter(found.values())).weight.shape[-1]
    plain = module if hasattr(module, "bias") else _WithoutBias(module)
    return _Pair(plain, found, width // outputs)


class _WithoutBias:
    """A norm that has no bias, seen like a layer whose bias is None."""

    bias = None

    def __init__(self, module: nn.Module):
        self.weight = module.weight


def shared(scale: Tensor, rep: int, head: int) -> Tensor:
    """Scales [V] of value channels as the readers [V * rep] see them: `rep` heads in a row read the same value head."""
    return scale if rep == 1 else scale.view(-1, 1, head).expand(-1, rep, head).reshape(-1)


def mean_power(magnitude: Tensor, rep: int, head: int) -> Tensor:
    """mean|x| [K] of the readers' inputs, averaged over those that share a value channel: [V]."""
    return magnitude if rep == 1 else magnitude.view(-1, rep, head).mean(1).reshape(-1)


def _scale(block: Block, pair: _Pair, head: int, sample: list[Tensor], wanted: list[Tensor]) -> None:
    """Find the best scales of one pair and leave them folded in."""
    names = [name for name in pair.readers if name in block.targets]
    if not names:
        return
    total, count = torch.zeros(()), 0
    for x in block.rows(names[:1]):
        total, count = total + x.abs().sum(0), count + x.shape[0]
    mean = mean_power(total / count, pair.rep, head)
    mean = mean.clamp(min=LEAST_MEAN * float(mean.max())) if float(mean.max()) > 0 else torch.ones_like(mean)
    kept = [tensor.clone() for tensor in pair.tensors()]
    least, best = float("inf"), torch.ones_like(mean)
    for step in range(STEPS):
        scale = mean.pow(step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        pair.fold(scale, head)
        for name in names:
            target = block.targets[name]
            weight, spec = target.weight(), target.spec
            target.put(grid.fake_quantize(weight, from_extremes(weight, spec), spec, torch.float32))
        loss = sum(float((block.run(x) - y).square().sum()) for x, y in zip(sample, wanted, strict=True))
        if loss < least:
            least, best = loss, scale
        for tensor, before in zip(pair.tensors(), kept, strict=True):
            tensor.copy_(before)
    pair.fold(best, head)


def _check_fold(block: Block, hidden: Tensor, wanted: Tensor) -> None:
    gap = float((block.run(hidden) - wanted).norm() / wanted.norm())
    inputs_are_float = all(target.module.input_fake_quant is None for target in block.targets.values())
    if inputs_are_float and not gap <= FOLD_TOLERANCE:
        fix = "Use ptq=gptq, which moves nothing between layers."
        wanted_text = "scales moved between layers must not change the block"
        raise UserError(problem(block.name, wanted_text, f"a relative change of {gap:.2g}", fix), before_work=False)
