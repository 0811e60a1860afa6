"""conf/sweep and `qat sweep` before the first trial: shipped sweeps compose, every mistake is named."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
import yaml

from qat.cli.compose import from_yaml
from qat.cli.compose_sweep import compose_sweep
from qat.cli.groups import list_group
from qat.config import conf_dir
from qat.errors import UserError
from qat.sweep.config import ParameterConfig, SweepConfig, corners, grid
from qat.sweep.slurm import PROGRAMS
from qat.sweep.study import planned

PATHS = ["model.path=m", "data.path=d"]
SWEEPS = sorted(file.stem for file in (conf_dir() / "sweep").glob("*.yaml"))
GOOD = """
name: mine
space:
  - {key: scheme, values: [w4a16_g32, w8a16]}
  - {key: optim.lr, kind: float, low: 1e-5, high: 1e-3, log: true}
trials: 4
sampler: random
"""


@pytest.fixture
def sweep(tmp_path):
    """Writes a sweep of one's own and returns its override; `changes` replace text of GOOD."""

    def write(*changes: tuple[str, str], text: str = GOOD) -> str:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "mine.yaml").write_text(text)
        return f"sweep={tmp_path / 'mine.yaml'}"

    return write


@pytest.mark.parametrize("name", SWEEPS)
def test_shipped_sweep_composes_and_is_listed(name):
    plan = compose_sweep([f"sweep={name}", "recipe=tiny", "trainer.eval_every=1", *PATHS])
    assert plan.config.name == name
    assert plan.folder.as_posix() == f"runs/{name}"
    assert len(dict(list_group("sweeps"))[name]) > 10


def test_speed_of_decoding_is_a_metric_of_runs_that_measure_it(sweep):
    word = sweep(("sampler: random", "sampler: random\nrecord: [bits_per_weight, decode.tokens_per_second]"))
    with pytest.raises(UserError, match=r"needs evaluate\.decode_tokens above 0, got 0\. Add evaluate\.decode_tokens="):
        compose_sweep([word, "recipe=tiny", *PATHS])
    plan = compose_sweep([word, "recipe=tiny", "evaluate.decode_tokens=8", *PATHS])
    assert plan.base.evaluate.decode_tokens == 8


def test_trials_of_slurm_have_machines_of_their_own(sweep, tmp_path, monkeypatch):
    for name in PROGRAMS:
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [sweep(), "recipe=tiny", "sweep.parallel=2", *PATHS]
    assert compose_sweep(words).trial(0, {"scheme": "w8a16"})[0].trainer.threads is not None
    plan = compose_sweep([*words, "sweep.launcher=slurm", "cluster=slurm", "trainer=ddp", "trainer.nodes=2"])
    assert plan.trial(0, {"scheme": "w8a16"})[0].trainer.threads is None
    # the partition decides no number
    other = compose_sweep([*words, "sweep.launcher=slurm", "cluster=slurm", "cluster.partition=other"])
    assert "partition" not in other.identity()
    with pytest.raises(UserError, match=r"sweep\.launcher=slurm: needs cluster\.kind=slurm, got local"):
        compose_sweep([*words, "sweep.launcher=slurm"])


def test_sweeps_are_listed_by_the_command(qat):
    code, out, _ = qat("ls", "sweeps")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == SWEEPS


def test_sweep_keys_and_run_keys_are_told_apart(sweep):
    plan = compose_sweep([sweep(), "sweep.trials=7", "sweep.space.1.low=1e-4", "trainer.max_steps=3", *PATHS])
    assert (plan.config.trials, plan.config.space[1].low, plan.base.trainer.max_steps) == (7, 1e-4, 3)
    assert plan.overrides == ["trainer.max_steps=3", *PATHS]


def test_trial_is_the_run_with_its_values_under_the_sweep_folder(sweep, tmp_path):
    plan = compose_sweep([sweep(), "logger=wandb_offline", "sweep.parallel=2", f"runs_dir={tmp_path}", *PATHS])
    run, text = plan.trial(3, {"scheme": "w8a16", "optim.lr": 2e-4})
    assert (run.scheme.name, run.optim.lr, run.name) == ("w8a16", 2e-4, "trial-0003")
    assert (run.runs_dir, run.overwrite, run.logger.group) == (str(tmp_path / "mine"), True, "mine")
    assert run.trainer.threads >= 1
    (tmp_path / "t.yaml").write_text(text)
    assert from_yaml(tmp_path / "t.yaml") == run


def test_identity_holds_what_decides_numbers_and_no_more(sweep):
    def identity(*words: str) -> str:
        return compose_sweep([sweep(), *PATHS, *words]).identity()

    same = identity()
    assert (
        identity("sweep.trials=9", "sweep.parallel=3", "runs_dir=x", "trainer.threads=2", "sweep.sampler=tpe") == same
    )
    assert identity("trainer.max_steps=7") != same
    assert identity("sweep.space.1.high=1e-2") != same


