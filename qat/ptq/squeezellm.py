"""SqueezeLLM: every row has a table of 2^b values of its own, and the few weights that matter most stay in float16.

The table is a k-means of the row's weights, each weighted by how much the loss minds its error: the diagonal of the
Fisher information, sum over windows of the squared gradient. Before that, outliers leave for a sparse matrix: the
largest magnitudes of the layer, and a ninth of their number with the largest Fisher information.

This grid is not uniform, so that no training layer or file format of this project holds it yet: the method is a
baseline to be measured (scripts/ladder_score.py, scripts/measure_ptq.py), every bit counted. Needs gradients of the
whole model, unlike the methods that stream block by block.
Source: Kim et al. 2023, arXiv:2306.07629.

Letters: N rows, K row length, C = 2^b table entries, P packed bytes per row, Z weights kept apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat import grid
from qat.errors import UserError, problem
from qat.nn.quant import QuantLinear
from qat.packing import pack_rows, unpack_rows
from qat.progress import track
from qat.ptq.blocks import find_blocks

ROUNDS = 40
BY_FISHER = 1 / 9
SPARSE = 0.0045  # share of the weights kept apart


@dataclass(frozen=True, eq=False)
class LutTensor:
    """A weight [N, K] as codes into tables, and a sparse part that is added.

    `packed` uint8 [N, P] as in packing.py; `table` float16 [N, C] in rising order; the sparse part in rows: `starts`
    int32 [N + 1] counts the weights of the rows before, `columns` int32 [Z], `values` float16 [Z].
    """

    packed: Tensor
    table: Tensor
    starts: Tensor
    columns: Tensor
    values: Tensor
    bits: int
    shape: tuple[int, int]

    def codes(self) -> Tensor:
        """Table indices, uint8 [N, K]."""
        signed = unpack_rows(self.packed, self.bits, self.shape[1])
        return (signed.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)

    def dequantize(self) -> Tensor:
        """The weight [N, K] float32: table entries, and the sparse part in place of its own."""
        weight = grid.look_up(self.codes(), self.table)
        weight[self.rows(), self.columns.long()] = self.values.float()
        return weight

    def rows(self) -> Tensor:
        """Row of every sparse weight, int64 [Z]."""
        counts = (self.starts[1:] - self.starts[:-1]).long()
        return torch.repeat_interleave(torch.arange(self.shape[0]), counts)

    @property
    def bytes(self) -> int:
        """Codes, tables at 2 bytes an entry, sparse values and columns at 2 bytes each, row starts at 4."""
        column = 2 if self.shape[1] <= 1 << 16 else 4
        return (
            self.packed.numel() + 2 * self.table.numel() + (2 + column) * self.values.numel() + 4 * self.starts.numel()
        )


def fisher(model: Any, windows: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Sum over windows [n, block] of the squared gradient of next-token cross entropy, for each weight [N, K] named."""
    weights = {name: model.get_submodule(name).weight for name in names}
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    for window in track(windows.split(1), "fisher"):
        model(input_ids=window, labels=window, use_cache=False).loss.backward()
        for name, weight in weights.items():
            found[name].add_(weight.grad.square())
            weight.grad = None
    for parameter, before in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(before)
    return found


@torch.no_grad()
def quantize(weight: Tensor, information: Tensor, bits: int, sparse_fraction: float) -> LutTensor:
    """Tables, codes and sparse part of a weight [N, K] whose Fisher information is `information` [N, K]."""
    apart = outliers(weight, information, sparse_fraction)
    importance = information.masked_fill(apart, 0.0)
    silent = importance.sum(-1, keepdim=True) == 0
    importance = torch.where(silent, (~apart).float(), importance)
    table = cluster(weight, importance, 1 << bits).half()
    codes = grid.nearest(weight, table)
    rows, columns = apart.nonzero(as_tuple=True)
    starts = torch.zeros(len(weight) + 1, dtype=torch.int32)
    starts[1:] = apart.sum(-1).cumsum(0)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    shape = (weight.shape[0], weight.shape[1])
    return LutTensor(pack_rows(signed, bits), table, starts, columns.int(), weight[rows, columns].half(), bits, shape)


