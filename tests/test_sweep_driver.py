"""The driver of a sweep: how trials end, that one failure or a killed driver loses nothing, that no process is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweeps import opened, run, sweep_of

from qat.config import RunConfig, TrainerConfig
from qat.errors import UserError
from qat.report.sweep_record import read_sweep
from qat.sweep import driver
from qat.sweep.config import ObjectiveConfig
from qat.sweep.folder import claimed
from qat.sweep.jobs import PATIENCE_SECONDS, TrialJob, check_local, end_left_over, environment, train_command
from qat.sweep.study import JOURNAL, Study

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(driver, "POLL_SECONDS", 0.02)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "s"


def trials(folder: Path):
    return read_sweep(folder).trials


def pids(folder: Path, number: int = 0) -> list[int]:
    """The processes that ran a trial."""
    return [int(line) for line in (folder / f"trial-{number:04d}" / "pids").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_sweep_runs_a_grid_and_names_the_best(folder):
    assert run(sweep_of(3.0, 2.0, 4.0), folder) is None
    record = read_sweep(folder)
    assert [(t.number, t.state, t.params, t.metrics["perplexity.packed"]) for t in record.trials] == [
        (0, "complete", {"value": 3.0}, 3.0),
        (1, "complete", {"value": 2.0}, 2.0),
        (2, "complete", {"value": 4.0}, 4.0),
    ]
    assert record.status == "finished"
    assert record.best().number == 1
    assert record.trials[0].metrics["bits_per_weight"] == 4.25


REASONS = {
    "fail": r"^exit 2: in_features: must be a multiple of group_size, got 63\. Use 21\.$",
    "memory": r"^out of memory: RuntimeError: .*can't allocate memory",
    "raise": r"^exit 1: KeyError: 'key'$",
    "killed": r"^killed \(SIGKILL\), as systems do when memory runs out$",
    "nan": r"^results\.json of the run has no perplexity\.packed$",
}


def test_failed_trial_is_recorded_with_its_reason_and_the_sweep_goes_on(folder):
    assert run(sweep_of(1.0, do=[*REASONS, "finish"]), folder) is None
    assert [trial.state for trial in trials(folder)] == ["failed"] * 5 + ["complete"]
    for trial in trials(folder)[:5]:
        assert re.search(REASONS[trial.params["do"]], trial.reason), trial.reason


def test_values_that_make_no_run_fail_their_trial_only(folder):
    with opened(sweep_of(1.0, 2.0), folder) as sweep:
        real = sweep._configure

        def configure(number, params):
            if number == 0:
                raise UserError("value: must be even, got 1. Use 2.")
            return real(number, params)

        sweep._configure = configure
        sweep.run()
    first, second = trials(folder)
    assert (first.state, first.reason, second.state) == ("failed", "value: must be even, got 1. Use 2.", "complete")


def test_hopeless_trial_is_stopped_early_and_counts_as_pruned(folder):
    pruning = {"kind": "median", "startup_trials": 2, "warmup_steps": 2}
    assert run(sweep_of(1.0, 2.0, 9.0, 1.5, pruning=pruning), folder, do="watched") is None
    third = trials(folder)[2]
    assert [trial.state for trial in trials(folder)] == ["complete", "complete", "pruned", "complete"]
    assert third.reason.startswith("validation.perplexity 9 at step")
    assert 2 <= third.last_step < 59
    assert not third.metrics


def test_hyperband_gives_more_steps_to_few(folder):
    pruning = {"kind": "hyperband", "startup_trials": 1, "warmup_steps": 1}
    run(sweep_of(1.0, 1.5, 9.0, 10.0, 11.0, 12.0, pruning=pruning), folder, do="watched")
    states = [trial.state for trial in trials(folder)]
    # which trials share a bracket is optuna's; the worst of one is stopped
    assert states[:1] == ["complete"]
    assert "pruned" in states[2:]


def test_nothing_is_pruned_before_enough_trials_have_completed(folder):
    pruning = {"kind": "median", "startup_trials": 3}
    run(sweep_of(1.0, 2.0, 4.0, pruning=pruning), folder, do="watched")
    assert [trial.state for trial in trials(folder)] == ["complete"] * 3


def test_trial_past_its_time_is_stopped_and_failed(folder):
    run(sweep_of(1.0, timeout_minutes=0.005), folder, do="hang", always=True)
    assert trials(folder)[0].reason == "ran longer than sweep.timeout_minutes=0.005"
    assert not is_alive(pids(folder)[0])


def test_trials_run_side_by_side_in_places_of_their_own(folder):
    slots, most = [], 0
    with opened(sweep_of(1.0, 2.0, 3.0, 4.0, parallel=2), folder) as sweep:
        real = sweep._launch

        def launch(trial):
            nonlocal most
            slots.append(trial.slot)
            most = max(most, len(sweep._active) + 1)
            return real(trial)

        sweep._launch = launch
        sweep.run()
    assert (most, set(slots)) == (2, {0, 1})
    assert [trial.state for trial in trials(folder)] == ["complete"] * 4


@pytest.mark.parametrize(
    ("do", "number"), [("stop_driver_ctrl_c", signal.SIGINT), ("stop_driver_term", signal.SIGTERM)]
)
def test_stopped_driver_stops_its_trials_and_the_next_one_takes_them_up(folder, do, number):
    config = sweep_of(1.0, 2.0)
    assert run(config, folder, do=do) == number
    assert [trial.state for trial in trials(folder)] == ["interrupted", "waiting"]
    assert read_sweep(folder).status == "interrupted"
    assert not is_alive(pids(folder)[0])
    # the next attempt finishes trial 0, and trial 1 stops the driver again
    assert run(config, folder, do=do) == number
    assert run(config, folder, do=do) is None
    assert [(trial.number, trial.state) for trial in trials(folder)] == [(0, "complete"), (1, "complete")]
    assert [len(pids(folder, trial)) for trial in (0, 1)] == [2, 2]


def test_driver_that_breaks_stops_its_trials_and_says_interrupted(folder, monkeypatch):
    def broken(self, active):
        wait_for((folder / "trial-0000/pids").is_file)
        raise RuntimeError("broken")

    monkeypatch.setattr(driver.Driver, "_follow", broken)
    with pytest.raises(RuntimeError, match="broken"):
        run(sweep_of(1.0), folder, do="hang")
    assert read_sweep(folder).status == "interrupted"
    assert not is_alive(pids(folder)[0])


def test_second_interrupt_kills_a_trial_that_does_not_end(folder):
    began = time.monotonic()
    assert run(sweep_of(1.0), folder, do="stubborn") == signal.SIGINT
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert not is_alive(pids(folder)[0])


KILLED = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from sweeps import run, sweep_of
run(sweep_of(1.0, 2.0), Path(sys.argv[1]), do="hang")
"""


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_driver_leaves_a_trial_that_the_next_one_ends_and_runs_again(folder):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT)
    wait_for(lambda: (folder / "trial-0000/run_status.json").is_file())
    with pytest.raises(
        UserError, match=rf"s: must have one driver, got process {process.pid} on .*another sweep\.name"
    ):
        run(sweep_of(1.0, 2.0), folder)
    process.kill()
    process.wait()
    orphan = pids(folder)[0]
    assert is_alive(orphan)
    assert run(sweep_of(1.0, 2.0), folder) is None
    assert not is_alive(orphan)
    assert [(trial.number, trial.state) for trial in trials(folder)] == [(0, "complete"), (1, "complete")]


