"""scripts/ladder.py on a tiny model: what is done is not done again, and the tables say what fell short."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import same_process

from qat import pipeline
from qat.cli.main import main as qat_main
from qat.report.ladder import best_baseline, goal, ladder_table, problems_of, recovered

ROOT = Path(__file__).parents[1]


def script(name: str):
    """A script as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


ladder = script("ladder")
PROCESS = ladder.Ladder.process
MODELS = {"float", "packed", *ladder.BASELINES}


@pytest.fixture(scope="module")
def make(tmp_path_factory, tiny_model_dir, tiny_text):
    """`make(words...)` -> the ladder's exit code, its results and the commands it gave, all in this process."""
    folder = tmp_path_factory.mktemp("ladder")
    given: list[str] = []

    def process(self, command: list[str]) -> None:
        given.append(command[3])
        assert qat_main(command[3:]) == 0

    def score(self, run, names):
        given.append(f"score {' '.join(names)}")
        ladder_score, others = script("ladder_score"), dict(text.split("=", 1) for text in self.texts)
        yield from json.loads(
            json.dumps(list(ladder_score.scored(ladder.from_yaml(run / "resolved.yaml"), run, names, others)))
        )

    tiny = [f"model.path={tiny_model_dir}", "data=text", f"data.path={tiny_text}", "data.block_size=32"]
    tiny += ["data.eval_tokens=200", "trainer.max_steps=2", "trainer.precision=fp32", "evaluate.precision=fp32"]
    files = [
        f"--runs={folder / 'runs'}",
        f"--output={folder / 'ladder.json'}",
        f"--text=more=text data.path={tiny_text}",
    ]

    def make(*words: str, overrides: tuple[str, ...] = (f"evaluate.controls={folder / 'controls'}",)):
        given.clear()
        code = ladder.main([*files, *words, *tiny, *overrides])
        return code, json.loads((folder / "ladder.json").read_text()), list(given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_fresh_process", same_process)
        patch.setattr(ladder.Ladder, "process", process)
        patch.setattr(ladder.Ladder, "score", score)
        make.folder = folder
        yield make


@pytest.fixture(scope="module")
def done(make):
    """The results after two rungs of recover and one of adapt, and the commands that were given."""
    recover = make("--setting=recover", "--only=w4a16_g32,kv4", "--seeds=0")
    adapt = make("--setting=adapt", "--only=w4a16_g32", "--seeds=0")
    assert (recover[0], adapt[0]) == (0, 0)
    return adapt[1], recover[2], adapt[2]


def test_rung_is_trained_and_scored_on_both_texts(done):
    results, recover, _ = done
    row = results["rungs"]["ladder_w4a16_g32_recover_seed0"]
    assert recover[:2] == ["train", "score float packed rtn rtn_mse gptq awq squeezellm"]
    assert set(row["models"]) == MODELS and row["missing"] == []
    assert all(set(model["texts"]) == {"own", "more"} for model in row["models"].values())
    tables = row["models"]["squeezellm"]
    assert tables["bits_per_weight"] > row["bits_per_weight"] and tables["calibration_tokens"] > 0
    # the packed model is the trained one, so on the run's own text both are one number
    assert row["models"]["packed"]["texts"]["own"]["perplexity"] == pytest.approx(row["fake_quant"], rel=1e-3)
    assert row["models"]["gptq"]["calibration_tokens"] > 0 and row["models"]["rtn"]["calibration_tokens"] == 0
    # the same text a second time, as "another": all of it stands in what is scored, not in what is trained on
    assert results["texts"]["own"]["overlap"]["share"] < 0.2


def test_cache_rung_has_float_weights_and_only_rounding_as_baseline(done):
    row = done[0]["rungs"]["ladder_kv4_recover_seed0"]
    assert row["bits_per_weight"] == 32
    assert "texts" in row["models"]["rtn"] and row["models"]["gptq"]["refused"]
    assert "needs decoder layers with quantized weights" in row["models"]["squeezellm"]["refused"][0]
    # the float model is that of the other rung, so it was not scored again
    assert done[1][3] == "score packed rtn rtn_mse gptq awq squeezellm"


def test_adapt_has_a_control_that_is_kept_for_other_rungs(done, make):
    row = done[0]["rungs"]["ladder_w4a16_g32_adapt_seed0"]
    assert set(row["models"]) == MODELS | {"control"}
    assert row["models"]["control"]["texts"]["own"]["kl"] > 0
    (kept,) = (make.folder / "controls").iterdir()
    before = (kept / "final/model.safetensors").stat().st_mtime_ns
    code, results, _ = make("--setting=adapt", "--only=w4a16_g64", "--seeds=0")
    assert code == 0
    assert (kept / "final/model.safetensors").stat().st_mtime_ns == before
    other = results["rungs"]["ladder_w4a16_g64_adapt_seed0"]["models"]["control"]
    assert other == row["models"]["control"]


def test_what_is_done_is_not_done_again(done, make, capsys):
    code, _, given = make("--setting=recover", "--only=w4a16_g32,kv4", "--seeds=0")
    assert (code, given) == (0, [])
    assert make("--setting=recover", "--only=w4a16_g32", "--seeds=0,1", "--list")[2] == []
    out = capsys.readouterr().out
    assert "ladder_w4a16_g32_recover_seed0: done" in out and "ladder_w4a16_g32_recover_seed1: to do" in out


def test_scores_that_are_missing_are_made_up_without_training(done, make):
    file = make.folder / "ladder.json"
    results = json.loads(file.read_text())
    row = results["rungs"]["ladder_w4a16_g32_recover_seed0"]
    gptq = row["models"].pop("gptq")
    row["missing"] = ["gptq"]
    file.write_text(json.dumps(results))
    code, results, given = make("--setting=recover", "--only=w4a16_g32", "--seeds=0")
    assert (code, given) == (0, ["score gptq"])
    again = results["rungs"]["ladder_w4a16_g32_recover_seed0"]["models"]["gptq"]
    assert again["texts"] == gptq["texts"]


def test_other_settings_are_another_run_and_a_stopped_one_is_resumed(done, make):
    words = ("--setting=recover", "--only=w8a8", "--seeds=0")
    assert make(*words)[2][0] == "train"
    status = make.folder / "runs/ladder_w8a8_recover_seed0/run_status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"status": "preempted"}))
    results = json.loads((make.folder / "ladder.json").read_text())
    del results["rungs"]["ladder_w8a8_recover_seed0"]
    (make.folder / "ladder.json").write_text(json.dumps(results))
    assert make(*words)[2][0] == "resume"
    assert make(*words, overrides=("optim.lr=3e-4",))[2][0] == "train"


def test_time_that_is_over_stops_before_the_next_rung(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ladder.Ladder, "do", lambda self, job: (_ for _ in ()).throw(ladder.Stopped()))
    assert ladder.main([f"--output={tmp_path / 'x.json'}", "--setting=recover", "--limit-minutes=0"]) == 0
    assert "time is over" in capsys.readouterr().out


def test_process_is_asked_to_stop_when_the_time_is_over(tmp_path):
    saved = tmp_path / "saved"
    end = f"lambda *a: (open({str(saved)!r}, 'w'), sys.exit(75))"
    code = f"import signal, sys, time; signal.signal(signal.SIGTERM, {end}); time.sleep(30)"
    started = time.monotonic()
    slow = ladder.Ladder(tmp_path / "x.json", tmp_path, [], [], started + 1.0)
    with pytest.raises(ladder.Stopped):
        PROCESS(slow, [sys.executable, "-c", code])
    assert saved.is_file() and time.monotonic() - started < 10


def row(rung: str, packed: float, **others: float) -> dict:
    models = {"float": 20.0, "packed": packed, "rtn": 40.0} | others
    return {
        "rung": rung,
        "setting": "recover",
        "seed": 0,
        "control_is_float": True,
        "bits_per_weight": 5.0,
        "fake_quant": packed,
        "tokens": 1000,
        "minutes": 1.0,
        "training_minutes": 0.5,
        "peak_memory_gib": 2.0,
        "models": {name: {"texts": {"own": {"perplexity": value, "kl": 0.1}}} for name, value in models.items()},
    }


def test_recovery_is_the_share_of_the_loss_won_back():
    assert recovered(20.0, 20.0, 40.0) == 1.0
    assert recovered(40.0, 20.0, 40.0) == pytest.approx(0.0)
    assert recovered(20.0, 20.0, 20.0) is None and recovered(20.0, 20.0, None) is None


@pytest.mark.parametrize(
    ("rung", "packed", "reached"),
    [("w4a16_g64", 23.0, True), ("w4a16_g64", 24.0, False), ("w8a8", 20.05, True), ("w8a8", 20.1, False)],
)
def test_goal_is_reached_or_not(rung, packed, reached):
    assert goal(row(rung, packed), [])[1] is reached


def test_goal_beside_another_rung_needs_that_rung():
    mixed = row("mixed_3_5_bits", 26.0)
    assert goal(mixed, [mixed])[1] is None
    assert goal(mixed, [mixed, row("w4a16_row", 27.0)])[1] is True


def test_tables_say_first_what_is_worse_than_post_training():
    lost, won = row("w4a16_g64", 24.5, gptq=24.0), row("w4a16_g32", 21.0, gptq=24.0)
    assert best_baseline(lost) == ("gptq", 24.0)
    assert problems_of(won) == [] and "worse than GPTQ 24.00" in problems_of(lost)[0]
    text = {"tokens": 100, "overlap": {"tokens": 13, "share": 0.01}}
    results = {"protocol": "P", "texts": {"own": text}, "rungs": {"a": lost, "b": won}}
    table = ladder_table(results)
    assert table.startswith("- `w4a16_g64` (recover, seed 0): QAT 24.50 is worse than GPTQ 24.00.")
    assert "recovery ≥ 75% ✗" in table and "recovery ≥ 75% ✓" in table and "SqueezeLLM" in table
    partial = copy.deepcopy(results)
    del partial["rungs"]["a"]["models"]["packed"]
    assert "| `w4a16_g64` | 0 | 5.00 | 20.00 | = float | 40.00 |" in ladder_table(partial)
