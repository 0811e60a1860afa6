"""How one trial is started, watched and stopped: always as processes of its own, never in the driver's.

A launcher (`launchers.py`) makes a Job of a trial's configuration file. Here are the jobs of this machine: `qat train
--config-file`, by torchrun when the run wants several processes. Each leads a process group, so that stopping it
reaches all of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qat.config import RunConfig
from qat.errors import UserError, problem

# A stopped trial may still write what it has
PATIENCE_SECONDS = 60.0
# A trial starts a job of its own, not as a rank of whatever started the driver
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class TrialJob:
    """What a launcher needs: the run, its file, where its output goes, and which of the parallel places it takes.

    `goes_on`: the run folder holds an unfinished attempt, to be resumed.
    """

    run: RunConfig
    config_file: Path
    log: Path
    slot: int
    goes_on: bool = False


class Job(Protocol):
    """A started trial.

    `patience_seconds`: how long it may take to save when it is stopped. `waits`: it is queued and has not begun.
    """

    patience_seconds: float
    waits: bool

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def stop(self) -> None:
        """Ask it to save what it has and to end."""

    def kill(self) -> None:
        """End it at once."""


class LocalJob(Job):
    """A trial as a process group on this machine. Its id stands in a .pid file until it has ended."""

    patience_seconds = PATIENCE_SECONDS
    waits = False

    def __init__(self, trial: TrialJob, command: list[str] | None = None):
        command = train_command(trial) if command is None else command
        self._pid_file = pid_file(trial.config_file)
        with trial.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment(trial),
                start_new_session=True,
            )
        self._pid_file.write_text(str(self._process.pid))

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            # a rank that outlived its parent
            end_group(self._process.pid, signal.SIGKILL)
            self._pid_file.unlink(missing_ok=True)
        return code

    def stop(self) -> None:
        if self._process.poll() is None:
            end_group(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        end_group(self._process.pid, signal.SIGKILL)
        self._process.wait()


def train_command(trial: TrialJob) -> list[str]:
    """`qat train --config-file` or `qat resume`, under torchrun when the run has several processes."""
    processes = trial.run.trainer.devices
    verb = ["train", "--config-file", str(trial.config_file)]
    if trial.goes_on:
        verb = ["resume", str(Path(trial.run.runs_dir) / trial.run.name)]
    run = ["-m", "qat.cli.main", *verb]
    if processes == 1:
        return [sys.executable, *run]
    # --standalone: a free port for each, so that trials side by side do not meet
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *run]


def environment(trial: TrialJob) -> dict[str, str]:
    """The driver's environment, without ranks, with the trial's share of threads and GPUs."""
    variables = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    trainer = trial.run.trainer
    if trainer.threads:
        variables["OMP_NUM_THREADS"] = str(trainer.threads)
    if trainer.accelerator == "gpu":
        first = trial.slot * trainer.devices
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[first : first + trainer.devices])
    return variables


def visible_gpus() -> list[str]:
    """The names CUDA_VISIBLE_DEVICES may list: what it lists now, else one number for each GPU of the machine."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name for name in listed.split(",") if name]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(place) for place, _ in enumerate(line for line in done.stdout.splitlines() if line.startswith("GPU"))]


def check_local(run: RunConfig, parallel: int) -> list[str]:
    """A line for what this machine cannot do for trials like `run`, `parallel` of them side by side."""
    problems = []
    if run.trainer.nodes > 1:
        fix = "Use trainer.nodes=1; trials on several machines are SLURM jobs: sweep.launcher=slurm cluster=slurm."
        problems.append(problem("trainer.nodes", "sweep.launcher=local is one machine", run.trainer.nodes, fix))
    if run.trainer.accelerator == "gpu":
        wanted, found = parallel * run.trainer.devices, len(visible_gpus())
        if wanted > found:
            fix = "Lower sweep.parallel or trainer.devices."
            problems.append(problem("sweep.parallel * trainer.devices", f"needs {wanted} GPUs", found, fix))
    return problems


def pid_file(config_file: Path) -> Path:
    """Where the id of the process that runs this configuration stands."""
    return config_file.with_suffix(".pid")


def end_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a job's whole group; nothing happens when it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def end_left_over(config_file: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Stop the process that a dead driver left running on this configuration, and wait for its end.

    The id is believed only while that process still names the file, or the trial's run folder, in its command line.

    Raises:
        UserError: it does not end.
    """
    file = pid_file(config_file)
    if not file.is_file() or not (text := file.read_text().strip()).isdigit():
        return
    pid, waited = int(text), 0.0
    while _runs(pid, config_file):
        end_group(pid, signal.SIGKILL if waited > patience_seconds else signal.SIGTERM)
        if waited > 2 * patience_seconds:
            raise UserError(problem(str(config_file), "must not run still", f"process {pid}", f"Try: kill -9 {pid}"))
        time.sleep(0.5)
        waited += 0.5
    file.unlink(missing_ok=True)


def _runs(pid: int, config_file: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    run_folder = config_file.parent.parent / config_file.stem
    return not {str(config_file), str(run_folder)}.isdisjoint(words)