def outliers(weight: Tensor, information: Tensor, fraction: float) -> Tensor:
    """Which weights stay in float16, bool [N, K]: `fraction` of all, by magnitude and, a ninth of them, by Fisher."""
    apart = torch.zeros(weight.numel(), dtype=torch.bool)
    total = int(fraction * weight.numel())
    by_fisher = int(total * BY_FISHER)
    apart[weight.abs().flatten().topk(total - by_fisher).indices] = True
    apart[information.flatten().masked_fill(apart, -1.0).topk(by_fisher).indices] = True
    return apart.view(weight.shape)


def cluster(values: Tensor, importance: Tensor, count: int) -> Tensor:
    """Weighted k-means of each row of values [N, K]: the best of two starts, `count` entries in rising order [N, C].

    In one dimension clusters are intervals of the sorted values, so a round costs a search for their ends and
    differences of running sums.
    """
    ordered, order = values.float().sort(-1)
    weights = importance.gather(1, order).double()
    zero = torch.zeros(len(values), 1, dtype=torch.float64)
    mass = torch.cat([zero, weights.cumsum(-1)], -1)
    moment = torch.cat([zero, (weights * ordered).cumsum(-1)], -1)
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # evenly over the row's importance, and evenly over its range
    place = torch.searchsorted(mass[:, 1:].contiguous(), mass[:, -1:] * shares).clamp(max=values.shape[1] - 1)
    low, high = ordered[:, :1].double(), ordered[:, -1:].double()
    starts = (ordered.gather(1, place).double(), low + (high - low) * shares)
    tables, gains = zip(*(_lloyd(ordered.double(), mass, moment, start) for start in starts), strict=True)
    return torch.where((gains[0] >= gains[1])[:, None], tables[0], tables[1]).float()


def _lloyd(ordered: Tensor, mass: Tensor, moment: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds of assigning and averaging; the table [N, C] and how much it explains, [N], larger is better."""
    rows, last = len(ordered), ordered.shape[1]
    gain = torch.zeros(rows, dtype=torch.float64)
    for _ in range(ROUNDS):
        ends = torch.searchsorted(ordered, ((table[:, 1:] + table[:, :-1]) / 2).contiguous(), right=True)
        bounds = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), ends, torch.full((rows, 1), last)], -1)
        m, first = mass.gather(1, bounds).diff(dim=-1), moment.gather(1, bounds).diff(dim=-1)
        gain = torch.where(m > 0, first.square() / m.clamp(min=1e-300), 0.0).sum(-1)
        moved = torch.where(m > 0, first / m.clamp(min=1e-300), table)
        if torch.equal(moved, table):
            break
        table = moved
    return table, gain


def quantize_blocks(model: nn.Module, floating: nn.Module, windows: Tensor) -> int:
    """Replace the weights of the decoder layers by what tables and sparse parts of their width hold.

    Args:
        model: with the training layers of a plan; those replaced quantize no more.
        floating: the model that `model` was made of, for the gradients.
        windows: [n, block] token ids.
    Returns:
        By how many bytes the result is larger than the plan's.
    Raises:
        UserError: a layer has quantized inputs, more than 4 bits, or is no linear one.
    """
    targets = {name: target for block in find_blocks(model) for name, target in block.targets.items()}
    fix = "Use gptq, or a scheme such as w4a16_row."
    if not targets:
        raise UserError(problem("squeezellm", "needs decoder layers with quantized weights", "none", fix))
    for name, target in targets.items():
        module, bits = target.module, target.spec.bits
        if not isinstance(module, QuantLinear) or module.input_fake_quant is not None or bits > 4:
            inputs = "float inputs" if module.input_fake_quant is None else "quantized inputs"
            got = f"{type(module).__name__}, {target.spec.describe()}, {inputs}"
            raise UserError(problem(name, "squeezellm takes linear weights of at most 4 bits alone", got, fix))
    information = fisher(floating, windows, list(targets))
    larger = 0
    for name, target in track(list(targets.items()), "squeezellm"):
        target.quantizing(False)
        found = quantize(target.weight(), information[name], target.spec.bits, SPARSE)
        target.put(found.dequantize())
        larger += found.bytes - target.spec.packed_bytes(found.shape)
    return larger
