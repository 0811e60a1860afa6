"""The report of a sweep from its files, `qat report`, and one real sweep of two trials from command to best recipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sweeps import run, sweep_of

from qat.cli.compose import compose_run, from_yaml
from qat.errors import UserError
from qat.report.sweep import write_sweep_report
from qat.report.sweep_record import METRICS, TrialRecord, metric_value, pareto_front, read_sweep

ROOT = Path(__file__).parents[1]
# The driver of a sweep holds no model: torch in it would be a mistake
DRIVE = """
import sys
from qat.cli.main import main
code = main(sys.argv[1:])
print("torch imported:", "torch" in sys.modules)
sys.exit(code)
"""


def trial(number: int, **metrics: float) -> TrialRecord:
    named = {name.replace("__", "."): value for name, value in metrics.items()}
    return TrialRecord(number, "complete", {"optim.lr": 0.1 * number}, named, 1.0, None, None, f"trial-{number:04d}")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A sweep of fake trials of which one fails, its report written."""
    folder = tmp_path_factory.mktemp("mixed") / "s"
    run(sweep_of(3.0, 2.0, do=["finish", "fail"]), folder)
    write_sweep_report(folder)
    return folder


def test_pareto_front_leaves_out_what_another_trial_beats():
    trials = [
        trial(0, bits_per_weight=4.0, perplexity__packed=10.0),
        trial(1, bits_per_weight=3.0, perplexity__packed=12.0),
        trial(2, bits_per_weight=4.0, perplexity__packed=11.0),
        trial(3, bits_per_weight=4.0, perplexity__packed=10.0),
        trial(4, bits_per_weight=2.0),
    ]
    directions = {"bits_per_weight": "minimize", "perplexity.packed": "minimize"}
    # equal trials do not beat each other; one without a metric takes no part
    assert [t.number for t in pareto_front(trials, directions)] == [0, 1, 3]
    faster = [trial(0, tokens_per_second=5.0), trial(1, tokens_per_second=7.0)]
    assert [t.number for t in pareto_front(faster, {"tokens_per_second": "maximize"})] == [1]


def test_metric_is_a_finite_number_under_its_key_or_none():
    results = {"perplexity": {"packed": 3, "float": None}, "recovery": True}
    assert metric_value(results, "perplexity.packed") == 3.0
    assert metric_value(results, "perplexity.float") is None
    assert metric_value(results, "perplexity.packed.deeper") is None
    assert metric_value(results, "recovery") is None
    assert metric_value({}, "bits_per_weight") is None


def test_report_has_table_figures_reasons_and_the_best(mixed):
    page, text = ((mixed / name).read_text() for name in ("report.html", "report.md"))
    for heading in ("Verdict", "Trials", "Pareto fronts", "Parallel coordinates", "History", "Space and run"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count('<img alt="Figure: ') == 3
    assert "<script" not in page
    assert "exit 2: in_features: must be a multiple of group_size" in page
    assert "2 complete, 2 failed" in text
    assert "Best: trial 2 (value=2, do=finish)" in text
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 4
    assert rows[2].startswith("| 2 | complete | 2 | finish | 2 | 4.333 |")
    for figure in re.findall(r"\((figures/.*?)\)", text):
        assert (mixed / figure).read_bytes().startswith(b"\x89PNG")


def test_report_is_made_again_by_the_command(qat, mixed):
    before = (mixed / "report.md").read_text()
    for name in ("report.md", "report.html", "best.yaml"):
        (mixed / name).unlink()
    code, out, _ = qat("report", mixed)
    assert code == 0
    assert out.splitlines() == [str(mixed / name) for name in ("report.html", "report.md", "best.yaml")]
    assert (mixed / "report.md").read_text() == before


def test_report_of_a_sweep_without_a_complete_trial_says_so(tmp_path):
    run(sweep_of(1.0, do=["fail"]), tmp_path / "s")
    paths = write_sweep_report(tmp_path / "s")
    assert [path.name for path in paths] == ["report.html", "report.md"]
    assert "1 failed" in paths[1].read_text()


def test_report_escapes_what_it_shows(tmp_path):
    run(sweep_of(1.0), tmp_path / "s")
    content = json.loads((tmp_path / "s/results.json").read_text())
    content["trials"][0] |= {"reason": "<script>alert(1)</script>", "params": {"a<b": "c|d"}}
    (tmp_path / "s/results.json").write_text(json.dumps(content))
    page, text, _ = (path.read_text() for path in write_sweep_report(tmp_path / "s"))
    assert "<script" not in page
    assert "a&lt;b" in page
    assert "c\\|d" in text


def test_report_refuses_what_is_no_run_or_sweep(qat, tmp_path):
    code, _, error = qat("report", tmp_path)
    assert code == 2
    assert "must be a run or sweep folder, got neither sweep.yaml nor resolved.yaml" in error
    (tmp_path / "sweep.yaml").write_text("")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"results.json: must be what a sweep wrote, got KeyError"):
        read_sweep(tmp_path)


