"""A trial as a SLURM job: submitted, watched and stopped by way of `qat.cluster`.

The job queues itself again after a preemption (cluster.requeue) and goes on from its last checkpoint; the driver sees
it wait. Asked to stop, it saves and leaves the queue for good.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from qat.cluster import submit
from qat.cluster.node import PREEMPTED, STOP, job_folder
from qat.config import RunConfig
from qat.errors import UserError, problem
from qat.sweep.jobs import PATIENCE_SECONDS, Job, TrialJob

PROGRAMS = ("sbatch", "srun", "sacct", "squeue", "scancel", "scontrol")
# States that say nothing but what the run itself has said
ORDINARY = ("COMPLETED", "FAILED")
LEFT_OVER_POLL_SECONDS = 1.0


class SlurmJob(Job):
    """A submitted trial. Its number stands in a .job file until it has ended; its log is linked to the trial's."""

    def __init__(self, trial: TrialJob):
        run = Path(trial.run.runs_dir).absolute() / trial.run.name
        self.patience_seconds = trial.run.cluster.signal_seconds + PATIENCE_SECONDS
        self.waits = True
        self._killed = False
        if not trial.goes_on:
            # the job would go on with what an earlier attempt left
            (run / "run_status.json").unlink(missing_ok=True)
        command = ("train", "--config-file", str(trial.config_file.absolute()))
        self._job = submit.submit(trial.run, trial.config_file.read_text(encoding="utf-8"), run, command)
        self._file = job_file(trial.config_file)
        self._file.write_text(json.dumps({"number": self._job.number, "run": str(run)}))
        trial.log.unlink(missing_ok=True)
        trial.log.symlink_to(os.path.relpath(self._job.log, trial.log.parent))

    def poll(self) -> int | None:
        """As LocalJob; a killed job counts as ended, SLURM needs a while for it."""
        if self._killed:
            return -signal.SIGKILL
        state = self._job.state()
        if state in ("waiting", "running"):
            self.waits = self.waits and state == "waiting"
            return None
        self._file.unlink(missing_ok=True)
        if state == "failed" and self._job.scheduler_state not in ORDINARY:
            with self._job.log.open("a") as log:
                log.write(f"\nerror: SLURM job {self._job.number} ended as {self._job.scheduler_state}\n")
        return {"finished": 0, "preempted": PREEMPTED}.get(state, 1)

    def stop(self) -> None:
        stop(self._job)

    def kill(self) -> None:
        if not self._killed:
            self._killed = True
            _scancel(self._job.number)


def check_slurm(run: RunConfig, parallel: int) -> list[str]:
    """A line for what is missing here to submit trials like `run`; how many run side by side is SLURM's affair."""
    problems = []
    if run.cluster.kind != "slurm":
        fix = "Add cluster=slurm, cluster.partition and cluster.account."
        problems.append(problem("sweep.launcher=slurm", "needs cluster.kind=slurm", run.cluster.kind, fix))
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        fix = "Start the sweep on a login node of the cluster, or use sweep.launcher=local."
        problems.append(problem("sweep.launcher=slurm", "needs SLURM's programs", f"no {', '.join(absent)}", fix))
    return problems


def job_file(config_file: Path) -> Path:
    """Where the number of the job that runs this configuration stands."""
    return config_file.with_suffix(".job")


def stop(job: submit.Job) -> None:
    """Ask a job to save what it has and to leave the queue; one that has not begun is cancelled."""
    (job_folder(job.run) / STOP).touch()
    job.submitted.get_info(mode="force")
    # as SLURM signals before the end of the time: every process of the job's steps, not the script
    _scancel(*([] if job.state() == "waiting" else ["--signal=USR1"]), job.number)


def end_left_over(config_file: Path, patience_seconds: float = 600.0) -> None:
    """Stop the job that a dead driver left in the queue or running, and wait for its end.

    Raises:
        UserError: it does not end.
    """
    file = job_file(config_file)
    if not file.is_file():
        return
    left = json.loads(file.read_text())
    job = submit.known_job(left["number"], Path(left["run"]))
    stop(job)
    end = time.monotonic() + patience_seconds
    # SLURM forgets jobs after a while
    while job.state() in ("waiting", "running") and job.scheduler_state != "UNKNOWN":
        if time.monotonic() > end:
            fix = f"Try: scancel {job.number}"
            raise UserError(problem(str(config_file), "must not run still", f"SLURM job {job.number}", fix))
        time.sleep(LEFT_OVER_POLL_SECONDS)
    file.unlink()


def _scancel(*words: str) -> None:
    # a job that has ended meanwhile is no error
    subprocess.run(["scancel", *words], check=False, stderr=subprocess.DEVNULL)
