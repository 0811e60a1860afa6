"""A run as a job: the batch script, written and handed to SLURM (or to a process of this machine) by submitit.

    submit(config, resolved) --srun on each machine--> python -m qat.cluster (node.py) -> torchrun -> qat train | resume

The run folder has a fixed name, so a job that is queued again finds itself. Logs, script and configuration are in
runs_dir/.jobs/NAME. submitit sees a plain command: nothing is pickled, and only node.py answers signals and requeues.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qat.cluster.node import STOP, job_folder, run_status
from qat.config import RunConfig
from qat.errors import UserError, problem
from qat.paths import write_text_atomic

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING", "UNKNOWN")
GOING = ("RUNNING", "COMPLETING", "SUSPENDED", "PREEMPTED", "RESIZING")
# submitit asks SLURM about all jobs at once, by itself only every ten minutes
ASK_SECONDS = 15


@dataclass
class Job:
    """A submitted run. `number`: the scheduler's; `log`: where its output goes."""

    submitted: Any
    run: Path

    @property
    def number(self) -> str:
        """The job's number at the scheduler: SLURM's job id, or the process id."""
        return self.submitted.job_id

    @property
    def scheduler_state(self) -> str:
        """The scheduler's own word, such as OUT_OF_MEMORY."""
        return self.submitted.state

    @property
    def log(self) -> Path:
        """What the job prints."""
        return self.submitted.paths.stdout

    def state(self) -> str:
        """waiting, running, preempted, finished or failed."""
        scheduler = self.submitted.state.upper()
        if scheduler in WAITING:
            return "waiting"
        # what SLURM preempts it queues again, or, set to cancel, leaves in this state
        if scheduler in GOING and (scheduler != "PREEMPTED" or _in_queue(self.number)):
            return "running"
        # only the run itself knows how it ended: torchrun turns every exit code but 0 into 1
        status = run_status(self.run)
        return status if status in ("finished", "preempted") else "failed"


def submit(config: RunConfig, resolved: str, run: Path, command: tuple[str, ...] | None = None) -> Job:
    """Hand one run to the cluster.

    Args:
        resolved: the run as YAML, kept beside the script; what the job trains unless `command` says otherwise.
        run: its folder, on a file system that all machines see.
        command: the words after `qat` that start the run when the folder holds none yet.
    Raises:
        UserError: the run is finished, submitit is not installed, or SLURM is not here or refuses the job.
    """
    if run_status(run) == "finished":
        fix = "Give the run another name=..., or remove its folder."
        raise UserError(problem(str(run), "must not be finished", "a finished run", fix))
    folder = job_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP).unlink(missing_ok=True)
    write_text_atomic(folder / "config.yaml", resolved)
    executor = _executor(config, folder)
    executor.update_parameters(**parameters(config))
    try:
        submitted = executor._submit_command(node_command(config, run, command))
    except RuntimeError as error:
        fix = "Look at cluster.partition, cluster.account and the limits of the partition."
        raise UserError(problem("sbatch", "must take the job", f"'{error}'", fix), before_work=False) from None
    return _watched(submitted, run)


def known_job(number: str, run: Path) -> Job:
    """A SLURM job that was submitted before, by another process."""
    from submitit import SlurmJob

    return _watched(SlurmJob(job_folder(run), number), run)


def node_command(config: RunConfig, run: Path, command: tuple[str, ...] | None = None) -> str:
    """The shell command of one machine."""
    words = command or ("train", "--config-file", str(job_folder(run) / "config.yaml"))
    cluster, trainer = config.cluster, config.trainer
    options = {"--run": run.absolute(), "--processes": trainer.devices, "--save-seconds": cluster.signal_seconds}
    if trainer.nodes > 1:
        options |= {"--port": cluster.port, "--start-seconds": f"{60 * trainer.start_timeout_minutes:g}"}
    flags = [text for name, value in options.items() for text in (name, str(value))]
    flags += [] if cluster.requeue else ["--no-requeue"]
    return shlex.join([sys.executable, "-u", "-m", "qat.cluster", *flags, "--", *words])


def script(config: RunConfig, run: Path, command: tuple[str, ...] | None = None) -> str:
    """The batch script that `submit` hands to sbatch, as text; needs submitit, no SLURM."""
    _submitit()
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string(node_command(config, run, command), job_folder(run), **parameters(config))


def parameters(config: RunConfig) -> dict[str, Any]:
    """What the job asks of the cluster, under the names of submitit's executor for `cluster.kind`."""
    cluster, trainer = config.cluster, config.trainer
    gpus = {"gpus_per_node": trainer.devices} if trainer.accelerator == "gpu" else {}
    if cluster.kind == "local":
        limits = {"timeout_min": cluster.time_minutes, "signal_delay_s": cluster.signal_seconds}
        return {**limits, **gpus, "stderr_to_stdout": True, "setup": cluster.setup}
    extra: dict[str, Any] = {"signal": f"USR1@{cluster.signal_seconds}"}
    extra |= {"requeue": True} if cluster.requeue else {"no-requeue": True}
    for option in cluster.sbatch:
        name, has_value, value = option.lstrip("-").partition("=")
        extra[name] = value if has_value else True
    asked = {
        "partition": cluster.partition,
        "account": cluster.account,
        "cpus_per_task": cluster.cpus_per_node,
        "mem": None if cluster.memory_gib is None else f"{cluster.memory_gib}G",
        "setup": cluster.setup or None,
    }
    return {
        "job_name": re.sub(r"[^\w.-]", "_", config.name),
        "time": cluster.time_minutes,
        "nodes": trainer.nodes,
        "ntasks_per_node": 1,
        "wckey": None,
        **gpus,
        **{name: value for name, value in asked.items() if value is not None},
        "stderr_to_stdout": True,
        "additional_parameters": extra,
    }


def _executor(config: RunConfig, folder: Path) -> Any:
    submitit = _submitit()
    if config.cluster.kind == "local":
        return submitit.LocalExecutor(folder)
    try:
        return submitit.SlurmExecutor(folder)
    except RuntimeError:
        fix = "Submit on a login node of the cluster; `qat submit --dry-run` shows the script anywhere."
        raise UserError(problem("cluster=slurm", "needs SLURM's srun and sbatch", "neither", fix)) from None


def _watched(submitted: Any, run: Path) -> Job:
    from submitit import SlurmJob

    if isinstance(submitted, SlurmJob):
        submitted.watcher = _watcher()
    return Job(submitted, run)


@cache
def _watcher() -> Any:
    """Asks SLURM about the jobs of this process: each one until it has ended."""
    from submitit.slurm.slurm import SlurmInfoWatcher

    class Watcher(SlurmInfoWatcher):
        def is_done(self, job_id: str, mode: str = "standard") -> bool:
            # submitit's list lacks a few, such as SUSPENDED
            return self.get_state(job_id, mode).upper() not in (*WAITING, *GOING)

    return Watcher(delay_s=ASK_SECONDS)


def _in_queue(number: str) -> bool:
    done = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True, text=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        fix = "Run: pip install 'qat[cluster]'"
        raise UserError(problem("qat submit", "needs the package submitit", "none", fix)) from None
    return submitit
