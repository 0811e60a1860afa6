"""Windows in an order that is a pure function of seed and epoch, split evenly among processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from qat.data import window_order


class WindowSampler(Sampler[int]):
    """Indices of this process for one epoch; Lightning calls `set_epoch`."""

    def __init__(self, count: int, seed: int, rank: int = 0, world: int = 1):
        self.count, self.seed, self.rank, self.world, self.epoch = count, seed, rank, world, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = window_order(self.count, self.seed, self.epoch)
        usable = len(self) * self.world
        return iter(order[:usable][self.rank :: self.world].tolist())

    def __len__(self) -> int:
        return self.count // self.world


def train_loader(windows: Tensor, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> DataLoader[Tensor]:
    """Batches [batch_size, block] of windows [n, block]; the last incomplete batch of an epoch is dropped."""
    sampler = WindowSampler(windows.shape[0], seed, rank, world)
    batch_size = min(batch_size, max(1, len(sampler)))
    return DataLoader(_Rows(windows), batch_size=batch_size, sampler=sampler, drop_last=True)


class _Rows(torch.utils.data.Dataset[Tensor]):
    def __init__(self, windows: Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return self.windows.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]
