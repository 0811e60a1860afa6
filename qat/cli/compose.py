"""Command line and YAML -> RunConfig. With the scripts, the only place that knows Hydra and OmegaConf.

    overrides --Hydra--> groups and recipe composed --> values set one by one --> schema --> check --> RunConfig

Everything wrong is reported at once, in the project's error form, well under a second and before torch is imported.
Ranges and checks across fields are in `checks.py`. Objects are built from the result in `build.py`, never from YAML.
"""

from __future__ import annotations

import copy
import io
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from qat.checks import check
from qat.cli.groups import RECIPES, groups, options
from qat.config import RunConfig, conf_dir, recipes_dir
from qat.errors import UserError, nearest, problem

if TYPE_CHECKING:
    import yaml
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
OWN = "own_file"  # stands for what a file of the user's own says
TYPES: dict[Any, tuple[str, str]] = {
    int: ("must be a whole number", "Write digits, such as 4."),
    float: ("must be a number", "Write it as 0.1 or 1e-4."),
    bool: ("must be true or false", "Write true or false."),
    str: ("must be text", "Put quotes around it."),
    list: ("must be a list", "Write [a,b]."),
}
VALUES_ONLY = "A configuration holds values only; no object is built from a name in it."


def compose_run(
    overrides: list[str], more: dict[str, Any] | None = None, composed: dict[str, DictConfig] | None = None
) -> RunConfig:
    """The checked run that `overrides` describe: `group=option`, `recipe` or `plan=NAME or FILE.yaml`, `key=value`.

    The last of several settings of one key counts, with a warning on stderr. `more` holds further settings as values;
    they win. `composed` keeps what Hydra made of a choice of groups, for callers that compose many runs at once.

    Raises:
        UserError: every problem found, before any work.
    """
    given, problems = read_overrides(overrides)
    given |= more or {}
    choices = {key: value for key, value in given.items() if key in groups()}
    own = {group: Path(choices[group]) for group in (RECIPES, "plan") if is_file_name(choices.get(group))}
    wrong = {group: option_problems(group, option) for group, option in choices.items() if group not in own}
    contents: dict[str, Any] = {}
    for group, file in own.items():
        contents[group], wrong[group] = read_yaml(file, place="" if group == RECIPES else f"{group}.")
    if RECIPES in choices and RECIPES not in own and not wrong[RECIPES]:
        wrong[RECIPES] = read_yaml(recipes_dir() / f"{choices[RECIPES]}.yaml")[1]
    problems += [line for lines in wrong.values() for line in lines]
    choices |= dict.fromkeys(own, OWN)
    values = {key: value for key, value in given.items() if key not in choices}
    readable = {group: option for group, option in choices.items() if not wrong.get(group)}
    return complete(readable, contents, values, problems, {} if composed is None else composed)


def complete(
    choices: dict[str, Any],
    contents: dict[str, Any],
    values: dict[str, Any],
    before: list[str],
    composed: dict[str, DictConfig],
) -> RunConfig:
    """The checked run of readable groups and values; UserError with the problems from `before` and all further ones.

    After a problem the rest may be wrong for that reason alone: then only what is wrong with a given value is told.
    """
    problems = list(before)
    groups_key = str((sorted(choices.items()), contents))
    try:
        if groups_key not in composed:
            composed[groups_key] = compose_groups(choices, contents)
        config = copy.deepcopy(composed[groups_key])
        problems += [line for key, value in values.items() for line in set_value(config, key, value)]
        run = settle(config)
    except UserError as error:
        given = tuple(key + end for key in values for end in (":", "."))
        own = [line for line in error.problems if line.startswith(given)]
        raise UserError(*problems, *(own if problems else error.problems)) from None
    if problems:
        raise UserError(*problems)
    return run


