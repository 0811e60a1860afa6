"""Checkpoint folders are whole or do not exist, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from qat import checkpoints
from qat.checkpoints import MANIFEST, Checkpoints, Damaged, Piece, check
from qat.errors import UserError


def pieces(step: int, size: int = 1000) -> list[Piece]:
    """A state that says of itself which step it is."""
    weight = torch.full((size, 8), float(step))
    return [Piece("model.w", weight, 0, (size, 8)), Piece("step", torch.tensor(step), 0, ())]


def save(store: Checkpoints, step: int, size: int = 1000) -> None:
    store.save(step, pieces(step, size), {"step": step})


def step_of(store: Checkpoints) -> int | None:
    """The newest whole one's step, after looking at what it holds."""
    found, _ = store.newest()
    if found is None:
        return None
    step = found.facts["step"]
    assert int(found.read("step")) == step
    assert torch.equal(found.read("model.w"), torch.full(found.shape("model.w"), float(step)))
    return step


def test_newest_is_by_step_and_older_ones_go(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert step_of(store) is None
    for step in (5, 10, 9, 11):
        save(store, step)
    os.utime(tmp_path / "checkpoints/step-000010", (2e9, 2e9))  # a clock that was wrong
    assert step_of(store) == 11
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["LATEST", "step-000010", "step-000011"]
    assert (tmp_path / "checkpoints/LATEST").read_text() == "step-000011\n"


def test_rows_are_read_across_the_files_of_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 1)
    weight = torch.arange(35.0).view(7, 5)
    parts = [({}, {})]
    folder = tmp_path / "checkpoints/.step-000003.tmp"
    folder.mkdir(parents=True)
    for rank, (start, stop) in enumerate([(0, 3), (3, 6), (6, 7), (7, 7)]):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(checkpoints._write_pieces(folder, [Piece("w", weight[start:stop], start, (7, 5))]))
    monkeypatch.setenv("RANK", "0")
    store = Checkpoints(tmp_path / "checkpoints")
    store._publish(folder, tmp_path / "checkpoints/step-000003", parts, {"step": 3})
    found, _ = store.newest()
    for start, stop in [(0, 7), (2, 4), (0, 1), (5, 7), (6, 7), (3, 3), (7, 7)]:
        assert torch.equal(found.read("w", start, stop), weight[start:stop]), (start, stop)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), f"no readable {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_text("{"), f"no readable {MANIFEST}"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "is missing or has another size"),
        (lambda folder: os.truncate(next(folder.glob("*.safetensors")), 100), "is missing or has another size"),
        (lambda folder: flip(next(folder.glob("*.safetensors"))), "has another checksum"),
    ],
)
def test_damaged_checkpoint_is_told_and_passed_over(tmp_path, damage, why):
    store = Checkpoints(tmp_path)
    save(store, 1)
    save(store, 2)
    damage(tmp_path / "step-000002")
    with pytest.raises(Damaged, match=why):
        check(tmp_path / "step-000002")
    found, skipped = store.newest()
    assert found.facts["step"] == 1
    assert len(skipped) == 1
    assert why in skipped[0]


def flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("version", [0, 2, None])
def test_checkpoint_of_another_version_is_refused_and_left(tmp_path, version):
    """Going on from an older one, or from nothing, would throw work away that another version can read."""
    store = Checkpoints(tmp_path)
    save(store, 1)
    save(store, 2)
    file = tmp_path / "step-000002" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": version}))
    wanted = rf"step-000002: format version must be 1, got {version}\. Resume with"
    with pytest.raises(UserError, match=wanted) as caught:
        store.newest()
    assert caught.value.before_work
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-000001", "step-000002"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_state_that_is_not_finite_is_not_saved_and_the_one_before_stays(tmp_path, value):
    store = Checkpoints(tmp_path)
    save(store, 1)
    bad = torch.ones(5, 5)
    bad[3, 3] = value
    with pytest.raises(UserError, match=r"model\.w: must be finite to be saved, got NaN or infinity\. Lower optim\.lr"):
        store.save(2, [Piece("model.w", bad, 0, (5, 5))], {"step": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-000001"]
    assert step_of(store) == 1


def full_disk(monkeypatch, while_there):
    """Every sync of a checkpoint file fails with ENOSPC as long as `while_there()`."""
    honest = os.fsync

    def fsync(handle):
        if while_there():
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(handle)

    monkeypatch.setattr(checkpoints.os, "fsync", fsync)


def test_full_disk_makes_room_by_dropping_older_checkpoints_and_tries_again(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(store, step)
    full_disk(monkeypatch, lambda: (tmp_path / "step-000001").exists())
    save(store, 4)
    assert step_of(store) == 4
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-000003", "step-000004"]


def test_full_disk_ends_the_run_with_the_bytes_needed_and_keeps_the_newest(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    save(store, 1)
    full_disk(monkeypatch, lambda: True)
    wanted = r"must take a checkpoint, got .*No space left on device.*\. Free 32,008 bytes there, then `qat resume`"
    with pytest.raises(UserError, match=wanted) as caught:
        save(store, 2)
    assert not caught.value.before_work
    monkeypatch.undo()
    assert step_of(store) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-000001"]


def test_same_step_is_replaced_and_never_gone_in_between(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, 3)
    flip(next((tmp_path / "step-000003").glob("*.safetensors")))
    save(store, 3)
    assert step_of(store) == 3


def test_leftovers_of_a_killed_save_are_swept_and_never_read(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, 1)
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step-000002.tmp")
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000009.bak")
    assert step_of(store) == 1
    store.sweep()
    assert not (tmp_path / ".step-000002.tmp").exists()


def kill_while_saving(folder, kills: int) -> list[int]:
    """Fork a child that saves step after step, and kill it at a random moment, again and again."""
    rng = random.Random(0)
    newest, survived = 0, []
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            store = Checkpoints(folder)
            store.sweep()
            for step in range(newest + 1, newest + 1000):
                save(store, step, size=20000)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = step_of(Checkpoints(folder)) or 0
        assert found >= newest, "a published checkpoint was lost"
        newest = found
        survived.append(found)
    return survived


def test_killed_saves_lose_nothing_and_leave_nothing_corrupt(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm")  # another file system than the run's; nothing may go there
    steps = kill_while_saving(tmp_path, kills=12)
    assert steps[-1] > steps[0]


@pytest.mark.faults
def test_hundred_killed_saves_lose_nothing_with_tmpdir_on_another_file_system(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    assert os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev
    steps = kill_while_saving(tmp_path, kills=100)
    assert len(set(steps)) > 20
