"""The laws of the repository, read from the source: who imports whom, what stands where, what every file has."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from qat import config as schema
from qat.cli.compose import compose_run
from qat.cli.compose_sweep import compose_sweep
from qat.cli.main import VERBS, main
from qat.cli.quantize import as_overrides
from qat.scheme import QuantSpec
from qat.stage_config import PhaseConfig, StageConfig
from qat.sweep import config as sweep

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "qat").rglob("*.py"))
SCRIPTS, TESTS = (sorted((ROOT / folder).glob("*.py")) for folder in ("scripts", "tests"))


def named(names: str) -> set[str]:
    return set(names.split())


# Room -> the rooms it uses. A room may only use rooms that stand above it; a new arrow is a decision, made here.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "ranks": set(),
    "signals": {"ranks"},
    "progress": {"signals"},
    "memory": set(),
    "paths": {"errors"},
    "scheme": {"errors"},
    "stage_config": set(),
    "config": {"errors", "scheme", "stage_config"},
    "stage_checks": {"errors", "config", "stage_config"},
    "checks": {"errors", "config", "stage_checks"},
    "scaling": {"config", "stage_config"},
    "metrics": {"errors", "progress", "paths"},
    "report": {"errors"},
    "grid": {"scheme"},
    "estimators": {"scheme", "grid"},
    "packing": {"errors", "scheme", "grid"},
    "observers": {"errors", "ranks", "scheme", "grid"},
    "kernels": {"errors", "scheme", "grid", "packing"},
    # fake_quant -> kernels: one place decides between the fused ops and the plain code of estimators.py
    "fake_quant": {"errors", "scheme", "grid", "estimators", "observers", "kernels"},
    "nn": {"errors", "scheme", "grid", "estimators", "packing", "fake_quant", "kernels"},
    "insert": {"errors", "scheme", "estimators", "fake_quant", "nn"},
    "ptq": {"errors", "progress", "scheme", "grid", "packing", "observers", "nn", "insert"},
    "formats": {"errors", "scheme", "grid", "packing"},
    "convert": {"errors", "signals", "scheme", "grid", "packing", "nn", "insert", "formats"},
    "model_files": {"errors"},
    "models": {"errors", "paths", "config", "model_files"},
    "data": {"errors", "paths", "config"},
    "evaluate": {"progress", "models"},
    "sensitivity": {"errors", "progress", "paths", "scheme", "grid", "observers", "insert", "models"},
    "serve": {"errors", "config", "progress", "kernels", "nn", "formats", "models"},
    "checkpoints": {"errors", "ranks", "paths"},
    "train": named("errors ranks signals progress memory metrics fake_quant nn models data checkpoints"),
    "checkpoint": {"errors", "paths", "checkpoints"},
    "run_folder": {"errors", "progress", "paths", "config"},
    "cluster": {"errors", "paths", "config"},
    "export": {"paths", "config", "report", "formats"},
    "sweep": {"errors", "progress", "paths", "config", "report", "cluster"},
    "build": named("ranks memory config checks metrics nn insert ptq models train stage_config"),
    "stages": named("ranks progress config metrics data evaluate checkpoints train checkpoint run_folder build"),
    "pipeline": named(
        "errors ranks signals progress memory paths config stage_config report insert convert data evaluate train "
        "checkpoint run_folder export build stages"
    ),
    "verify": named("errors paths config formats convert models data evaluate serve export build pipeline"),
    "cli": named(
        "errors signals progress memory paths config checks scaling report estimators observers kernels insert ptq "
        "formats convert models data evaluate sensitivity serve checkpoint run_folder cluster export sweep build "
        "pipeline verify"
    ),
}
# Arrows that no later table may draw.
NEVER = [("kernels", "nn"), ("kernels", "train"), ("train", "formats"), ("formats", "train"), ("serve", "train")]

# Package -> the only places that may import it.
ONLY_IN = {
    **{name: {"qat/cli", "scripts"} for name in ("hydra", "omegaconf")},
    "lightning": {"qat/train"},
    "triton": {"qat/kernels/triton"},
    "wandb": {"qat/metrics.py"},
    "datasets": {"qat/data.py"},
    "optuna": {"qat/sweep/study.py"},
    "matplotlib": {"qat/report"},
    "transformers": named(
        "qat/models.py qat/data.py qat/nn/kv.py qat/export.py qat/serve/stock.py qat/serve/rotary.py scripts"
    ),
    "gguf": {"qat/models.py", "scripts/random_gguf.py"},
    "submitit": {"qat/cluster/submit.py"},
    **{name: {"qat/serve/server.py"} for name in ("starlette", "uvicorn", "prometheus_client")},
    "pickle": set(),
}

FORBIDDEN_WORDS = ("Manager", "Handler", "Proxy", "Helper", "Wrapper", "Impl", "Mixin", "Quantizer")
NUMERIC_ROOMS = named("grid estimators packing kernels/reference nn/ ptq/ train/losses evaluate/ observers/")
# torch and Lightning say what these do; only our own reason for a layer is told, in the class.
FRAMEWORK_METHODS = re.compile(r"forward|backward|extra_repr|training_step|on_\w+")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported anywhere in a file; `from a import b` gives `a.b`."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(file)}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room(file: Path) -> str:
    inside = file.relative_to(ROOT / "qat")
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def test_every_file_has_a_room_in_the_table():
    rooms = {room(file) for file in SOURCES} - {"__init__"}
    assert rooms == set(MAY_IMPORT)


def test_table_of_rooms_points_one_way():
    order = list(MAY_IMPORT)
    for user, used in MAY_IMPORT.items():
        assert all(order.index(name) < order.index(user) for name in used), user
    assert not any(used in MAY_IMPORT[user] for user, used in NEVER)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_room_imports_only_what_the_table_allows(name):
    wrong, seen = [], set()
    for file in SOURCES:
        if room(file) != name:
            continue
        for line, target in imports(file):
            parts = target.split(".")
            if parts[0] != "qat" or parts[1] in (name, "__version__"):
                continue
            seen.add(parts[1])
            if parts[1] not in MAY_IMPORT[name]:
                wrong.append(f"{relative(file)}:{line} imports {target}")
    assert not wrong
    assert seen == MAY_IMPORT[name], "the table allows an arrow that nobody needs"


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_imported_only_where_it_belongs(package):
    places = ONLY_IN[package]
    found = {
        relative(file) for file in [*SOURCES, *SCRIPTS] for _, name in imports(file) if name.split(".")[0] == package
    }
    assert all(any(file == place or file.startswith(f"{place}/") for place in places) for file in found), found


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("qat", ("torch", "numpy", "transformers")),
        ("qat.cli.main", ("torch", "hydra", "omegaconf", "transformers")),
        ("qat.cli.compose_sweep, qat.sweep.driver, qat.report.sweep", ("torch", "transformers", "optuna")),
        ("qat.serve.load", ("hydra", "omegaconf", "datasets", "matplotlib", "qat.train")),
    ],
)
def test_import_leaves_out_what_it_does_not_need(module, heavy):
    banned = (*heavy, "lightning", "wandb", "datasets", "matplotlib")
    code = f"import sys, {module}\nprint([name for name in {banned!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_the_grid_rounds():
    """`torch.round`, `x.round()` and `x.round_()`; Python's round() on a plain number is no rounding of tensors."""
    names = {"round", "round_", "floor", "ceil", "trunc", "fix", "rint", "fake_quantize_per_tensor_affine"}
    # floor and ceil of math are plain numbers too
    found = {
        f"{relative(file)}:{node.lineno}"
        for file in SOURCES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Attribute)
        and node.attr in names
        and not (isinstance(node.value, ast.Name) and node.value.id == "math")
    }
    assert found
    assert {place.rpartition(":")[0] for place in found} == {"qat/grid.py"}, found