def test_trial_that_finished_after_its_driver_died_is_not_run_again(folder):
    config = sweep_of(1.0)
    with opened(config, folder) as sweep:
        number = sweep.study.ask()
        sweep._start(number)
        wait_for(lambda: sweep._active[number].job.poll() is not None)
    assert run(config, folder) is None
    assert trials(folder)[0].state == "complete"
    assert len(pids(folder)) == 1


def test_process_that_only_has_the_number_of_a_trial_is_left_alone(tmp_path):
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        (tmp_path / "trial-0000.pid").write_text(str(bystander.pid))
        end_left_over(tmp_path / "trial-0000.yaml")
        assert is_alive(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


def test_trial_that_others_stop_goes_on_but_not_for_ever(folder, tmp_path):
    goes_on = []
    with opened(sweep_of(1.0), folder, do="preempted") as sweep:
        real = sweep._launch
        sweep._launch = lambda trial: (goes_on.append(trial.goes_on), real(trial))[1]
        sweep.run()
    assert trials(folder)[0].state == "complete"
    # this fake leaves no resolved.yaml while it is unfinished, so there is nothing to resume
    assert goes_on == [False, False]
    run(sweep_of(1.0), tmp_path / "t", do="preempted", always=True)
    assert trials(tmp_path / "t")[0].reason == "exit 75: no output"
    assert len(pids(tmp_path / "t")) == driver.MOST_STOPS + 1


def test_trial_whose_run_can_go_on_is_resumed(folder):
    with opened(sweep_of(1.0), folder) as sweep:
        number = sweep.study.ask()
        sweep._start(number)
        wait_for(lambda: sweep._active[number].job.poll() is not None)
        (folder / "trial-0000/run_status.json").write_text('{"status": "preempted"}')
        jobs = []
        sweep._active.clear()
        real = sweep._launch
        sweep._launch = lambda trial: (jobs.append(trial), real(trial))[1]
        sweep._start(number)
        wait_for(lambda: sweep._active[number].job.poll() is not None)
    assert jobs[0].goes_on
    assert train_command(jobs[0])[1:4] == ["-m", "qat.cli.main", "resume"]


def test_two_objectives_are_recorded_and_the_first_names_the_best(folder):
    both = [ObjectiveConfig("bits_per_weight"), ObjectiveConfig("perplexity.packed")]
    run(sweep_of(1.0, 3.0, objectives=both, record=[], sampler="tpe", trials=3), folder)
    record = read_sweep(folder)
    assert record.objectives == {"bits_per_weight": "minimize", "perplexity.packed": "minimize"}
    assert record.best().metrics["bits_per_weight"] == min(t.metrics["bits_per_weight"] for t in record.trials)


def test_finished_sweep_runs_nothing_more_and_more_trials_go_on(folder):
    config = sweep_of(1.0, 2.0, sampler="random", trials=2)
    run(config, folder)
    before = {number: pids(folder, number) for number in (0, 1)}
    run(config, folder)
    config.trials = 3
    run(config, folder)
    assert {number: pids(folder, number) for number in (0, 1)} == before
    assert [trial.state for trial in trials(folder)] == ["complete"] * 3


def test_folder_of_another_space_is_refused_with_the_difference(tmp_path):
    with claimed(tmp_path / "s", "space: [a, b]\nrun: 1\n"):
        pass
    with (
        pytest.raises(UserError, match=r"(?s)own space and run, got changes:\n  -space: \[a, b\]\n  \+space: \[a, c\]"),
        claimed(tmp_path / "s", "space: [a, c]\nrun: 1\n"),
    ):
        pass


@pytest.mark.parametrize("what", ["file", "other"])
def test_place_that_is_no_sweep_folder_is_refused_and_left(tmp_path, what):
    place = tmp_path / "s"
    if what == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"s: must be a (sweep )?folder, got a "), claimed(place, "space: 1\n"):
        pass
    assert (place if what == "file" else place / "thesis.txt").read_text() == "mine"


