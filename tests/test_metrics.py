"""metrics.jsonl: valid JSON whatever happens, from rank 0 alone, and never the end of a run."""

from __future__ import annotations

import json
import shutil
import sys
import types

import pytest

from qat.errors import UserError
from qat.metrics import Metrics, finite


def lines(folder):
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_lines_are_appended_in_order_across_writers(tmp_path):
    Metrics(tmp_path / "new").write("train", 1, loss=2.5, phase="observe")
    Metrics(tmp_path / "new").write("validation", 2, perplexity=3)
    assert lines(tmp_path / "new") == [
        {"event": "train", "step": 1, "loss": 2.5, "phase": "observe"},
        {"event": "validation", "step": 2, "perplexity": 3},
    ]


def test_numbers_that_json_has_not_become_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    Metrics(tmp_path).write("layers", 1, loss=nan, layers={"a": {"x": inf}}, more=[1.0, -inf], text="nan")
    assert lines(tmp_path) == [
        {"event": "layers", "step": 1, "loss": None, "layers": {"a": {"x": None}}, "more": [1.0, None], "text": "nan"}
    ]
    assert finite({"a": True, "b": None}) == {"a": True, "b": None}


def test_line_is_on_disk_when_write_returns(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write("train", 1)
    assert len(lines(tmp_path)) == 1
    metrics.write("train", 2)
    assert len(lines(tmp_path)) == 2


def test_folder_that_is_deleted_meanwhile_is_made_again_and_said(tmp_path, capsys):
    metrics = Metrics(tmp_path / "run")
    metrics.write("train", 1)
    assert capsys.readouterr().err == ""
    shutil.rmtree(tmp_path / "run")
    for step in (2, 3):
        metrics.write("train", step)
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 3]
    assert capsys.readouterr().err.count("metrics.jsonl was deleted; it begins anew with step 2") == 1


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    Metrics(tmp_path).write("train", 1)
    assert list(tmp_path.iterdir()) == []


class Wandb(types.ModuleType):
    """A stand-in for the package: keeps what it is given, and fails when told to."""

    def __init__(self, fails_at=None):
        super().__init__("wandb")
        self.started, self.logged, self.finished, self.fails_at = None, [], 0, fails_at

    def init(self, **options):
        if self.fails_at == "start":
            raise RuntimeError("no login")
        self.started = options
        return self

    def log(self, values):
        if self.fails_at == len(self.logged):
            raise ConnectionError("gone")
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    def install(**options):
        fake = Wandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def test_wandb_mirrors_the_numbers(tmp_path, wandb):
    fake = wandb()
    metrics = Metrics(tmp_path, "offline", "my project", {"seed": 3}, group="my sweep")
    metrics.write("train", 4, loss=0.5, phase="observe")
    metrics.close()
    metrics.close()
    assert fake.started == {
        "project": "my project",
        "name": tmp_path.name,
        "dir": str(tmp_path),
        "mode": "offline",
        "config": {"seed": 3},
        "group": "my sweep",
        "id": None,
        "resume": None,
    }
    assert fake.logged == [{"train/loss": 0.5, "step": 4}]
    assert fake.finished == 1


def test_wandb_that_fails_later_is_a_warning_and_the_file_goes_on(tmp_path, wandb, capsys):
    fake = wandb(fails_at=1)
    metrics = Metrics(tmp_path, "online")
    for step in (1, 2, 3):
        metrics.write("train", step, loss=1.0)
    metrics.close()
    assert len(lines(tmp_path)) == 3
    assert len(fake.logged) == 1
    assert capsys.readouterr().err.count("wandb stopped logging (gone)") == 1


def test_wandb_that_cannot_start_is_refused_with_a_way_out(tmp_path, wandb):
    wandb(fails_at="start")
    with pytest.raises(UserError, match=r"online logging must start, got no login\. Set logger=wandb_offline"):
        Metrics(tmp_path, "online")


def test_wandb_that_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs the wandb package, got not installed"):
        Metrics(tmp_path, "offline")


def test_wandb_is_neither_needed_nor_started_when_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics = Metrics(tmp_path)
    metrics.write("train", 1)
    metrics.close()
    assert len(lines(tmp_path)) == 1
