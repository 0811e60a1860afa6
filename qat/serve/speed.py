"""How fast an export decodes here and now: one sequence, token by token, after a short prompt."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from qat.errors import UserError, problem
from qat.serve.load import read_export
from qat.serve.runner import open_runner

PROMPT = 16
# Steps before those that count: the engine is still choosing its number of threads
WARM_UP = 8


@torch.no_grad()
def decode_speed(folder: Path, tokens: int, backend: str = "auto") -> dict[str, Any]:
    """Tokens per second by the median of `tokens` steps of an export folder, with the threads and what ran it.

    Raises:
        UserError: prompt and tokens are more than the model has positions.
    """
    wanted = PROMPT + WARM_UP + tokens
    runner = open_runner(read_export(folder), wanted, 1, backend)
    if runner.positions < wanted:
        fix = f"Use at most {runner.positions - PROMPT - WARM_UP} tokens."
        raise UserError(problem("tokens to decode", f"must fit into {runner.positions} positions", wanted, fix))
    # the time of a step does not depend on which tokens these are
    ids = torch.randint(runner.vocabulary, (wanted,), generator=torch.Generator().manual_seed(0))
    slot, one, seconds = torch.zeros(PROMPT, dtype=torch.long), torch.tensor([0]), []
    runner.top(ids[:PROMPT], slot, torch.arange(PROMPT), torch.tensor([PROMPT - 1]), 1)
    for place in range(PROMPT, wanted):
        started = time.perf_counter()
        runner.top(ids[place : place + 1], one, torch.tensor([place]), one, 1)
        seconds.append(time.perf_counter() - started)
    threads = getattr(runner, "threads", None)
    return {
        "tokens_per_second": 1 / statistics.median(seconds[WARM_UP:]),
        "tokens": tokens,
        "threads": torch.get_num_threads() if threads is None else threads,
        "ran_by": "transformers" if threads is None else "engine",
    }