def test_journal_with_a_torn_last_line_is_read_and_written_on(folder):
    config = sweep_of(1.0, 2.0, sampler="random", trials=1)
    run(config, folder)
    with (folder / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"work')
    config.trials = 2
    run(config, folder)
    assert [trial.state for trial in trials(folder)] == ["complete"] * 2
    assert len(Study(config, 10, folder).trials()) == 2


def test_draws_do_not_depend_on_where_a_sweep_was_stopped(tmp_path):
    config = sweep_of(*map(float, range(50)), sampler="tpe", trials=6)

    def draws(stops: tuple[int, ...]) -> list[float]:
        found = []
        path = tmp_path / "-".join(map(str, stops))
        path.mkdir()
        for count in stops:
            study = Study(config, 10, path)
            for _ in range(count):
                number = study.ask()
                found.append(study.params(number)["value"])
                study.tell(number, "complete", [found[-1]])
        return found

    whole = draws((6,))
    assert draws((2, 1, 3)) == whole
    assert len(set(whole)) > 2


def test_environment_of_ranks_and_gpus_does_not_reach_other_trials(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    run_config = RunConfig(trainer=TrainerConfig(accelerator="gpu", strategy="ddp", devices=2, threads=3))
    trial = TrialJob(run_config, tmp_path / "t.yaml", tmp_path / "t.log", slot=1)
    variables = environment(trial)
    assert "RANK" not in variables
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["OMP_NUM_THREADS"]) == ("6,7", "3")
    command = train_command(trial)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert command[-2:] == ["--config-file", str(tmp_path / "t.yaml")]
    assert check_local(run_config, parallel=2) == []
    assert "needs 6 GPUs, got 4" in check_local(run_config, parallel=3)[0]
    run_config.trainer.nodes = 2
    assert "is one machine, got 2" in check_local(run_config, parallel=1)[0]
    assert os.environ["RANK"] == "1"
