"""Checkpoints of a run: folders that are whole or do not exist.

    checkpoints/step-000400/rank00000-000.safetensors   the rows of tensors that a process holds, <= 256 MiB a file
                            manifest.json               written last: facts, bytes and sha256 of every file, and the
                                                        index: which rows of which tensor stand in which file
    checkpoints/LATEST                                  name of the newest one, for people; not read

A folder is written as a hidden neighbour of its final place (no other file system, no $TMPDIR), synced file by file,
and published by one rename. Older ones are deleted only after that. What a killed save leaves is swept by the next
start. Reading takes any rows of any tensor, so a run may go on with another number of processes.

What stands in a checkpoint is decided in `train/state.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat import ranks
from qat.errors import UserError, problem
from qat.paths import swap, sync, write_text_atomic

VERSION = 1
FILE_BYTES = 256 << 20
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Piece:
    """Rows `start` and on of a tensor whose whole shape is `shape`; a whole tensor starts at 0."""

    name: str
    rows: Tensor
    start: int
    shape: tuple[int, ...]


class Damaged(Exception):
    """A folder that is no whole checkpoint; the text says why."""


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them.

    Args:
        folder: runs_dir/name/checkpoints; every process sees the same one.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def save(self, step: int, pieces: Iterable[Piece], facts: dict[str, Any]) -> Path:
        """Publish the state at `step`; all processes call, each with its own pieces.

        Raises:
            UserError: on every process, when any of them holds NaN or infinity or cannot write. What was published
                before is untouched, but for older checkpoints removed to make room on a full disk.
        """
        pieces = list(pieces)
        needed = sum(piece.rows.numel() * piece.rows.element_size() for piece in pieces)
        failure = self._try_save(step, pieces, facts)
        if failure and failure[0] == errno.ENOSPC and ranks.from_main(self._make_room()):
            failure = self._try_save(step, pieces, facts)
        if failure is None:
            return self.folder / _name(step)
        if failure[0] is not None:
            total = sum(ranks.gather(needed))
            fix = f"Free {total:,} bytes there, then `qat resume` goes on from the newest checkpoint."
            raise UserError(problem(str(self.folder), "must take a checkpoint", failure[1], fix), before_work=False)
        raise UserError(failure[1], before_work=False)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint and a line for each newer one that is damaged; all processes call and agree.

        Raises:
            UserError: the newest whole one was written in another format.
        """
        there, trouble = ranks.from_main(_attempt(self._newest_here) if ranks.rank() == 0 else None)
        if trouble:
            raise UserError(trouble[1])
        found, skipped = there
        return (Checkpoint(Path(found[0]), found[1]) if found else None), skipped

    def sweep(self) -> None:
        """Remove what a killed save left behind."""
        if ranks.rank() == 0 and self.folder.is_dir():
            for stale in self.folder.glob(".step-*"):
                shutil.rmtree(stale, ignore_errors=True)

    def clear(self) -> None:
        """Remove all: the training they were for has ended and is published."""
        for folder in self._published():
            shutil.rmtree(folder)
        (self.folder / "LATEST").unlink(missing_ok=True)

    def _try_save(self, step: int, pieces: list[Piece], facts: dict[str, Any]) -> tuple[int | None, str] | None:
        """None when it stands, else (errno or None, message), the same on every process."""
        final = self.folder / _name(step)
        temporary = self.folder / f".{final.name}.tmp"
        trouble = None
        if ranks.rank() == 0:
            trouble = _attempt(lambda: _empty_folder(temporary))[1]
        trouble = ranks.from_main(trouble)
        written: Any = None
        if trouble is None:
            written, trouble = _attempt(lambda: _write_pieces(temporary, pieces))
        everyone = ranks.gather((written, trouble))
        trouble = next((there for _, there in everyone if there is not None), None)
        if ranks.rank() == 0:
            if trouble is None:
                trouble = _attempt(lambda: self._publish(temporary, final, [part for part, _ in everyone], facts))[1]
            shutil.rmtree(temporary, ignore_errors=True)
        return ranks.from_main(trouble)

    def _publish(self, temporary: Path, final: Path, parts: list[Any], facts: dict[str, Any]) -> None:
        files: dict[str, Any] = {}
        index: dict[str, Any] = {}
        for own_files, own_index in parts:
            files |= own_files
            for name, entry in own_index.items():
                index.setdefault(name, {"shape": entry["shape"], "pieces": []})["pieces"] += entry["pieces"]
        write_manifest(temporary, {"facts": facts, "index": index}, files)
        swap(temporary, final)
        write_text_atomic(self.folder / "LATEST", final.name + "\n")
        for old in self._published()[: -self.keep]:
            shutil.rmtree(old)

    def _published(self) -> list[Path]:
        """Folders named like checkpoints, in order of step (never of time)."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())

    def _newest_here(self) -> tuple[tuple[str, dict[str, Any]] | None, list[str]]:
        """Folder and manifest of the newest whole one, and what is wrong with newer ones."""
        skipped: list[str] = []
        for folder in reversed(self._published()):
            try:
                return (str(folder), check(folder)), skipped
            except Damaged as error:
                skipped.append(f"checkpoint {folder} is damaged ({error}); using the one before it")
        return None, skipped

    def _make_room(self) -> bool:
        """Delete all but the newest whole checkpoint; whether anything went."""
        if ranks.rank() > 0:
            return False
        found, _ = self._newest_here()
        others = [path for path in self._published() if found and str(path) != found[0]]
        for old in others:
            shutil.rmtree(old)
        return bool(others)


@dataclass
class Checkpoint:
    """A whole checkpoint, open for reading."""

    folder: Path
    manifest: dict[str, Any]
    _open: dict[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What was saved beside the tensors."""
        return self.manifest["facts"]

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self.manifest["index"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor."""
        return tuple(self.manifest["index"][name]["shape"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, from whichever files hold them."""
        entry = self.manifest["index"][name]
        if not entry["shape"]:
            return self._file(entry["pieces"][0][0]).get_tensor(name)
        stop = entry["shape"][0] if stop is None else stop
        parts = []
        for file, first, last in sorted(entry["pieces"], key=lambda piece: piece[1]):
            low, high = max(start, first), min(stop, last)
            if low < high:
                parts.append(self._file(file).get_slice(name)[low - first : high - first])
        if not parts:
            file = entry["pieces"][0][0]
            return self._file(file).get_slice(name)[0:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def write_manifest(folder: Path, content: dict[str, Any], files: dict[str, Any]) -> None:
    """manifest.json of a folder about to be published: `files` is name -> {bytes, sha256}."""
    write_text_atomic(folder / MANIFEST, json.dumps({"version": VERSION, **content, "files": files}) + "\n")


def check(folder: Path) -> dict[str, Any]:
    """The manifest of a folder all of whose files are as written; raises Damaged, or UserError for another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Damaged(f"no readable {MANIFEST}") from None
    if manifest.get("version") != VERSION:
        fix = "Resume with the version of qat that wrote it, or train anew under another name=..."
        raise UserError(problem(str(folder), f"format version must be {VERSION}", manifest.get("version"), fix))
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != wanted["bytes"]:
            raise Damaged(f"{name} is missing or has another size")
        if sha256(path) != wanted["sha256"]:
            raise Damaged(f"{name} has another checksum")
    return manifest


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _empty_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _attempt(work: Any) -> tuple[Any, tuple[int | None, str] | None]:
    """(result, None), or (None, (errno, message)): a failure that every process must hear of."""
    try:
        return work(), None
    except OSError as error:
        return None, (error.errno or 0, str(error))
    except UserError as error:
        return None, (None, error.problems[0])


def _write_pieces(folder: Path, pieces: list[Piece]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Files {name: {bytes, sha256}} and index {tensor: {shape, pieces}} of what this process holds."""
    from safetensors.torch import save

    files, index = {}, {}
    for number, group in enumerate(_grouped(pieces)):
        name = f"rank{ranks.rank():05d}-{number:03d}.safetensors"
        content = save({piece.name: _own(piece) for piece in group})
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for piece in group:
            rows = len(piece.rows) if piece.rows.dim() else 1
            index[piece.name] = {"shape": list(piece.shape), "pieces": [[name, piece.start, piece.start + rows]]}
    sync(folder)
    return files, index


def _grouped(pieces: list[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece.rows.numel() * piece.rows.element_size()
        if size >= FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _own(piece: Piece) -> Tensor:
    """On the CPU, contiguous, in memory of its own; raises UserError when it is not finite."""
    rows = piece.rows.detach().cpu().contiguous()
    if rows.is_floating_point() and not torch.isfinite(rows).all():
        fix = "Lower optim.lr, then `qat resume`: the newest checkpoint is from before."
        raise UserError(problem(piece.name, "must be finite to be saved", "NaN or infinity", fix))
    return rows.clone() if rows.untyped_storage().nbytes() != rows.numel() * rows.element_size() else rows