def test_nothing_is_unpickled():
    for file in [*SOURCES, *SCRIPTS, *TESTS]:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert options.get("weights_only") == "True", f"{relative(file)}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.save":
                assert file in TESTS, f"{relative(file)}:{node.lineno}: safetensors only"


@pytest.mark.parametrize("file", [*SOURCES, *SCRIPTS, *TESTS], ids=relative)
def test_file_is_short_and_well_named(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
    assert file.name not in ("utils.py", "helpers.py", "common.py", "misc.py")
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ClassDef):
            assert not any(word in node.name for word in FORBIDDEN_WORDS), node.name


def public(file: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Every public function and class of a file, and the public methods of its public classes."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, f"{prefix}{node.name}.")

    yield from visit(parsed(file).body, "")


@cache
def classes() -> dict[str, ast.ClassDef]:
    nodes = [node for file in SOURCES for node in ast.walk(parsed(file)) if isinstance(node, ast.ClassDef)]
    return {node.name: node for node in nodes}


def is_inherited(owner: ast.ClassDef, method: str) -> bool:
    bases = [classes()[name] for base in owner.bases if (name := ast.unparse(base)) in classes()]
    return any(
        is_inherited(base, method) or any(getattr(part, "name", None) == method for part in base.body) for base in bases
    )


def is_told_elsewhere(file: Path, name: str) -> bool:
    """Methods whose meaning the framework, or the base class in this repository, gives."""
    owner, _, method = name.rpartition(".")
    if not owner:
        return False
    if FRAMEWORK_METHODS.fullmatch(method):
        return True
    node = next(node for other, node in public(file) if other == owner)
    return isinstance(node, ast.ClassDef) and is_inherited(node, method)


@pytest.mark.parametrize("file", [file for file in SOURCES if file.read_text().strip()], ids=relative)
def test_public_things_have_docstrings_and_tensors_have_shapes(file):
    assert ast.get_docstring(parsed(file)), "the module says what it is"
    silent, shapeless = [], []
    numeric = relative(file).startswith(tuple(f"qat/{name}" for name in NUMERIC_ROOMS))
    for name, node in public(file):
        if is_told_elsewhere(file, name) or (file.name == "config.py" and isinstance(node, ast.ClassDef)):
            continue
        text = ast.get_docstring(node)
        if not text:
            silent.append(name)
        elif numeric and isinstance(node, ast.FunctionDef) and "[" not in text:
            notes = [a.annotation for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation]
            notes += [node.returns] if node.returns else []
            if any(
                isinstance(part, ast.Name) and part.id in ("Tensor", "QParams") for n in notes for part in ast.walk(n)
            ):
                shapeless.append(name)
    assert (silent, shapeless) == ([], [])


def config_classes() -> list[ast.ClassDef]:
    files = ("qat/config.py", "qat/stage_config.py", "qat/sweep/config.py")
    return [node for file in files for node in parsed(ROOT / file).body if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("node", config_classes(), ids=lambda node: node.name)
def test_config_field_has_a_line_of_its_own(node):
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        is_group = ast.unparse(field.annotation).endswith("Config") and node.name == "RunConfig"
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        assert is_group or is_text, f"{node.name}.{ast.unparse(field.target)}"


@cache
def attributes_read() -> set[tuple[str, str]]:
    """(what stands before the dot, attribute), such as (trainer, threads) for `config.trainer.threads`.

    A value that checks refuse or let pass is not used by that.
    """
    found = set()
    for file in (file for file in SOURCES if not file.name.endswith("checks.py")):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add((ast.unparse(node.value).rpartition(".")[2], node.attr))
    return found


def test_every_option_is_read_somewhere():
    # read as a whole: QuantSpec(**vars(config))
    grid_fields = {field.name for field in dataclasses.fields(QuantSpec)}
    assert {field.name for field in dataclasses.fields(schema.SpecConfig)} <= grid_fields
    groups = {field.name: field.default_factory for field in dataclasses.fields(schema.RunConfig)}
    elements = {"rule": schema.RuleConfig, "entry": PhaseConfig, "stage": StageConfig}
    elements |= {"config": schema.RunConfig, "parameter": sweep.ParameterConfig, "objective": sweep.ObjectiveConfig}
    elements |= {"pruning": sweep.PruningConfig, "self.config": sweep.SweepConfig}
    unread = [
        f"{before}.{field.name}"
        for before, group in {**groups, **elements}.items()
        if isinstance(group, type)
        for field in dataclasses.fields(group)
        if not {(before, field.name), ("config", field.name)} & attributes_read()
    ]
    assert unread == []


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_module_reads_no_environment_and_probes_no_device_when_imported(file):
    """Statements that run on import: everything outside functions, and default values and decorators of those."""

    def on_import(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield from (part for default in child.args.defaults for part in ast.walk(default))
                continue
            if not isinstance(child, ast.Lambda):
                yield child
                yield from on_import(child)

    probes = {"environ", "getenv", "is_available", "device_count", "cpu_count", "set_num_threads", "exists", "is_file"}
    found = {node.attr for node in on_import(parsed(file)) if isinstance(node, ast.Attribute)} & probes
    assert not found


def test_yaml_builds_no_objects():
    for file in [*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("recipes/*.yaml")]:
        assert "_target_" not in file.read_text(), relative(file)
        yaml.safe_load(file.read_text())


def commands(file: Path) -> list[str]:
    """The lines of the fenced blocks of a Markdown file that start a program, line continuations joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"(make|qat|torchrun)\b", line)]


COMMANDS = [(name, line) for name in ("README.md", "recipes/README.md") for line in commands(ROOT / name)]


def test_readme_shows_the_two_commands():
    assert {"make quickstart", "make test"} <= {line for _, line in COMMANDS}
    assert any(line.startswith("qat train") for _, line in COMMANDS)


@pytest.mark.parametrize(("file", "line"), COMMANDS)
def test_command_of_a_readme_can_be_typed(file, line):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] == "torchrun":
        words = words[words.index("qat.cli.main") :]
    assert words[1] in VERBS
    overrides = [word for word in words[2:] if re.match(r"\+?[\w.]+=", word)]
    if words[1] in ("train", "plan", "submit", "sensitivity"):
        paths = [] if any("recipe=" in word for word in overrides) else ["model.path=m", "data.path=d"]
        given = {word.split("=")[0] for word in overrides}
        assert compose_run([*overrides, *(path for path in paths if path.split("=")[0] not in given)])
    elif words[1] in ("sweep", "quantize"):
        assert compose_sweep(overrides) if words[1] == "sweep" else compose_run(as_overrides(words[2], words[3:]))
    else:
        assert not overrides or words[1] == "evaluate"
    assert words[1] != "ls" or main(words[1:]) == 0


def test_makefile_names_no_phony_target_without_a_rule():
    text = (ROOT / "Makefile").read_text()
    phony, targets = (re.findall(rule, text, re.MULTILINE) for rule in (r"^\.PHONY:(.*)$", r"^([\w-]+):"))
    assert named(" ".join(phony)) <= set(targets)
