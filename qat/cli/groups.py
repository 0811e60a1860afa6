"""The groups of conf/ and the recipes: their names, their options, and what each option says of itself."""

from __future__ import annotations

from pathlib import Path

from qat.config import conf_dir, recipes_dir
from qat.errors import UserError, nearest, problem

RECIPES = "recipes"
SWEEP = "sweep"


def list_group(group: str) -> list[tuple[str, str]]:
    """Name and one-line description of every option of a group (`scheme`, or as people say it, `schemes`)."""
    known = [*groups(), SWEEP]
    singular = group if group in known else group.removesuffix("s")
    if singular not in known:
        raise UserError(problem("group", "must be a folder of conf", f"'{group}'", nearest(group, known)))
    return [(file.stem, first_comment(file)) for file in options(singular)]


def groups() -> list[str]:
    """The names of a run's groups: the folders of conf/ but for sweep, and recipes."""
    return [
        *sorted(folder.name for folder in conf_dir().iterdir() if folder.is_dir() and folder.name != SWEEP),
        RECIPES,
    ]


def options(group: str) -> list[Path]:
    """The YAML files of a group, by name."""
    return sorted((recipes_dir() if group == RECIPES else conf_dir() / group).glob("*.yaml"))


def first_comment(file: Path) -> str:
    """The first comment that is not Hydra's package line, which has to stand before it."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line), "")