def wandb_group(folder: Path) -> tuple[str, str]:
    """Group and name of the one offline wandb run in a run folder, read as `wandb sync` reads it."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    from wandb.proto import wandb_internal_pb2

    data, at = file.read_bytes(), 7
    # records of a LevelDB log: 4 bytes of checksum, 2 of length, 1 of type; small ones are whole
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        if record.WhichOneof("record_type") == "run":
            return record.run.run_group, record.run.display_name
        at += 7 + length
    raise AssertionError("no run in the file")


def test_sweep_of_two_real_trials_ends_with_a_best_recipe_that_composes(qat, tmp_path, tiny_model_dir, tiny_text):
    (tmp_path / "s.yaml").write_text(
        "name: real\nsampler: grid\nspace: [{key: scheme, values: [w4a16_row, w8a16]}]\nparallel: 2\n"
        "record: [bits_per_weight, tokens_per_second]\npruning: {kind: median}\n"
    )
    words = ["sweep", "recipe=tiny", f"sweep={tmp_path / 's.yaml'}", f"model.path={tiny_model_dir}"]
    words += [f"data.path={tiny_text}", f"runs_dir={tmp_path / 'runs'}", "trainer.eval_every=1", "trainer.threads=1"]
    words += [
        "evaluate.baselines=false",
        "evaluate.decode_tokens=4",
        "logger=wandb_offline",
        "trainer.layer_stats_every=0",
    ]
    done = subprocess.run([sys.executable, "-c", DRIVE, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch imported: False" in done.stdout
    folder = tmp_path / "runs/real"
    record = read_sweep(folder)
    assert [(t.state, t.params["scheme"], t.last_step) for t in record.trials] == [
        ("complete", "w4a16_row", 2),
        ("complete", "w8a16", 2),
    ]
    for t in record.trials:
        results = json.loads((folder / t.folder / "results.json").read_text())
        assert t.metrics["perplexity.packed"] == results["perplexity"]["packed"]
        # without baselines there is no gap to recover; every other metric is there
        assert [metric for metric in METRICS if metric_value(results, metric) is None] == ["recovery"]
        assert wandb_group(folder / t.folder) == ("real", t.folder)
    best = compose_run([f"recipe={folder / 'best.yaml'}"])
    expected = from_yaml(folder / record.best().folder / "resolved.yaml")
    expected.name, expected.runs_dir, expected.overwrite, expected.logger.group = "real_best", "runs", False, None
    assert best == expected
    assert done.stdout.count(f"recipe={folder / 'best.yaml'}") == 1
    page = folder / record.best().folder / "report.html"
    page.unlink()
    assert qat("report", page.parent)[:2] == (0, f"{page}\n")
    assert "<h2>Verdict</h2>" in page.read_text()


def agent_command(text: str, values: dict) -> list[str]:
    """The command that wandb's agent makes of a sweep file and the values of one run, by wandb's own functions."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    content = yaml.safe_load(text)
    macros = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [content.get("program", "")]}
    words = []
    for word in create_sweep_command(content["command"]):
        words += macros[word[2:-1]] if word.startswith("${") and word[2:-1] in macros else [word]
    return words


def test_wandb_agent_of_the_documentation_starts_a_run_of_ours(qat, monkeypatch):
    (text,) = re.findall(r"```yaml\n(program:.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    content = yaml.safe_load(text)
    assert content["metric"]["name"] == "validation/perplexity"
    values = {
        key: spec["values"][0] if "values" in spec else spec["min"] for key, spec in content["parameters"].items()
    }
    words = agent_command(text, values)
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert words[:3] == ["/usr/bin/env", "qat", "train"]
    code, out, error = qat(*words[2:], "--cfg")
    assert code == 0, error
    run = yaml.safe_load(out)
    assert run["name"] == "agent_abc123"
    assert run["trainer"]["eval_every"] > 0
    assert run["logger"]["wandb"] == "online"
    for key, value in values.items():
        here = run["scheme"]["name"] if key == "scheme" else run
        for part in key.split(".") if key != "scheme" else []:
            here = here[part]
        assert here == value


@pytest.mark.parametrize(
    ("words", "environment", "match"),
    [
        (["trainer=ddp", "trainer.accelerator=cpu"], {}, r"needs 2 processes.*qat sweep"),
        ([], {"WORLD_SIZE": "2"}, r"runs one process per job, got WORLD_SIZE=2.*qat sweep"),
    ],
)
def test_multirun_of_several_processes_is_refused_and_points_to_the_sweep(tmp_path, words, environment, match):
    import os

    paths = ["model.path=m", "data.path=d", f"runs_dir={tmp_path / 'runs'}"]
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--multirun", "recipes=tiny", "scheme=w8a8,w8a16"]
    done = subprocess.run(
        [*command, *paths, *words],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert re.search(match, done.stderr), done.stderr
    assert not (tmp_path / "runs").exists()
