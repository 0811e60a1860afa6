"""A model folder on disk: config.json, safetensors files with their index, and checksums. Knows nothing of grids.

    config.json                        model.safetensors                    up to 5 GB, or
    checksums.json {file: sha256}      model-00001-of-00002.safetensors ... + model.safetensors.index.json

The stem `model` is what every engine looks for; a folder that only we can read has another one.
Everything read is checked before it is used: names stay inside the folder, and a damaged file is named.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.errors import UserError, problem

CONFIG = "config.json"
CHECKSUMS = "checksums.json"
SHARD_SIZE = "5GB"
EXPORT_AGAIN = "The file is damaged: export again or copy the folder again."


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, not UTF-8 JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(problem(str(file), "must exist", "no such file", "Is this an export folder?")) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(problem(str(file), "must be readable JSON", error, EXPORT_AGAIN)) from None
    if not isinstance(content, dict):
        raise UserError(problem(str(file), "must hold a JSON object", type(content).__name__, EXPORT_AGAIN))
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Indented UTF-8 JSON. A NaN in it is our own bug: JSON has none."""
    file.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(tensors: dict[str, Tensor], folder: Path, stem: str) -> None:
    """Save tensors that share no memory as <stem>.safetensors; several files and an index above 5 GB."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    pattern = stem + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Every tensor that `write_tensors` saved.

    Raises:
        UserError: a file is missing, truncated or not safetensors, or the index points outside the folder or names
            tensors that are not there; the text names the file.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return read_file(folder / f"{stem}.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(problem(str(index), "must hold a weight_map of names", weight_map, EXPORT_AGAIN))
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        held = read_file(inside(folder, file))
        wanted = {name for name, where in weight_map.items() if where == file}
        if set(held) != wanted:
            given = ", ".join(sorted(set(held) ^ wanted)[:5])
            raise UserError(problem(str(folder / file), f"must hold what {index.name} says", given, EXPORT_AGAIN))
        tensors.update(held)
    return tensors


def read_file(file: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(problem(str(file), "must exist", "no such file", "Is this an export folder?")) from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(problem(str(file), "must be a whole safetensors file", error, EXPORT_AGAIN)) from None


def inside(folder: Path, name: str) -> Path:
    """The file called `name` in the folder; a name that is a path is refused."""
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        fix = "Do not use this folder: its list of files was tampered with."
        raise UserError(problem(str(folder), "must list plain file names", repr(name), fix))
    return folder / name


def write_checksums(folder: Path) -> None:
    """Write checksums.json with the sha256 of every other file in the folder. Call it last."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {file.name: sha256(file) for file in files})


def check_checksums(folder: Path) -> None:
    """Compare every file that checksums.json lists; files added later are no concern.

    Raises:
        UserError: a listed file is missing or has other bytes; each is named.
    """
    problems = []
    for name, wanted in read_json(folder / CHECKSUMS).items():
        file = inside(folder, name)
        given = sha256(file) if file.is_file() else "no such file"
        if given != wanted:
            problems.append(problem(str(file), f"must have sha256 {wanted}", given, EXPORT_AGAIN))
    if problems:
        raise UserError(*problems)


def sha256(file: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