def from_yaml(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run written by `to_yaml`, with some `dotted.key=value` set anew; UserError as `compose_run`."""
    from omegaconf import OmegaConf

    content, problems = read_yaml(Path(path))
    if "defaults" in content:
        problems.append(
            problem(str(path), "must be a whole run, as resolved.yaml is", "a recipe", f"Use recipe={path}.")
        )
    if problems:
        raise UserError(*problems)
    config = cast("DictConfig", OmegaConf.merge(OmegaConf.structured(RunConfig), content))
    given, problems = read_overrides(list(overrides))
    for key, value in given.items():
        problems += set_value(config, key, value)
    if problems:
        raise UserError(*problems)
    return settle(config)


def to_yaml(config: RunConfig) -> str:
    """Every value of the run, defaults included, as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def is_file_name(option: object) -> bool:
    """Whether `recipe=` or `plan=` names a file of the user's own rather than a shipped one."""
    return isinstance(option, str) and ("/" in option or option.endswith((".yaml", ".yml")))


def read_overrides(overrides: list[str], schema: type = RunConfig) -> tuple[dict[str, Any], list[str]]:
    """Key -> value in the order given, and a line for everything that cannot be read or is not a known key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    problems = []
    for text in overrides:
        value: Any
        key, _, value = text.partition("=")
        # A file name may hold what Hydra's grammar cannot
        if key in ("recipe", RECIPES) or (key == "plan" and is_file_name(value)):
            key = "plan" if key == "plan" else RECIPES
        else:
            try:
                override = parser.parse_override(text)
            except HydraException:
                fix = "Write key=value, and put quotes around a value with signs in it: 'key=\"value\"'."
                problems.append(problem(text, "must read key=value", "something else", fix))
                continue
            key = override.get_key_element().lstrip("+")
            if override.is_delete() or override.is_sweep_override():
                fix = "Use key=null to unset, quotes around a value with commas, [a,b] for a list."
                problems.append(problem(text, "must set one value", "a deletion or several values", fix))
                continue
            value = override.value()
            found, hint = find(key, schema)
            if found is None:
                problems.append(problem(key, "must be a setting", "an unknown key", hint))
                continue
        if key in texts:
            print(f"warning: {key} is given twice, {texts[key]} and {text}; the last one counts.", file=sys.stderr)
            del values[key]
        texts[key], values[key] = text, value
    return values, problems


def find(key: str, schema: type = RunConfig) -> tuple[Any, str]:
    """The type of a dotted key in the schema, or None and a hint at the nearest known key."""
    if key == RECIPES:
        return str, ""
    here: Any = schema
    parts = key.split(".")
    for i, part in enumerate(parts):
        here = without_none(here)
        if get_origin(here) is list and part.isdigit():
            here = get_args(here)[0]
            continue
        known = get_type_hints(here) if is_dataclass(here) else {}
        if part not in known:
            return None, VALUES_ONLY if part == "_target_" else hint_for(parts[:i], part, list(known), schema)
        here = known[part]
    return here, ""


def hint_for(path: list[str], part: str, siblings: list[str], schema: type) -> str:
    """The same name elsewhere in the schema, else the nearest name at this place."""
    prefix = "".join(f"{name}." for name in path)
    elsewhere = [key for key in all_keys(schema, "") if key.endswith(f".{part}")]
    if elsewhere:
        return f"Did you mean '{next((key for key in elsewhere if key.startswith(prefix)), elsewhere[0])}'?"
    if not siblings:
        return f"'{prefix[:-1]}' is a single value."
    return nearest(prefix + part, [prefix + name for name in siblings])


def all_keys(schema: Any, prefix: str) -> list[str]:
    """Every dotted key of a dataclass and of those inside it."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        inner = without_none(hint)
        keys += all_keys(inner, f"{prefix}{name}.") if is_dataclass(inner) else [prefix + name]
    return keys


def without_none(hint: Any) -> Any:
    """T of `T | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(inner for inner in get_args(hint) if inner is not type(None))
    return hint


def option_problems(group: str, option: Any) -> list[str]:
    """A line when the group has no such option."""
    known = [file.stem for file in options(group)]
    if isinstance(option, dict | list) or option is None:
        return [problem(group, "must be the name of one option", option, f"Known: {', '.join(known)}.")]
    if str(option) in known:
        return []
    has_path = "/" in str(option) and f"{group}.path" in all_keys(RunConfig, "")
    fix = f"For a path write {group}.path={option}." if has_path else nearest(str(option), known)
    return [problem(group, f"must be a file in {'' if group == RECIPES else 'conf/'}{group}", f"'{option}'", fix)]


def read_yaml(file: Path, schema: type = RunConfig, place: str = "") -> tuple[dict[str, Any], list[str]]:
    """A file's content, and a line for every key or value in it that does not fit the schema at `place`."""
    import yaml
    from omegaconf import OmegaConf

    try:
        text = file.read_bytes().decode("utf-8-sig")
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except yaml.MarkedYAMLError as error:
        return {}, [yaml_problem(error, str(file))]
    except OSError as error:
        return {}, [problem(str(file), "must be a readable YAML file", error.strerror or error, "Check the path.")]
    except UnicodeDecodeError as error:
        where = f"{file}:{error.object.count(10, 0, error.start) + 1}"
        return {}, [problem(where, "must be UTF-8", f"byte 0x{error.object[error.start]:02x}", "Save it as UTF-8.")]
    except (yaml.YAMLError, RecursionError) as error:  # a control character, or brackets without end
        fix = "Write it as text, with few levels."
        return {}, [problem(str(file), "must be YAML", getattr(error, "reason", "too many levels"), fix)]
    if not isinstance(content, dict) or not content:
        given = "nothing" if content == {} else "something else"
        return {}, [problem(str(file), "must hold key: value lines", given, "See recipes/tiny.yaml.")]
    scratch = OmegaConf.structured(schema)
    problems = []
    for key, value in leaves({k: v for k, v in content.items() if k != "defaults"}, place):
        problems += set_value(scratch, key, value, f"{file}: ", schema)
    return cast("dict[str, Any]", content), problems


def leaves(content: dict, prefix: str) -> list[tuple[str, Any]]:
    """Dotted key and value of everything in nested dictionaries; a list is one value."""
    found = []
    for name, value in content.items():
        found += (
            leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(f"{prefix}{name}", value)]
        )
    return found


