"""Who came: processes register under their names in torch's key-value store, and the missing are named.

torch's own time-outs say how many are missing, not which.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from qat.errors import UserError, problem


def open_store(host: str, port: int, is_host: bool, seconds: float, setting: str) -> Any:
    """torch's TCPStore at host:port, served by this process when `is_host`; `setting` is where the port is chosen.

    Raises:
        UserError: the port is taken, or nobody answers within `seconds`.
    """
    from torch.distributed import DistError, TCPStore

    try:
        return TCPStore(host, port, None, is_host, timedelta(seconds=seconds), wait_for_workers=False)
    except (DistError, RuntimeError) as error:
        if is_host:
            fix = f"Another job may be using it: set {setting} to a free one."
            taken = "one in use" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0]
            raise UserError(problem(f"port {port}", "must be free on this machine", taken, fix)) from None
        wanted = f"must answer on port {port} within {seconds:g} s"
        fix = "Look at the log of the first node; is the port open between the nodes?"
        raise UserError(problem(host, wanted, "no answer", fix), before_work=False) from None


def arrive(store: Any, name: str, words: str = "here") -> None:
    """Register under `name`, leaving `words` for the others."""
    store.set(name, words)


def missing(store: Any, names: Sequence[str], seconds: float) -> list[str]:
    """Wait until all `names` have arrived; those that have not within `seconds`."""
    from torch.distributed import DistError

    try:
        store.wait(list(names), timedelta(seconds=seconds))
    except (DistError, RuntimeError):
        return [name for name in names if not store.check([name])]
    return []


def span(numbers: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
