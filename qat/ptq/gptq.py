"""GPTQ: columns are rounded one after another, and what each loses is made up for by those not yet rounded.

With the Hessian H = 2/M sum x x^T of the layer's squared output error and U the upper Cholesky factor of its inverse:

    q_i = round(w_i)        e_i = (w_i - q_i) / U_ii        w_j -= e_i U_ij  for every later column j

Columns go in falling order of H_ii (act-order) while groups stay where they are in the file, so that serving needs no
permutation; each group's range is searched before the first column is rounded (static groups). Layers of a block that
share their input are done together, in the order they are called, each stage seeing the outputs of those before it as
quantized (true-sequential).
Source: Frantar et al. 2022, arXiv:2210.17323.

Letters: N rows, K row length, G groups per row, M calibration rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qat import grid
from qat.errors import UserError, problem
from qat.grid import QParams
from qat.progress import say
from qat.ptq.blocks import Block
from qat.ptq.options import PtqOptions
from qat.ptq.ranges import search
from qat.scheme import QuantScheme, QuantSpec

NEEDS_TEXT = True
MOVES_WEIGHTS = True
COLUMNS = 128  # columns whose updates are collected before the rest of the matrix is touched
DAMPING_TRIES = 4


def refusal(block: Block, schemes: dict[str, QuantScheme]) -> str | None:
    """Why the method cannot quantize the block; None when it can. `schemes` are those of its targets, by name."""
    return None


def quantize_block(block: Block, options: PtqOptions) -> None:
    """Quantize every target of the block; its weights lie on their grids afterwards."""
    for names in block.stages():
        hessian = block.gram(names)
        order, factor = factorize(hessian, options.damping, options.act_order, names[0])
        for name in names:
            target = block.targets[name]
            weight = target.weight()
            qparams = search(weight, target.spec)
            rounded, compensated = solve(weight, qparams, target.spec, order, factor)
            target.put(compensated if options.keep == "compensated" else rounded, qparams)
            target.quantizing(True)


def factorize(hessian: Tensor, damping: float, act_order: bool, where: str) -> tuple[Tensor, Tensor]:
    """The order of columns, int64 [K], and the upper Cholesky factor [K, K] of the damped inverse in that order.

    A dead column (its input is always 0) is given curvature 1 and no neighbours: it is rounded to nearest.
    Damping, a share of the mean of the diagonal, is raised tenfold while the matrix is not positive definite.

    Raises:
        UserError: not finite, or still not positive definite.
    """
    if not torch.isfinite(hessian).all():
        fix = "Look for a layer before it that overflows."
        raise UserError(problem(where, "Hessian must be finite", "NaN or infinity", fix), before_work=False)
    hessian = hessian.double()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    if dead.any():
        say(f"{where}: {int(dead.sum())} of {dead.numel()} inputs are always 0; their columns are rounded to nearest")
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True) if act_order else torch.arange(len(diagonal), device=hessian.device)
    ordered = hessian[order][:, order]
    mean = float(diagonal.mean())
    for tried in range(DAMPING_TRIES):
        share = damping * 10**tried
        damped = ordered.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            if tried:
                say(f"{where}: the Hessian needed damping {share:g} of its mean diagonal")
            return order, upper.float()
    fix = "Use more calibration text (ptq.windows), or a larger ptq.damping."
    given = f"a matrix that is not at damping {share:g}"
    raise UserError(problem(where, "Hessian must be positive definite", given, fix), before_work=False)


def solve(weight: Tensor, qparams: QParams, spec: QuantSpec, order: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded weight [N, K] for weight [N, K], its grid [N, G] and `factorize`'s order and factor; and each column
    [N, K] as it was when it was rounded."""
    columns = weight.t()[order].contiguous()  # [K, N]: a column is one run of memory
    scale, zero_point = (per_column(q, spec, weight.shape)[order] for q in qparams)
    column_spec = replace(spec, granularity="channel", group_size=None)
    out = torch.empty_like(columns)
    for start in range(0, len(columns), COLUMNS):
        stop = min(start + COLUMNS, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            qparams_i = QParams(scale[i, :, None], zero_point[i, :, None])
            out[i] = grid.fake_quantize(columns[i, :, None], qparams_i, column_spec, torch.float32)[:, 0]
            error = (columns[i] - out[i]) / factor[i, i]
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    back = order.argsort()
    return out[back].t().contiguous(), columns[back].t().contiguous()


def per_column(q: Tensor, spec: QuantSpec, shape: torch.Size) -> Tensor:
    """A grid's quantity [N, G] (or [1, 1]) for each column and row: [K, N]."""
    rows, columns = shape
    whole = q.expand(rows, q.shape[-1]) if q.shape[0] == 1 else q
    return whole.repeat_interleave(columns // whole.shape[-1], dim=-1).t()
