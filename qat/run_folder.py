"""The run folder: who made it, in what state it is. Names of files inside are those of docs/architecture.md.

A folder belongs to one run. `create` refuses a folder that holds another run, a file in its place, and a place that
cannot be written, before any work is done.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qat.config import RunConfig
from qat.errors import UserError, problem
from qat.paths import write_json_atomic, write_text_atomic
from qat.progress import is_main

PACKAGES = ("qat", "torch", "lightning", "transformers", "hydra-core", "datasets", "safetensors", "compressed-tensors")


@dataclass
class RunFolder:
    """runs_dir/name with its manifest and status."""

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, config: RunConfig, resolved: str, threads: int) -> RunFolder:
        """Claim the folder and write resolved.yaml, manifest.json and run_status.json.

        Raises:
            UserError: it holds a run and overwrite is false, is not a folder, or cannot be written.
        """
        path = Path(config.runs_dir) / config.name
        if not is_main():
            return cls(path)
        check_free(path, config.overwrite)
        try:
            if path.exists():
                shutil.rmtree(path)
            path.mkdir(parents=True)
            (path / ".probe").write_text("")
            (path / ".probe").unlink()
        except OSError as error:
            fix = "Choose another runs_dir, or make it writable."
            raise UserError(problem(str(path), "must be a writable folder", error.strerror, fix)) from None
        write_text_atomic(path / "resolved.yaml", resolved)
        folder = cls(path, _manifest(config, threads))
        folder.record()
        folder.status("running", step=0)
        return folder

    def record(self, **facts: Any) -> None:
        """Add facts to manifest.json."""
        self.manifest |= facts
        if is_main():
            write_json_atomic(self.path / "manifest.json", self.manifest)

    def status(self, status: str, **facts: Any) -> None:
        """Replace run_status.json; the end of a run also goes into the manifest."""
        if not is_main() or not self.path.is_dir():
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json_atomic(self.path / "run_status.json", {"status": status, "at": now, "pid": os.getpid(), **facts})
        if status in ("finished", "failed", "interrupted"):
            self.record(finished=now, exit_state=status)


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a run folder that another run owns, or that is no run folder at all; nothing is touched."""
    if path.is_dir():
        is_run = (path / "resolved.yaml").is_file()
        if any(path.iterdir()) and not (overwrite and is_run):
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
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
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
