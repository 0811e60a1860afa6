"""The loop of a sweep: start trials, watch their metrics, stop what is hopeless, record how each one ended.

The driver imports no torch and trains nothing: one trial is one fresh job. A trial that fails is recorded with its
reason and the sweep goes on. A driver that is stopped stops its jobs; called again, it takes up their trials.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.config import RunConfig
from qat.errors import UserError
from qat.paths import write_text_atomic
from qat.progress import bar, say
from qat.report.record import read_run
from qat.report.sweep_record import metric_value
from qat.sweep.config import SweepConfig
from qat.sweep.folder import SweepFolder, trial_name
from qat.sweep.jobs import Job, TrialJob
from qat.sweep.launchers import end_left_over
from qat.sweep.study import Study

POLL_SECONDS = 0.3
# How run_status.json calls an attempt that can go on, and how often one trial may be stopped by others than the driver
UNFINISHED = ("running", "preempted", "interrupted")
MOST_STOPS = 5
OUT_OF_MEMORY = ("OutOfMemoryError", "can't allocate memory", "Cannot allocate memory", "MemoryError")


@dataclass
class Active:
    """A trial that runs. `ended_as` is set when the driver has asked it to stop."""

    number: int
    job: Job
    slot: int
    started: float = field(default_factory=time.monotonic)
    seen: tuple[int, int] = (0, 0)
    last_step: int = 0
    ended_as: tuple[str, str] | None = None
    stopped_at: float = 0.0


class Stop:
    """How often the driver was asked to stop, and by which signal first."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.signals)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM are noted instead of raised, so that jobs and records end in order."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda received, frame: stop.signals.append(received))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Driver:
    """Runs the trials of one sweep.

    Args:
        configure: (number, params) -> the checked run of a trial and its YAML; UserError when it is none.
        launch: starts a trial; `start` of an entry of LAUNCHERS.
    """

    def __init__(
        self,
        config: SweepConfig,
        folder: SweepFolder,
        study: Study,
        configure: Callable[[int, dict[str, Any]], tuple[RunConfig, str]],
        launch: Callable[[TrialJob], Job],
    ):
        self.config, self.folder, self.study = config, folder, study
        self._configure, self._launch = configure, launch
        self._active: dict[int, Active] = {}
        self._waiting: list[int] = []

    def run(self) -> int | None:
        """Run what is left of the sweep; the signal that stopped it, or None when it came to its end."""
        self._waiting = self.study.interrupted()
        done = sum(trial.state.is_finished() for trial in self.study.trials())
        status = "interrupted"
        with stop_signals() as stop, bar("sweep", max(1, self.study.total - done)) as advance:
            try:
                while not stop and self._fill(advance):
                    for active in list(self._active.values()):
                        self._watch(active, advance)
                    time.sleep(POLL_SECONDS)
                status = "interrupted" if stop else "finished"
            finally:
                self._stop_all(stop)
                self.folder.write_results(self.config, self.study, status)
        return stop.signals[0] if stop else None

    def _fill(self, advance: Callable[[str], None]) -> bool:
        """Start trials until all places are taken; False when none runs and none is left."""
        while len(self._active) < self.config.parallel:
            number = self._waiting.pop(0) if self._waiting else self.study.ask()
            if number is None:
                break
            try:
                if self._ended_meanwhile(number, advance):
                    continue
                self._start(number)
            except (UserError, OSError) as error:
                self._end(number, "failed", str(error), 0.0, advance)
        return bool(self._active)

    def _ended_meanwhile(self, number: int, advance: Callable[[str], None]) -> bool:
        """Whether a trial whose driver died ran to its end all the same; if so, that end is recorded."""
        end_left_over(self.folder.config_file(number))
        if self._status(number) != "finished":
            return False
        state, reason = self._verdict(number, None, 0)
        self._end(number, state, reason, 0.0, advance)
        return True

    def _start(self, number: int) -> None:
        params = self.study.params(number)
        run, text = self._configure(number, params)
        goes_on = self._status(number) in UNFINISHED and (self.folder.trial(number) / "resolved.yaml").is_file()
        write_text_atomic(self.folder.config_file(number), text)
        slot = min(set(range(self.config.parallel)) - {active.slot for active in self._active.values()})
        job = self._launch(TrialJob(run, self.folder.config_file(number), self.folder.log(number), slot, goes_on))
        self._active[number] = Active(number, job, slot)
        say(f"{trial_name(number)} {'goes on' if goes_on else 'starts'}: {settings_text(params)}")
        self.folder.write_results(self.config, self.study, "running")

    def _watch(self, active: Active, advance: Callable[[str], None]) -> None:
        """One look at a running trial."""
        code = active.job.poll()
        self._follow(active)
        if active.job.waits:
            active.started = time.monotonic()
        minutes = (time.monotonic() - active.started) / 60
        if code is not None:
            del self._active[active.number]
            if active.ended_as is None and self._was_stopped_by_others(active.number):
                self._waiting.append(active.number)
                return
            state, reason = self._verdict(active.number, active.ended_as, code)
            self._end(active.number, state, reason, minutes, advance)
            return
        limit = self.config.timeout_minutes
        if active.ended_as is None and limit is not None and minutes > limit:
            self._ask_to_stop(active, "failed", f"ran longer than sweep.timeout_minutes={limit:g}")
        elif active.ended_as is not None and time.monotonic() - active.stopped_at > active.job.patience_seconds:
            active.job.kill()

    def _follow(self, active: Active) -> None:
        """Report new values of the watched metric; stop the trial when the pruner says so."""
        pruning = self.config.pruning
        if pruning.kind == "off" or active.ended_as is not None:
            return
        file = self.folder.trial(active.number) / "metrics.jsonl"
        try:
            state = file.stat()
        except OSError:
            return
        # a folder that an earlier attempt left is not this one's
        if (state.st_size, state.st_mtime_ns) == active.seen or not self._is_claimed(active.number):
            return
        active.seen = (state.st_size, state.st_mtime_ns)
        event, _, key = pruning.watch.partition(".")
        for step, value in zip(*read_run(file.parent).series(event, key), strict=True):
            if step <= active.last_step:
                continue
            active.last_step = step
            if self.study.report(active.number, step, value):
                self._ask_to_stop(active, "pruned", f"{pruning.watch} {value:.4g} at step {step}")
                return

    def _status(self, number: int) -> str | None:
        """What the latest attempt says of itself in run_status.json."""
        status = read_run(self.folder.trial(number)).status or {}
        return status.get("status") if self._is_claimed(number) else None

    def _is_claimed(self, number: int) -> bool:
        """Whether the run folder is the latest attempt's: its status is younger than that attempt's configuration."""
        status, config = self.folder.trial(number) / "run_status.json", self.folder.config_file(number)
        return status.is_file() and config.is_file() and status.stat().st_mtime_ns >= config.stat().st_mtime_ns

    def _ask_to_stop(self, active: Active, state: str, reason: str) -> None:
        active.ended_as, active.stopped_at = (state, reason), time.monotonic()
        active.job.stop()

    def _was_stopped_by_others(self, number: int) -> bool:
        """Whether the run was preempted, but not by the driver; it goes on, unless that happens again and again."""
        stops = self.study.facts(number).get("stops", 0) + 1
        if self._status(number) not in UNFINISHED[1:] or stops > MOST_STOPS:
            return False
        self.study.note(number, stops=stops)
        say(f"{trial_name(number)} was stopped by others")
        return True

    def _verdict(self, number: int, asked: tuple[str, str] | None, code: int) -> tuple[str, str]:
        """How a trial whose job has ended counts, and why.

        Only a run that says it is finished is complete, also one that was about to be stopped: a stopped one may end
        with code 0 too.
        """
        if code == 0 and self._status(number) == "finished":
            results = read_run(self.folder.trial(number)).results or {}
            wanted = [objective.metric for objective in self.config.objectives]
            found = {name: metric_value(results, name) for name in [*wanted, *self.config.record]}
            self.study.note(number, metrics={name: value for name, value in found.items() if value is not None})
            missing = [name for name in wanted if found[name] is None]
            if not missing:
                return "complete", ""
            return "failed", f"results.json of the run has no {', '.join(missing)}"
        if asked is not None:
            return asked
        return "failed", failure(code, self.folder.log(number))

    def _end(self, number: int, state: str, reason: str, minutes: float, advance: Callable[[str], None]) -> None:
        """Record the end of a trial and say it."""
        self.study.note(number, minutes=round_minutes(minutes), **({"reason": reason} if reason else {}))
        values = None
        if state == "complete":
            metrics = self.study.facts(number)["metrics"]
            values = [metrics[objective.metric] for objective in self.config.objectives]
            reason = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.study.tell(number, state, values)
        self.folder.write_results(self.config, self.study, "running")
        say(f"{trial_name(number)} {state}: {reason} ({minutes:.1f} min)")
        advance(f"{trial_name(number)} {state}")

    def _stop_all(self, stop: Stop) -> None:
        """Stop every job and wait; a second signal, or too long a wait, kills. In the study their trials still run."""
        for active in self._active.values():
            say(f"{trial_name(active.number)} is stopped; `qat sweep` again takes it up")
            active.job.stop()
        end = time.monotonic() + max((active.job.patience_seconds for active in self._active.values()), default=0.0)
        while any(active.job.poll() is None for active in self._active.values()):
            if len(stop.signals) > 1 or time.monotonic() > end:
                for active in self._active.values():
                    active.job.kill()
            time.sleep(0.1)
        self._active.clear()


def settings_text(params: dict[str, Any]) -> str:
    """`scheme=w4a16_row optim.lr=0.0003`, numbers with four digits."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def round_minutes(minutes: float) -> float:
    """Three decimals."""
    return float(f"{minutes:.3f}")


def failure(code: int, log: Path) -> str:
    """Why a job ended with `code`: what its log says, the signal that ended it, or the code alone."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    )
    memory = next((line for line in reversed(lines) if any(word in line for word in OUT_OF_MEMORY)), None)
    if memory:
        return f"out of memory: {memory[:300]}"
    if code == -signal.SIGKILL:
        return "killed (SIGKILL), as systems do when memory runs out"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    # the last line of a traceback; loggers may say good-bye after it, and torchrun that a child failed
    raised = [line for line in lines if re.match(r"(?!.*ChildFailed)[\w.]*(Error|Exception|Interrupt)\b", line)]
    said = " ".join(dict.fromkeys(errors)) or next(reversed(raised or lines), "no output")
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
    return f"{how}: {said[:500]}"
