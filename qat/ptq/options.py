"""PtqOptions: what all methods are told; plain values, one meaning for each method that reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PtqOptions:
    """`damping` and `act_order` are read by gptq; see PtqConfig for the meaning of each."""

    method: str
    keep: str = "weights"
    windows: int = 128
    short_fraction: float = 0.5
    seed: int = 0
    damping: float = 0.01
    act_order: bool = True
