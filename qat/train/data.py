"""Windows in an order that is a pure function of the seed, dealt out to the processes in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from qat.data import window_order


class WindowSampler(Sampler[int]):
    """Indices for one process, without end: one permutation of all windows after another.

    Endless, because at the end of a Lightning epoch an optimizer step is taken whatever was accumulated until then.
    """

    def __init__(self, count: int, seed: int, rank: int = 0, world: int = 1):
        self.count, self.seed, self.rank, self.world = count, seed, rank, world

    def __iter__(self) -> Iterator[int]:
        epochs = (window_order(self.count, self.seed, epoch).tolist() for epoch in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), self.rank, None, self.world)


def train_loader(windows: Tensor, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> DataLoader[Tensor]:
    """Batches [batch_size, block] of windows [n, block], without end."""
    sampler = WindowSampler(windows.shape[0], seed, rank, world)
    return DataLoader(_Rows(windows), batch_size=batch_size, sampler=sampler)


class _Rows(torch.utils.data.Dataset[Tensor]):
    def __init__(self, windows: Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return self.windows.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]
