"""conf/ and the command line: every shipped YAML composes, every mistake is named before torch is imported."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qat.cli import compose
from qat.cli.compose import compose_run, from_yaml, to_yaml
from qat.cli.groups import SWEEP, list_group
from qat.config import SpecConfig, conf_dir, load_scheme, scheme_from
from qat.errors import UserError
from qat.scheme import QuantSpec
from qat.stage_config import PhaseConfig

PATHS = ["model.path=m", "data.path=d"]
OPTIONS = sorted((file.parent.name, file.stem) for file in conf_dir().glob("*/*.yaml") if file.parent.name != SWEEP)
SCHEMES = sorted(file.stem for file in (conf_dir() / "scheme").glob("*.yaml"))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes_with_the_primary_config(group, option):
    run = compose_run([f"{group}={option}", *PATHS])
    for name, value in yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text()).items():
        if name not in ("path", "schedule", "defaults", "rules") and not isinstance(value, dict):
            assert getattr(getattr(run, group), name) == value


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_has_a_description_and_holds_values_only(group, option):
    text = (conf_dir() / group / f"{option}.yaml").read_text()
    assert len(dict(list_group(group))[option]) > 10
    assert "_target_" not in text
    assert "trust_remote_code" not in text


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_is_what_its_name_says(name):
    read = re.fullmatch(r"w(\d)a(\d+)(?:_g(\d+)|_row)?(_asym|_static)?", name)
    assert read
    weight_bits, input_bits, size, tail = read.groups()
    scheme = load_scheme(name)
    assert scheme.name == name
    assert scheme.weight == QuantSpec(
        bits=int(weight_bits),
        symmetric=tail != "_asym",
        granularity="group" if size else "channel",
        group_size=int(size) if size else None,
    )
    if input_bits == "16":
        assert scheme.input is None
    elif tail == "_static":
        assert scheme.input == QuantSpec(int(input_bits), granularity="tensor", is_activation=True)
    else:
        assert scheme.input == QuantSpec(
            int(input_bits), granularity="token", dynamic=True, scale_dtype="float32", is_activation=True
        )


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_read_alone_equals_the_composed_one(name):
    assert scheme_from(compose_run([f"scheme={name}", *PATHS]).scheme) == load_scheme(name)


def test_primary_config_chooses_one_option_of_every_group():
    defaults = yaml.safe_load((conf_dir() / "train.yaml").read_text())["defaults"]
    chosen = {group for entry in defaults if isinstance(entry, dict) for group in entry}
    assert chosen == {group for group, _ in OPTIONS} | {"recipes"}


def test_run_keeps_what_the_command_line_sets():
    run = compose_run(["scheme=w8a8", "+trainer.max_steps=7", "phases.schedule.0.at=3", "trainer.threads=2", *PATHS])
    assert (run.scheme.name, run.trainer.max_steps, run.trainer.threads) == ("w8a8", 7, 2)
    assert run.phases.schedule == [PhaseConfig(3, "fake_quantize")]


def test_input_grid_is_built_from_single_keys_when_the_scheme_has_none():
    keys = ["scheme.input.bits=8", "scheme.input.granularity=token", "scheme.input.dynamic=true"]
    assert compose_run([*keys, *PATHS]).scheme.input == SpecConfig(8, True, "token", None, True)


WRONG = {
    "scheme=w4a16_g31": r"^scheme: must be a file in conf/scheme, got 'w4a16_g31'. Did you mean 'w4a16_g32'\?$",
    "scheme=[w8a8]": r"^scheme: must be the name of one option",
    "scheme=null": r"^scheme: must be the name of one option, got None",
    "model=/some/folder": r"For a path write model.path=/some/folder\.",
    "recipe=tiney": r"^recipes: must be a file in recipes, got 'tiney'. Did you mean 'tiny'\?",
    "recipe=no/such.yaml": r"^no/such.yaml: must be a readable YAML file, got No such file",
    "scheme.weight.bit=8": r"^scheme.weight.bit: .*unknown key. Did you mean 'scheme.weight.bits'\?",
    "trainer.max_stpes=3": r"Did you mean 'trainer.max_steps'\?",
    "max_steps=3": r"Did you mean 'trainer.max_steps'\?",
    "+optim.momentum=3": r"^optim.momentum: must be a setting, got an unknown key",
    "++optim.momentum=3": r"^optim.momentum: must be a setting, got an unknown key",
    "hydra.run.dir=../..": r"^hydra.run.dir: must be a setting",
    "scheme@kv=w8a8": r"^scheme@kv: must be a setting",
    "name.x=3": r"'name' is a single value",
    "+model._target_=os.system": r"^model._target_: .*holds values only",
    "plan.rules=[{match: x, shceme: keep}]": r"^plan.rules.0.shceme: .*Did you mean 'plan.rules.0.scheme'\?",
    "scheme.weight.bits=four": r"^scheme.weight.bits: must be a whole number, got 'four'",
    "trainer.threads=x": r"^trainer.threads: must be a whole number or null, got 'x'",
    "optim.lr=fast": r"^optim.lr: must be a number, got 'fast'",
    "evaluate.baselines=perhaps": r"^evaluate.baselines: must be true or false",
    "optim.betas=[a,b]": r"^optim.betas.0: must be a number",
    "model.path=${nope}": r"^model.path: must resolve, got 'Interpolation key 'nope' not found'",
    "name=a,b": r"^name=a,b: must set one value",
    "~kv": r"^~kv: must set one value",
    "train": r"^train: must read key=value",
    "data.path=(a)": r"put quotes around a value",
    "optim.lr=-1": r"^optim.lr: must be finite and above 0, got -1",
}


@pytest.mark.parametrize("override", WRONG)
def test_compose_refuses_a_mistake(override):
    # the paths come first, so that the mistake is never a second setting of the same key with a warning
    with pytest.raises(UserError, match=WRONG[override]) as caught:
        compose_run([*(path for path in PATHS if path.split("=")[0] not in override), override])
    assert caught.value.before_work


def test_compose_refuses_a_run_without_its_paths():
    with pytest.raises(UserError, match="must be given, got nothing") as caught:
        compose_run([])
    assert [line.split(":")[0] for line in caught.value.problems] == ["data.path", "model.path"]


def test_compose_names_all_mistakes_at_once():
    with pytest.raises(UserError, match="max_stpes") as caught:
        compose_run(["trainer.max_stpes=3", "scheme=w9", "bits=4"])
    assert len(caught.value.problems) == 3


def test_compose_names_mistakes_of_every_kind_at_once(tmp_path):
    """Unknown keys and options, wrong types, values out of range: in the recipe and on the command line, in one go."""
    (tmp_path / "own.yaml").write_text("trainer: {max_stpes: 3}\n")
    words = ["optim.lr=-1", "scheme=w9", "trainer.max_steps=few", "bits=4", "kv.bits=1", "data.block_size=2"]
    with pytest.raises(UserError, match="max_stpes") as caught:
        compose_run([f"recipe={tmp_path / 'own.yaml'}", *words])
    where = sorted(line.partition(":")[0] for line in caught.value.problems)
    own = str(tmp_path / "own.yaml")
    assert where == sorted([own, "bits", "data.block_size", "kv.bits", "optim.lr", "scheme", "trainer.max_steps"])


def test_last_of_two_settings_counts_with_a_warning(capsys):
    assert compose_run(["seed=1", *PATHS, "seed=2"]).seed == 2
    assert capsys.readouterr().err == "warning: seed is given twice, seed=1 and seed=2; the last one counts.\n"
    assert compose_run(["kv=kv8", "kv=kv4", *PATHS]).kv.bits == 4
    assert "kv=kv8 and kv=kv4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name: w8a16\nweight: {bits: [8\n", r"scheme/w8a16.yaml:\d+: must be YAML"),
        ("name: w8a16\nweight: {bit: 8}\n", r"scheme.weight.bit: must be a setting, got an unknown key. Did you mean"),
        ("name: w8a16\nweight: {bits: x}\n", r"scheme.weight.bits: must be a whole number"),
    ],
)
def test_compose_refuses_a_spoiled_group_file(tmp_path, monkeypatch, text, match):
    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "conf/scheme/w8a16.yaml").write_text(text)
    monkeypatch.setattr(compose, "conf_dir", lambda: tmp_path / "conf")
    monkeypatch.setattr(compose, "recipes_dir", lambda: tmp_path / "recipes")
    with pytest.raises(UserError, match=match):
        compose_run(["scheme=w8a16", *PATHS])


def test_command_that_is_refused_has_not_met_torch(tmp_path):
    """The whole of `qat train`, which a mistake must not cost more than the import of Hydra."""
    code = (
        "import sys\n"
        "from qat.cli.main import main\n"
        "code = main(['train', 'trainer.max_stpes=3', 'optim.lr=-1', 'scheme=w9'])\n"
        "heavy = ('torch', 'numpy', 'transformers', 'lightning', 'datasets', 'matplotlib')\n"
        "print(code, [m for m in heavy if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
    assert len(done.stderr.splitlines()) == 3
    assert not list(tmp_path.iterdir())


def test_mistake_is_reported_without_importing_the_trainer():
    code = (
        "import sys\n"
        "from qat.cli.compose import compose_run\nfrom qat.cli.groups import SWEEP, list_group\n"
        "from qat.errors import UserError\n"
        "list_group('schemes')\n"
        "for bad in ('scheme.weight.bit=8', 'optim.lr=-1'):\n"
        "    try: compose_run(['model.path=m', 'data.path=d', bad])\n"
        "    except UserError as error: print(error)\n"
        "print([m for m in ('torch', 'transformers', 'lightning', 'datasets') if m in sys.modules])\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("scheme.weight.bit:")
    assert lines[1].startswith("optim.lr:")
    assert lines[2:] == ["[]"]


def test_run_survives_yaml(tmp_path):
    run = compose_run(["scheme=w8a8", "phases=progressive", "kv=kv8", "export.prompts=['a: b','off']", *PATHS])
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert from_yaml(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("max_steps: 100", "max_step: 100"), r"resolved.yaml: trainer.max_step: .*Did you mean 'trainer.max_steps'\?"),
        (("max_steps: 100", "max_steps: 0"), r"^trainer.max_steps: only a ptq method needs no training, got 0"),
        (("max_steps: 100", "max_steps: [1"), r"resolved.yaml:\d+: must be YAML"),
        (("seed: 0", "defaults: []"), r"must be a whole run, as resolved.yaml is, got a recipe"),
    ],
)
def test_from_yaml_refuses_a_spoiled_file(tmp_path, change, match):
    text = to_yaml(compose_run(PATHS))
    assert text.count(change[0]) == 1
    (tmp_path / "resolved.yaml").write_text(text.replace(*change))
    with pytest.raises(UserError, match=match):
        from_yaml(tmp_path / "resolved.yaml")


def test_list_group_refuses_an_unknown_group():
    assert list_group("models") == list_group("model")
    assert dict(list_group("recipes"))["tiny"].startswith("The whole path")
    with pytest.raises(UserError, match=r"'shceme'. Did you mean 'scheme'\?"):
        list_group("shceme")
