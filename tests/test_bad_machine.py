"""What a machine can do to a run: no memory, no disk, no rights, no compiler. It ends with a way out, or goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_runs import lines_of

from qat import pipeline
from qat.cli.compose import compose_run
from qat.errors import UserError
from qat.kernels import cpu
from qat.kernels.dispatch import choose
from qat.metrics import Metrics
from qat.run_folder import RunFolder

NOBODY = 65534


@pytest.fixture
def train(qat, tmp_path, tiny_model_dir, tiny_text):
    def call(*overrides: str) -> tuple[int, str, str]:
        fixed = [f"runs_dir={tmp_path / 'runs'}", "name=mine", f"model.path={tiny_model_dir}", f"data.path={tiny_text}"]
        given = {word.split("=")[0] for word in overrides}
        return qat("train", "recipe=tiny", *(word for word in fixed if word.split("=")[0] not in given), *overrides)

    return call


def out_of_memory(kind: str) -> Exception:
    if kind == "gpu":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if kind == "python":
        return MemoryError()
    return RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12")


@pytest.mark.parametrize("kind", ["gpu", "python", "cpu"])
def test_run_without_memory_ends_with_estimate_peak_and_remedies(train, tmp_path, monkeypatch, kind):
    def broken(*arguments):
        raise out_of_memory(kind)

    monkeypatch.setattr(pipeline.stages, "train", broken)
    code, _, error = train("trainer.batch_size=4")
    assert code == 1
    (line,) = lines_of(error)
    wanted = r"peak ([\d.]+) GiB; by estimate a process needs ([\d.]+) GiB\)\. Cheapest ways to fit: (.*)"
    found = re.search(wanted, line)
    assert found and float(found[1]) > 0.1
    assert "trainer.batch_size=1" in found[3] and found[3].count(" GiB)") >= 2
    # by these words a sweep knows why its trial failed
    assert re.search("OutOfMemoryError|MemoryError|can't allocate memory", line)
    assert json.loads((tmp_path / "runs/mine/run_status.json").read_text())["status"] == "failed"


def test_other_errors_are_no_lack_of_memory(train, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(pipeline.stages, "train", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train()


class FullDisk:
    """Stands for a file on a full disk: opens, and takes nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_log_on_a_full_disk_ends_the_run_with_a_way_out(train, tmp_path, monkeypatch):
    honest = Path.open

    def opened(self, mode="r", *rest, **options):
        if self.name == "metrics.jsonl" and mode == "a":
            return FullDisk()
        return honest(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="No space left"):
        Metrics(tmp_path).write("train", 1)
    code, _, error = train()
    assert code == 1
    assert re.search(r"must have room on its disk, got .*No space left on device.*qat resume", lines_of(error)[0])
    assert json.loads((tmp_path / "runs/mine/run_status.json").read_text())["status"] == "failed"


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"
WRITERS = {
    "checkpoint": ("safetensors.torch.save_file", "checkpoints/final"),
    "export": ("qat.formats.compressed_tensors.write_tensors", "export/compressed_tensors"),
}


@pytest.mark.parametrize("what", WRITERS)
def test_full_disk_leaves_nothing_half_written(train, tmp_path, monkeypatch, what):
    from safetensors import SafetensorError

    writer, place = WRITERS[what]

    def full(*arguments, **options):
        raise SafetensorError(FULL)

    monkeypatch.setattr(writer, full)
    code, _, error = train("evaluate.baselines=false")
    assert code == 1
    assert "must have room on its disk" in lines_of(error)[0]
    run = tmp_path / "runs/mine"
    parent = (run / place).parent
    assert not parent.exists() or not list(parent.iterdir())
    assert json.loads((run / "run_status.json").read_text())["status"] == "failed"


def in_child(work) -> bytes:
    """What `work` returns when a process without rights does it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("is_there", [True, False])
def test_run_folder_without_write_access_is_refused_before_training(is_there):
    config = compose_run(["recipe=tiny", "model.path=m", "data.path=d", "name=mine"])

    def create() -> str:
        try:
            RunFolder.create(config, "", 1)
        except UserError as error:
            return f"{error.before_work} {error}"
        return "created"

    with tempfile.TemporaryDirectory() as folder:  # where others may look, unlike pytest's own
        place = Path(folder)
        place.chmod(0o755)
        runs = place / "runs"
        runs.mkdir()
        if is_there:
            (runs / "mine").mkdir()
            (runs / "mine").chmod(0o555)
        runs.chmod(0o555)
        config.runs_dir = str(runs)
        said = in_child(create).decode()
        wanted = f"True {runs / 'mine'}: must be a writable folder, got Permission denied. Choose another"
        assert said.startswith(wanted)
        assert [path.name for path in runs.rglob("*")] == (["mine"] if is_there else [])


def test_place_where_no_folder_can_be_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, error = train(f"runs_dir={tmp_path / 'file'}")
    assert code == 2
    assert re.search(r"file/mine: must be a writable folder, got ", lines_of(error)[0])


def test_lock_of_a_dead_process_holds_nobody_up(tmp_path):
    """The lock is the system's and ends with its holder: what stands in the file is for people."""
    config = compose_run(["recipe=tiny", "model.path=m", "data.path=d", "name=mine", f"runs_dir={tmp_path}"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.lock").write_text("process 999999999 on elsewhere since yesterday\n")
    folder = RunFolder.create(config, "name: mine\n", 1)
    assert f"process {os.getpid()} on " in (folder.path / "run.lock").read_text()


def test_machine_without_the_compiled_kernels_serves_with_the_others_and_says_so(qat, monkeypatch, tmp_path):
    from test_kernels import WEIGHTS, packed_weight

    (tmp_path / "broken.so").write_bytes(b"\x7fELF but no more")
    for place, reason in ((tmp_path / "none.so", "not built"), (tmp_path / "broken.so", "does not load: ")):
        monkeypatch.setenv("QAT_CPU_LIBRARY", str(place))
        reason_now = cpu.unavailable.__wrapped__()
        assert reason_now.startswith(reason)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "unavailable", lambda said=reason_now: said)
            choice = choose("w4a16_matmul", packed_weight(WEIGHTS["int4-g32"], (5, 32)))
            assert (choice.backend, choice.refused) == ("dense", {"cpu": reason_now})
            _, out, _ = qat("doctor")
            assert f"plain torch ({reason_now})" in out
