"""metrics.jsonl: one JSON object a line, appended as the run goes; and wandb beside it when asked for.

Lines have an `event` (train, validation, layers, phase, block), the `stage` of the training, and a `step`, counted on
from one stage to the next. A wandb failure after its start is a warning: a logger never ends a run. Rank 0 writes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qat.errors import UserError, problem
from qat.paths import write_text_atomic
from qat.progress import is_main, say


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: such numbers become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


class Metrics:
    """Append-only writer of metrics.jsonl, mirrored to wandb.

    Args:
        folder: the run folder.
        wandb_mode: off, offline or online; wandb is imported only when it is not off.
        run_id: go on with this wandb run.
        group: wandb's word for runs that belong together, such as those of a sweep.
    """

    def __init__(
        self,
        folder: Path,
        wandb_mode: str = "off",
        project: str = "qat",
        config: dict | None = None,
        run_id: str | None = None,
        group: str | None = None,
    ):
        self.path = folder / "metrics.jsonl"
        self.stage: dict[str, str] = {}
        self.before = 0
        self._has_written = False
        self._wandb: Any = None
        if wandb_mode != "off" and is_main():
            self._wandb = _start_wandb(folder, wandb_mode, project, config or {}, run_id, group)

    @property
    def run_id(self) -> str | None:
        """What a process that goes on with this run gives as `run_id`; None without wandb."""
        return self._wandb.id if self._wandb is not None else None

    def begin(self, stage: str, before: int) -> None:
        """Lines from now on are of this stage of the training, which began after `before` steps of others."""
        self.stage, self.before = {"stage": stage}, before

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one line; flushed, so that a killed run keeps it. `step` counts from the start of the stage."""
        if not is_main():
            return
        step, values = step + self.before, self.stage | values
        line = json.dumps(finite({"event": event, "step": step, **values}))
        if self._has_written and not self.path.exists():
            say(f"warning: {self.path} was deleted; it begins anew with step {step}")
        self._has_written = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self._wandb is None:
            return
        try:
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
            self._wandb.log({**numbers, "step": step})
        except Exception as error:
            say(f"warning: wandb stopped logging ({error}); metrics.jsonl goes on")
            self._wandb = None

    def truncate(self, step: int) -> None:
        """Drop every line of a later step: a stage that goes on from `step` writes them anew. At step 0 all go."""
        if not is_main() or not self.path.is_file():
            return
        step += self.before
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text_atomic(self.path, "".join(line for line in lines if 0 < step >= _step_of(line)))

    def close(self) -> None:
        """End the wandb run, if any."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a killed process left half written."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def _start_wandb(folder: Path, mode: str, project: str, config: dict, run_id: str | None, group: str | None) -> Any:
    try:
        import wandb
    except ImportError:
        fix = "pip install wandb, or use logger=jsonl."
        raise UserError(problem("logger.wandb", "needs the wandb package", "not installed", fix)) from None
    try:
        return wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            config=config,
            group=group,
            id=run_id,
            resume="allow" if run_id else None,
        )
    except Exception as error:
        fix = "Set logger=wandb_offline or logger=jsonl, or log in with `wandb login`."
        raise UserError(problem("logger.wandb", f"{mode} logging must start", str(error), fix)) from None
