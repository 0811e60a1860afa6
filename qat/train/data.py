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
    `done` windows, of all processes, were seen by an earlier process of the run.
    """

    def __init__(self, count: int, seed: int, rank: int = 0, world: int = 1, done: int = 0):
        self.count, self.seed, self.rank, self.world, self.done = count, seed, rank, world, done

    def __iter__(self) -> Iterator[int]:
        first, seen = divmod(self.done, self.count)
        epochs = (window_order(self.count, self.seed, epoch).tolist() for epoch in itertools.count(first))
        return itertools.islice(itertools.chain.from_iterable(epochs), seen + self.rank, None, self.world)


def train_loader(
    windows: Tensor, batch_size: int, seed: int, rank: int = 0, world: int = 1, done: int = 0, workers: int = 0
) -> DataLoader[Tensor]:
    """Batches [batch_size, block] of windows [n, block], without end, after the first `done` windows of all processes.

    `workers` processes read ahead; the batches are the same for any number of them.
    """
    sampler = WindowSampler(windows.shape[0], seed, rank, world, done)
    # a generator of its own: worker seeds must not move the run's random numbers
    draws = torch.Generator().manual_seed(seed)
    return DataLoader(_Rows(windows), batch_size, sampler=sampler, num_workers=workers, generator=draws)


class _Rows(torch.utils.data.Dataset[Tensor]):
    def __init__(self, windows: Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return self.windows.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]