WRONG = {
    ("key: scheme", "key: shceme"): r"^shceme: must be a setting.*Did you mean 'scheme'",
    ("w8a16", "w8a61"): r"^scheme: must be a file in conf/scheme, got 'w8a61'.*\(with scheme=w8a61 optim.lr=1e-05\)",
    ("[w4a16_g32, w8a16]", "[]"): r"^sweep.space.0.values: must hold a value, got none",
    ("[w4a16_g32, w8a16]", "[w8a16, w8a16]"): r"^sweep.space.0.values: must differ",
    ("[w4a16_g32, w8a16]", "[[1, 2]]"): r"^sweep.space.0.values: must be numbers, words",
    ("key: optim.lr", "key: optim.rl"): r"^optim.rl: must be a setting",
    ("key: optim.lr", "key: scheme"): r"^sweep.space: must name a key once, got scheme 2 times",
    ("key: optim.lr", "key: name"): r"^sweep.space.1.key: must not be what the sweep gives",
    ("kind: float", "kind: int"): r"^sweep.space.1: low and high must be whole numbers",
    ("kind: float", "kind: real"): r"^sweep.space.1.kind: must be one of choice, int, float",
    ("kind: float, ", ""): r"^sweep.space.1: a choice has values, not low",
    ("low: 1e-5", "low: 0"): r"^sweep.space.1.low: must be above 0 with log",
    ("low: 1e-5", "low: 1"): r"^sweep.space.1: low and high must be finite, low below high",
    ("low: 1e-5", "low: -.inf"): r"^sweep.space.1: low and high must be finite",
    ("low: 1e-5", "low: 1e-5, lwo: 1"): r"mine.yaml: space.1.lwo: must be a setting.*space.1.low'",
    ("high: 1e-3", "high: 1e-3, points: 3"): r"^sweep.space.1.points: goes with sampler=grid",
    ("sampler: random", "sampler: grid"): r"^sweep.trials: must not be given: a grid runs every combination",
    ("sampler: random", "sampler: bayes"): r"^sweep.sampler: must be one of tpe, random, grid",
    ("trials: 4", "trials: 0"): r"^sweep.trials: must be at least 1",
    ("trials: 4\n", ""): r"^sweep.trials: must be given with sampler=random",
    ("trials: 4", "trials: few"): r"mine.yaml: trials: must be a whole number or null, got 'few'",
    ("trials: 4", "trails: 4"): r"mine.yaml: trails: must be a setting.*'trials'",
    (
        "trials: 4",
        "trials: 4\nrecord: [bits_per_weigth]",
    ): r"^sweep.record.0: must be a metric.*Did you mean 'bits_per_weight'",
    ("trials: 4", "trials: 4\nrecord: [perplexity.packed]"): r"^sweep.record.0: must not be named before",
    ("trials: 4", "trials: 4\nobjectives: []"): r"^sweep.objectives: must hold a metric",
    (
        "trials: 4",
        "trials: 4\nobjectives: [{metric: recovery}]",
    ): r"^sweep.objectives.0.direction: .*direction: maximize",
    ("trials: 4", "trials: 4\ntimeout_minutes: -1"): r"^sweep.timeout_minutes: must be finite and above 0",
    ("trials: 4", "trials: 4\npruning: {kind: halving}"): r"^sweep.pruning.kind: must be one of off, median, hyperband",
    ("trials: 4", "trials: 4\npruning: {watch: train.los}"): r"^sweep.pruning.watch: .*Did you mean 'train.loss'",
    ("trials: 4", "trials: 4\npruning: {kind: median}"): r"^sweep.pruning.watch: needs validation lines",
    ("trials: 4", "trials: 4\nlauncher: cloud"): r"^sweep.launcher: must be one of local",
    ("name: mine", "name: a/b"): r"^sweep.name: must be a plain folder name",
    ("name: mine\n", ""): r"^sweep.name: must be given",
    ("space:", "space: ["): r"mine.yaml:\d+: must be YAML",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change[1][:40])
def test_sweep_refuses_a_mistake_before_the_first_trial(sweep, change):
    with pytest.raises(UserError, match=re.compile(WRONG[change], re.MULTILINE)) as caught:
        compose_sweep([sweep(change), *PATHS])
    assert caught.value.before_work


def test_sweep_names_every_corner_that_is_no_run_at_once(sweep):
    wrong = sweep(
        ("[w4a16_g32, w8a16]", "[w9, w4a16_g32, w10]"), ("high: 1e-3", "high: 1e300"), ("optim.lr", "optim.grad_clip")
    )
    with pytest.raises(UserError, match="w9") as caught:
        compose_sweep([wrong, *PATHS])
    assert len(caught.value.problems) == 2