def unknown_keys(key: str, value: Any, schema: type) -> list[str]:
    """Every dotted key in `key: value` that the schema has not, inside lists too."""
    if find(key, schema)[0] is None:
        return [key]
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [
        bad
        for name, part in parts
        if isinstance(part, dict | list) or isinstance(value, dict)
        for bad in unknown_keys(f"{key}.{name}", part, schema)
    ]


def set_value(config: DictConfig, key: str, value: Any, file: str = "", schema: type = RunConfig) -> list[str]:
    """Set one dotted key; a line for whatever prevents it, naming the `file` the value came from."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    unknown = unknown_keys(key, value, schema)
    if unknown:
        return [problem(f"{file}{bad}", "must be a setting", "an unknown key", find(bad, schema)[1]) for bad in unknown]
    try:
        if any(part.isdigit() for part in key.split(".")):
            OmegaConf.update(config, key, value)
        else:
            nested = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            config.merge_with(nested)
    except OmegaConfBaseException as error:
        return [misfit(key, value, error, file, schema)]
    return []


def misfit(key: str, value: Any, error: OmegaConfBaseException, file: str = "", schema: type = RunConfig) -> str:
    """A line for a known key whose value has the wrong type."""
    exact = re.sub(r"\[(\d+)\]", r".\1", error.full_key or key)
    hint = find(exact, schema)[0] or find(key, schema)[0]
    inner = without_none(hint)
    wanted, fix = TYPES.get(get_origin(inner) or inner, ("must be a group of settings", f"Set {exact}.FIELD=VALUE."))
    if exact in groups():
        fix = f"To choose an option inside a recipe, write `- override /{exact}: NAME` under defaults."
    return problem(f"{file}{exact}", wanted + (" or null" if inner is not hint else ""), f"'{value}'", fix)


def yaml_problem(error: yaml.MarkedYAMLError, file: str) -> str:
    """A line for a file that is no YAML."""
    mark = error.problem_mark
    where = f"{file}:{mark.line + 1}" if mark else file
    return problem(
        where, "must be YAML", error.problem or "something else", "Check the indentation, colons and quotes."
    )


def compose_groups(choices: dict[str, Any], own: dict[str, Any]) -> DictConfig:
    """Hydra's composition of train.yaml with one option for each group, the recipe last; `own` are users' files."""
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for group in (group for group, name in choices.items() if name == OWN):
        store.store(group=group, name=OWN, node=own[group], package="_global_" if group == RECIPES else group)
    # Recipes are a group too, but stand outside conf
    folder = str(recipes_dir().parent).replace("\\", "\\\\").replace('"', '\\"')
    overrides = [f'hydra.searchpath=["file://{folder}"]', *(f"{group}={name}" for group, name in choices.items())]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("train", overrides)
    except yaml.MarkedYAMLError as error:
        raise UserError(yaml_problem(error, getattr(error.problem_mark, "name", "conf"))) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(composition_problem(error)) from None


def composition_problem(error: Exception) -> str:
    """A line for what Hydra refused in a YAML file: an unknown option, an unknown key, or a wrong type."""
    from hydra.errors import MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    first, _, rest = str(error).replace(f"'{RECIPES}/{OWN}'", "the recipe").partition("\n")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        hint = nearest(name, list(error.options or []))
        return problem(group or "defaults", "must name an option that exists", f"'{name}'", hint)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    where = first.split(":")[0] + ": " if first.startswith("In ") else ""
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        return problem(f"{where}{cause.full_key}", "must be a setting", "an unknown key", find(cause.full_key)[1])
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and find(cause.full_key)[0]:
        return misfit(cause.full_key, rest.partition("\n")[0], cause, where)
    typo = re.search(r"Could not override '/?(\w+)'", first)
    fix = nearest(typo[1], groups()) if typo else "Write `- override /GROUP: NAME`, as recipes/tiny.yaml does."
    return problem("defaults", "must compose", f'"{first}"', fix)


def settle(config: Any) -> RunConfig:
    """The composed values through the schema once more, complete and checked."""
    run, missing = to_object(config, RunConfig)
    problems = missing + [line for line in check(run) if not line.startswith(tuple(missing_keys(missing)))]
    if problems:
        raise UserError(*problems)
    return run


def missing_keys(lines: list[str]) -> list[str]:
    """`key:` of each line about a missing key."""
    return [line.partition(":")[0] + ":" for line in lines]


def to_object(config: Any, schema: type[T]) -> tuple[T, list[str]]:
    """The `schema` that composed values fill, and a line for every value that is missing, which is `missing` then.

    Raises:
        UserError: something does not resolve.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(config))
        for key in missing:  # so that the others are checked too
            OmegaConf.update(config, re.sub(r"\[(\d+)\]", r".\1", key), "missing")
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
    except OmegaConfBaseException as error:
        first = str(error).partition("\n")[0]
        fix = "Refer to keys of the run only, such as ${name}."
        raise UserError(problem(error.full_key or "configuration", "must resolve", f"'{first}'", fix)) from None
    return cast("T", made), [problem(key, "must be given", "nothing", f"Add {key}=VALUE.") for key in missing]
