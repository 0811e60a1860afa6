"""The table of observers: config key -> class."""

from qat.observers.base import Observer
from qat.observers.histogram import HistogramObserver
from qat.observers.minmax import MinMaxObserver
from qat.observers.moving_average import MovingAverageObserver
from qat.observers.mse import MseObserver
from qat.observers.percentile import PercentileObserver

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
    "histogram": HistogramObserver,
}

__all__ = ["OBSERVERS", "Observer"]