def test_empty_space_and_several_objectives_with_pruning_are_refused(sweep):
    both = "objectives: [{metric: perplexity.packed}, {metric: bits_per_weight}]\nrecord: []\npruning: {kind: median}\n"
    with pytest.raises(UserError, match="compares trials by one objective") as caught:
        compose_sweep([sweep(text=f"name: x\ntrials: 2\n{both}"), *PATHS])
    assert any(line.startswith("sweep.space: must hold a parameter") for line in caught.value.problems)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["optim.lr=1"], r"^optim.lr: must be set by the sweep or on the command line, got both"),
        (["name=x"], r"^name: must not be given: each trial has its own"),
        (["sweep=bits"], r"^sweep: must be given once, got 2 of them"),
        (["sweep.trails=3"], r"^sweep.trails: must be a setting.*'sweep.trials'"),
        (["trainer.nodes=2", "trainer.strategy=ddp"], r"sweep.launcher=local is one machine"),
        (["trainer.max_stpes=1"], r"^trainer.max_stpes: .*'trainer.max_steps'"),
    ],
)
def test_sweep_refuses_words_that_do_not_fit(sweep, words, match):
    with pytest.raises(UserError, match=match):
        compose_sweep([sweep(), *PATHS, *words])


def test_sweep_must_be_named():
    with pytest.raises(UserError, match=r"^sweep: must be given once, got nothing. Add sweep=NAME"):
        compose_sweep(PATHS)
    with pytest.raises(UserError, match=r"^sweep: must be a file in conf/sweep, got 'bit'. Did you mean 'bits'"):
        compose_sweep(["sweep=bit", *PATHS])


def test_grid_has_every_combination_with_even_spacing():
    space = [
        ParameterConfig("a", values=["x", "y"]),
        ParameterConfig("b", "float", low=1.0, high=100.0, log=True, points=3),
        ParameterConfig("c", "int", low=1, high=3, points=5),
    ]
    combinations = grid(SweepConfig("s", space))
    assert len(combinations) == 2 * 3 * 3
    assert [c["b"] for c in combinations[:9:3]] == pytest.approx([1, 10, 100])
    assert [c["c"] for c in combinations[:3]] == [1, 2, 3]


def test_corners_hold_every_choice_and_both_ends_when_there_are_too_many():
    space = [ParameterConfig(f"k{i}", values=list(range(5))) for i in range(4)]
    space.append(ParameterConfig("r", "float", low=0.5, high=2.5))
    few = corners(SweepConfig("s", space))
    assert len(few) <= 32
    assert all({c[f"k{i}"] for c in few} == set(range(5)) for i in range(4))
    assert {c["r"] for c in few} == {0.5, 2.5}


def test_planned_trials_are_those_of_the_sweep_and_stay_in_the_space(sweep):
    config = compose_sweep([sweep(), *PATHS]).config
    trials = planned(config, 10, most=200)
    assert len(trials) == 4
    assert planned(config, 10, most=200) == trials
    assert all(1e-5 <= trial["optim.lr"] <= 1e-3 for trial in trials)
    assert planned(dataclasses.replace(config, seed=1), 10, most=200) != trials


def test_dry_run_shows_the_trials_and_makes_no_folder(qat, sweep, tmp_path):
    code, out, _ = qat("sweep", "--dry-run", "recipe=tiny", sweep(), f"runs_dir={tmp_path / 'runs'}", *PATHS)
    assert code == 0
    assert "4 trials, 1 at a time" in out
    assert len(re.findall(r"│ \d ", out)) == 4
    assert not (tmp_path / "runs").exists()


def test_sweep_without_optuna_says_how_to_get_it(qat, sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, error = qat("sweep", "recipe=tiny", sweep(), *PATHS)
    assert code == 2
    assert "needs the package optuna, got not installed. Run: pip install 'qat[sweep]'" in error


def test_config_file_is_a_whole_run_in_which_values_may_be_set(qat, tmp_path):
    _, text, _ = qat("train", "--cfg", "recipe=tiny", *PATHS)
    (tmp_path / "run.yaml").write_text(text)
    assert qat("train", "--cfg", "--config-file", tmp_path / "run.yaml")[:2] == (0, text)
    assert qat("train", "--cfg", "--config-file", tmp_path / "run.yaml", "seed=7")[1] == text.replace(
        "seed: 0", "seed: 7"
    )
    (tmp_path / "run.yaml").write_text(text.replace("max_steps: 2", "max_steps: -2"))
    assert "trainer.max_steps: must be at least 0, got -2" in qat("train", "--config-file", tmp_path / "run.yaml")[2]


def test_shipped_sweeps_are_plain_values():
    for name in SWEEPS:
        content = yaml.safe_load((conf_dir() / f"sweep/{name}.yaml").read_text())
        assert set(content) <= {field.name for field in dataclasses.fields(SweepConfig)}
