"""Calibration text: which training windows a method sees, in pieces of two lengths.

Language models put a large activation on the first token of a window (the attention sink). In windows of 512 tokens
it is one row in 512, too few for a least-squares fit to respect, yet every later token attends to it. A share of the
windows is therefore cut into pieces of an eighth of their length, each with a first token of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECES = 8
SHORTEST = 4
TOKENS_PER_BATCH = 1024


def drawn(windows: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the windows [n, block], without repetition."""
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]]


def batches(windows: Tensor, count: int, short_fraction: float, seed: int) -> list[Tensor]:
    """Batches of token ids, int64 [B, T] with one T each: `count` of the windows [n, block], drawn without repetition.

    `short_fraction` of them are cut into pieces of an eighth of the block (never below 4 tokens).
    """
    chosen = drawn(windows, count, seed)
    block = windows.shape[1]
    piece = max(SHORTEST, block // PIECES)
    short = int(short_fraction * len(chosen)) if piece < block else 0
    cut = chosen[:short, : block // piece * piece].reshape(-1, piece)
    parts = [part for part in (chosen[short:], cut) if len(part)]
    return [batch for part in parts for batch in part.split(max(1, TOKENS_PER_BATCH // part.shape[1]))]
