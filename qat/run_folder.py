"""The run folder: who made it, who holds it, in what state it is. Names of files inside: docs/architecture.md.

A folder belongs to one run and is held by one process at a time (a lock on run.lock, which ends with the process).
`create` refuses a folder that holds another run, a file in its place, and a place that cannot be written, before any
work is done. run_status.json says one of STATUSES, and in which stage of the run.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qat.config import RunConfig
from qat.errors import UserError, problem
from qat.paths import write_json_atomic, write_text_atomic
from qat.progress import is_main, say

PACKAGES = ("qat", "torch", "lightning", "transformers", "hydra-core", "datasets", "safetensors", "compressed-tensors")


STATUSES = ("running", "finished", "failed", "preempted", "interrupted")
LOCK = "run.lock"


@dataclass
class RunFolder:
    """runs_dir/name with its manifest and status."""

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    before: float = 0.0
    """Seconds that earlier processes of the run took."""
    started: float = field(default_factory=time.monotonic)
    lock: Any = None
    where: dict[str, Any] = field(default_factory=dict)
    """Stage and step."""

    @classmethod
    def create(cls, config: RunConfig, resolved: str, threads: int) -> RunFolder:
        """Claim the folder and write resolved.yaml, manifest.json and run_status.json.

        Raises:
            UserError: it holds a run and overwrite is false, is not a folder, is held, or cannot be written.
        """
        path = Path(config.runs_dir) / config.name
        if not is_main():
            return cls(path)
        check_free(path, config.overwrite)
        told = config.plan.sensitivity
        if told is not None and not Path(told).is_file():
            fix = "Check the path; relative paths start at the working directory. Or set plan.sensitivity=null."
            raise UserError(problem("plan.sensitivity", "must be a file", f"'{told}'", fix))
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _hold(path)
            for old in path.iterdir():
                if old.name != LOCK:
                    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            (path / ".probe").write_text("")
            (path / ".probe").unlink()
        except OSError as error:
            fix = "Choose another runs_dir, or make it writable."
            raise UserError(problem(str(path), "must be a writable folder", error.strerror, fix)) from None
        write_text_atomic(path / "resolved.yaml", resolved)
        if told is not None:
            shutil.copyfile(told, path / "sensitivity.json")
        folder = cls(path, _manifest(config, threads), lock=lock)
        folder.record()
        folder.stage("loading", step=0)
        return folder

    @classmethod
    def reopen(cls, config: RunConfig) -> RunFolder:
        """Hold the folder of a run that is to go on; UserError when another process does, or it cannot be read."""
        path = Path(config.runs_dir) / config.name
        if not is_main():
            return cls(path)
        lock = _hold(path)
        manifest, status = (_read(path / name) for name in ("manifest.json", "run_status.json"))
        return cls(path, manifest, float(status.get("seconds") or 0), lock=lock)

    def goes_on(self, resolved: str) -> None:
        """The run goes on, with this configuration."""
        if not is_main():
            return
        status = _read(self.path / "run_status.json")
        write_text_atomic(self.path / "resolved.yaml", resolved)
        again = {"at": _now(), "after": status.get("status"), "command": " ".join(["qat", *sys.argv[1:]])}
        self.record(resumed=[*self.manifest.get("resumed", []), again])
        self.stage("loading", step=status.get("step", 0))

    @property
    def seconds(self) -> float:
        """Time the run has taken, over all its processes."""
        return self.before + time.monotonic() - self.started

    def record(self, **facts: Any) -> None:
        """Add facts to manifest.json."""
        self.manifest |= facts
        if is_main():
            write_json_atomic(self.path / "manifest.json", self.manifest)

    def status(self, status: str, **facts: Any) -> None:
        """Replace run_status.json; the end of a run also goes into the manifest."""
        assert status in STATUSES, status
        if not is_main() or not self.path.is_dir():
            return
        content = {"status": status, "at": _now(), "pid": os.getpid(), "seconds": round(self.seconds, 1), **facts}
        write_json_atomic(self.path / "run_status.json", content)
        if status != "running":
            self.record(finished=_now(), exit_state=status)

    def stage(self, stage: str, step: int) -> None:
        """Say what the run is doing."""
        self.where = {"stage": stage, "step": step}
        self.status("running", **self.where)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fix = "Start anew with `qat train ... overwrite=true`."
        raise UserError(problem(str(path), "must be readable", "no JSON", fix)) from None


def _take_lock(path: Path) -> Any:
    """An open, locked file; UserError naming the process that holds it. Ends with the process, however it ends."""
    try:
        lock = (path / LOCK).open("a+")
    except OSError as error:
        fix = "Choose another runs_dir, or make it writable."
        raise UserError(problem(str(path), "must be a writable folder", error.strerror, fix)) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        fix = "Wait for it or stop it, or give this run another name=..."
        got = f"held by {lock.read().strip() or 'another process'}"
        raise UserError(problem(str(path), "one process at a time works on a run", got, fix)) from None
    except OSError as error:
        say(f"warning: {path} cannot be locked ({error.strerror}); make sure that no other process works on this run")
    return lock


def _hold(path: Path) -> Any:
    """The lock, for the life of this process, with a line that says who it is."""
    lock = _take_lock(path)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()} since {_now()}\n")
    lock.flush()
    return lock


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a run folder that another run owns, or that is no run folder at all; nothing is touched."""
    if path.is_dir():
        if (path / LOCK).is_file():
            _take_lock(path).close()
        is_run = (path / "resolved.yaml").is_file()
        if any(file.name != LOCK for file in path.iterdir()) and not (overwrite and is_run):
            fix = "Give the run another name=..." + (", or set overwrite=true to replace it." if is_run else ".")
            given = "one" if is_run else "a folder with other files"
            raise UserError(problem(str(path), "must not hold another run", given, fix))
    elif os.path.lexists(path):
        raise UserError(problem(str(path), "must be a folder", "a file", "Give the run another name=..."))


def _manifest(config: RunConfig, threads: int) -> dict[str, Any]:
    return {
        "name": config.name,
        "command": " ".join(["qat", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git(),
        "cpu": _cpu(),
        "threads": threads,
        "seed": config.seed,
        "started": _now(),
        "finished": None,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git() -> str | None:
    """Commit of the working directory, with `-dirty` when files differ; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
