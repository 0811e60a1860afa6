"""`memory_explained`: a run that outgrows its memory ends with the estimate, its peak and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qat.errors import UserError, problem

if TYPE_CHECKING:
    from qat.config import RunConfig


@contextmanager
def memory_explained(config: RunConfig) -> Iterator[None]:
    """Turn the many shapes of "out of memory" inside the block into one UserError; other errors pass."""
    from qat.memory import is_out_of_memory, peak_memory_gib

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        from qat import build
        from qat.cli.plan import GIB, known_architecture, ways_to_fit
        from qat.models import meta_model
        from qat.scaling import job_of, memory, shape_of

        model = meta_model(known_architecture(config.model))
        coverage = build.quantize_layers(model, config)
        shape, job = shape_of(model.config.get_text_config(), coverage), job_of(config)
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        need = f"by estimate a process needs {memory(shape, job).peak / GIB:.2f} GiB"
        got = f"{said} (peak {peak_memory_gib():.2f} GiB; {need})"
        fix = ways_to_fit(shape, job, config)
        raise UserError(problem("memory", "must be enough for the run", got, fix), before_work=False) from error
