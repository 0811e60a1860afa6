"""The files of a float model's folder, looked at before transformers reads any of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from qat.errors import UserError, problem

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# Keys of config.json that name code to load. Only model.trust_remote_code=true lets them.
CODE_FIELDS = ("auto_map", "_attn_implementation_internal", "_experts_implementation_internal")


def refuse_adapter(folder: Path) -> None:
    """UserError for a folder that peft wrote: its weights are an addition to those of another model."""
    if (folder / ADAPTER).exists():
        fix = "Merge it first, in peft: model.merge_and_unload().save_pretrained(folder)."
        raise UserError(problem(str(folder), "must be a whole model", f"an adapter ({ADAPTER})", fix))


def warn_of_code_fields(config: Path) -> None:
    """One warning for the keys of config.json that would run code, which are ignored."""
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers says what is wrong with it
    held = [key for key in CODE_FIELDS if isinstance(fields, dict) and key in fields]
    if held:
        log.warning("%s names code in %s, which is ignored", config, ", ".join(held))


def check_weight_files(folder: Path) -> None:
    """Refuse, before a tensor is read, weights that are pickled, outside the folder, absent or cut short."""
    from safetensors import SafetensorError, safe_open

    if (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    elif (folder / INDEX).exists():
        names = _shards(folder / INDEX)
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        got = f"pickled weights ({', '.join(pickled[:3])}), which can run code" if pickled else "none"
        fix = "Convert once where you trust the files: model.save_pretrained(folder) writes safetensors."
        raise UserError(problem(str(folder), f"must hold {WEIGHTS} or {INDEX}", got, fix))
    problems = []
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                file.keys()
        except FileNotFoundError:
            problems.append(problem(str(folder / name), "the index asks for it", "no such file", "Download it again."))
        except (SafetensorError, OSError) as error:
            wanted = "must be a whole safetensors file"
            problems.append(problem(str(folder / name), wanted, str(error), "Download or save it again."))
    if problems:
        raise UserError(*problems)


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError(problem(str(index), "must be JSON with a weight_map", got, "Save the model again.")) from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        wanted = "must name files in its own folder"
        raise UserError(problem(str(index), wanted, ", ".join(map(str, outside[:3])), "Do not use this model."))
    return names
