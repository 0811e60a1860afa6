"""One scheme for each unit of layers: the least summed KL whose bytes stay within a budget.

A multiple-choice knapsack, solved by dynamic programming over bytes: best[b] is the least KL of the units so far that
takes at most b steps. A step is the greatest common divisor of all byte counts, so the answer is exact; when that would
make more than MAX_STEPS of them, steps are coarser and sizes are rounded up to whole steps: the budget still holds, and
the sum is the least for budgets smaller by at most one step for each unit.
Source: Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), ch. 11. The sum of single-layer losses as the
objective of a bit allocation: Dong et al., HAWQ-V2, arXiv:1911.03852.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import numpy as np

from qat.errors import UserError, problem

MAX_STEPS = 1 << 18
Costs = Sequence[Mapping[str, float]]
Sizes = Sequence[Mapping[str, int]]


def budget_bytes(bits: float, sizes: Sizes, weights: int, rest: int = 0) -> int:
    """Bytes for all units when `bits` per weight are to hold `weights` values and `rest` bytes go to other layers.

    Raises:
        UserError: fewer than the smallest choice for every unit needs, or as many as the largest takes.
    """
    low, high = (rest + sum(pick(unit.values()) for unit in sizes) for pick in (min, max))
    least, most = 8 * low / weights, 8 * high / weights
    if bits * weights < 8 * low:
        fix = f"Use --budget {_above(least)} or more, or add a smaller candidate."
        raise UserError(problem("--budget", f"the smallest candidates take {least:.3f} bits per weight", bits, fix))
    if bits * weights >= 8 * high:
        fix = f"Use --budget below {most:.3f}, or train with the largest candidate alone."
        raise UserError(problem("--budget", f"the largest candidates take {most:.3f}: nothing to choose", bits, fix))
    return int(bits * weights / 8) - rest


def _above(bits: float) -> str:
    return f"{int(bits * 100) / 100 + 0.01:.2f}"


def allocate(costs: Costs, sizes: Sizes, budget: int) -> list[str]:
    """The choice of each unit. `costs` are KL and `sizes` bytes by scheme, one mapping for each unit, in one order.

    `budget` is in bytes and holds the smallest choice of every unit (see `budget_bytes`).
    """
    step = max(gcd(*(size for unit in sizes for size in unit.values())), -(-budget // MAX_STEPS))
    steps = [{name: -(-size // step) for name, size in unit.items()} for unit in sizes]
    room = budget // step
    if room < sum(min(unit.values()) for unit in steps):  # by rounding up alone
        return [min(unit, key=lambda name: unit[name]) for unit in sizes]
    best = np.zeros(room + 1)
    picks = []
    for cost, size in zip(costs, steps, strict=True):
        totals = np.full((len(cost), room + 1), np.inf)
        for row, name in enumerate(cost):
            if size[name] <= room:
                totals[row, size[name] :] = best[: room + 1 - size[name]] + cost[name]
        pick = totals.argmin(0)
        best = totals[pick, np.arange(room + 1)]
        picks.append(pick.astype(np.int16))
    assert np.isfinite(best[room])
    chosen, left = [], room
    for cost, size, pick in zip(reversed(costs), reversed(steps), reversed(picks), strict=True):
        name = list(cost)[pick[left]]
        chosen.append(name)
        left -= size[name]
    return chosen[::-1]
