"""Exponential moving average (momentum 0.9) of each tensor's extremes: one outlier batch does not set the range."""

from __future__ import annotations

from qat.observers.base import AveragingObserver, Observer


class MovingAverageObserver(AveragingObserver):
    """low, high = moving average of the extremes seen."""

    across = Observer.across  # extremes of the parts are extremes of the whole batch
