"""qat/cluster without training: who came, who differs, what one machine does, and what SLURM is given."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_stubs import Stubs
from torch.distributed import HashStore

from qat.cli.compose import compose_run, to_yaml
from qat.cluster import node, submit
from qat.cluster.agreement import agree, check_layout, statement
from qat.cluster.meeting import open_store, span
from qat.cluster.node import NodeJob, Place, meet, run_node
from qat.errors import UserError

TEMPLATES = Path(__file__).parents[1] / "scripts/slurm"
PATHS = ["model.path=m", "data.path=d"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", *PATHS]


def free_port() -> int:
    """The first of two neighbouring ports that nobody uses."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except OSError:
                continue
            return first.getsockname()[1]


def outcome(function, *arguments) -> UserError | None:
    try:
        function(*arguments)
    except UserError as error:
        return error
    return None


def together(statements: list[dict[str, str]], world: int, seconds: float = 20) -> list[UserError | None]:
    """What `agree` raises in each of the ranks that came, which are the first ones."""
    store = HashStore()
    with ThreadPoolExecutor(len(statements)) as pool:
        calls = [pool.submit(outcome, agree, store, i, world, said, seconds) for i, said in enumerate(statements)]
        return [call.result() for call in calls]


def test_ranks_that_mean_the_same_go_on():
    assert together([statement(compose_run(TWO))] * 3, 3) == [None] * 3


def test_ranks_that_differ_all_stop_with_every_key_and_who():
    runs = [compose_run(TWO), compose_run([*TWO, "optim.lr=0.5", "scheme=w8a8"]), compose_run(TWO)]
    errors = together([statement(run) for run in runs], 3)
    assert all(error is not None and error.before_work for error in errors)
    assert [error.told_elsewhere for error in errors] == [False, True, True]
    keys = [line.partition(":")[0] for line in errors[0].problems]
    assert {"optim.lr", "scheme.name", "scheme.weight.bits", "scheme.input.bits", "scheme.input"} <= set(keys)
    assert "optim.lr: must be the same on all ranks, got 0.0001 on rank 0, 2; 0.5 on rank 1. Start" in str(errors[0])


def test_statement_holds_code_and_versions():
    said = statement(compose_run(PATHS))
    assert re.fullmatch("[0-9a-f]{12}", said["code of qat"])
    assert said["version of torch"] and said["trainer.max_steps"] == "100"
    errors = together([said, {**said, "code of qat": "0" * 12}], 2)
    assert errors[0].problems[0].startswith("code of qat: must be the same on all ranks")


def test_ranks_that_do_not_come_are_named():
    errors = together([statement(compose_run(PATHS))] * 2, 5, seconds=0.2)
    assert [error.before_work for error in errors] == [False, False]
    assert [error.told_elsewhere for error in errors] == [False, True]
    host = socket.gethostname()
    wanted = f"start: all 5 ranks must come within 0.2 s, got no word from rank 2-4 (rank 0-1 came, on {host})"
    assert str(errors[0]).startswith(wanted)


def test_span_reads_runs_of_numbers():
    assert span([7, 0, 1, 2, 3, 9]) == "0-3, 7, 9"


LAUNCHED = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("overrides", "environment", "match"),
    [
        ([], {}, r"needs 2 processes, got 1\. .*torchrun --nproc-per-node=2"),
        ([], {"WORLD_SIZE": "4"}, r"needs 2 processes, got 4"),
        (
            ["trainer.nodes=2", "trainer.devices=1"],
            {},
            r"devices: needs 1 processes on each machine, got 2 on",
        ),
        (["trainer.nodes=2"], {}, r"needs 4 processes, got 2\. .*--nnodes=2 --nproc-per-node=2"),
        ([], {"TORCHELASTIC_RUN_ID": None}, "launcher: several processes are started by torchrun, got another one"),
        (["trainer.accelerator=gpu", "trainer.devices=512"], {"WORLD_SIZE": "512"}, r"needs 512 GPUs on .*got \d+"),
    ],
)
def test_layout_that_is_not_the_launchers_is_refused(monkeypatch, overrides, environment, match):
    size = environment.get("WORLD_SIZE", "2")
    launched = {**LAUNCHED, "LOCAL_WORLD_SIZE": size, **environment}
    if not environment and not overrides:
        launched = dict.fromkeys(LAUNCHED)
    for name, value in launched.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=match) as caught:
        check_layout(compose_run([*TWO, *overrides]))
    assert caught.value.before_work


def test_layout_of_the_launcher_passes(monkeypatch):
    check_layout(compose_run(PATHS))
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    check_layout(compose_run(TWO))


def test_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port}: must be free on this machine, got one in use.*cluster\.port"
        ):
            open_store("127.0.0.1", port, True, 5, "cluster.port")


def test_first_machine_that_never_answers_is_named():
    with pytest.raises(UserError, match=r"127\.0\.0\.1: must answer on port \d+ within 1 s, got no answer"):
        open_store("127.0.0.1", free_port(), False, 1, "cluster.port")


def node_job(run: Path, **more) -> NodeJob:
    return NodeJob(run, 2, ("train", "recipe=tiny"), start_seconds=20, **more)


def test_machines_meet_and_do_what_the_first_one_found(tmp_path):
    job = node_job(tmp_path / "run", port=free_port())
    places = [Place(i, ("127.0.0.1", "127.0.0.1")) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(lambda place: meet(job, place, ["resume", "x"] if place.node == 0 else ["other"]), places)
        )
    assert found == [("resume", "x")] * 2


def test_machine_that_does_not_come_is_named(tmp_path):
    job = NodeJob(tmp_path / "run", 2, ("train",), port=free_port(), start_seconds=0.3)
    with pytest.raises(
        UserError, match=r"all 3 machines must come within 0\.3 s, got no word from node 1 \(b\), node 2"
    ):
        meet(job, Place(0, ("127.0.0.1", "b", "c")), ["train"])


@pytest.fixture
def stubs(tmp_path, monkeypatch) -> Stubs:
    stubs = Stubs(tmp_path / "bin", tmp_path / "runs/mine")
    monkeypatch.setattr(node, "TORCHRUN", tuple(stubs.torchrun))
    monkeypatch.setenv("PATH", stubs.environment()["PATH"])
    return stubs


def test_machine_starts_a_run_resumes_it_and_leaves_a_finished_one(tmp_path, stubs):
    job, place = node_job(tmp_path / "runs/mine"), Place(0, ("a",))
    stubs.plot("failed", "finished")
    assert run_node(job, place) == 1
    assert run_node(job, place) == 0
    assert run_node(job, place) == 0
    resumed = ["resume", str(tmp_path / "runs/mine"), "trainer.devices=2", "trainer.nodes=1"]
    assert [call["qat"] for call in stubs.calls] == [["train", "recipe=tiny"], resumed]
    assert stubs.calls[0]["torchrun"][:3] == ["--standalone", "--nproc-per-node=2", "--shutdown-timeout=300"]


def test_preempted_job_is_queued_again_by_slurm_once(tmp_path, stubs, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    stubs.plot("preempted")
    assert run_node(node_job(tmp_path / "runs/mine"), Place(0, ("a",))) == 75
    assert stubs.requeued == "requeue 77\n"
    assert run_node(node_job(tmp_path / "runs/mine", requeue=False), Place(0, ("a",))) == 75
    assert stubs.requeued == "requeue 77\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_to_stop_reaches_the_run(tmp_path, stubs, number):
    def send():
        while not stubs.calls:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    stubs.plot("wait")
    before = signal.getsignal(number)
    threading.Thread(target=send, daemon=True).start()
    assert run_node(node_job(tmp_path / "runs/mine"), Place(0, ("a",))) == 75
    assert signal.getsignal(number) is before


def test_run_does_not_outlive_a_killed_launcher(tmp_path, stubs):
    stubs.plot("wait")
    words = ["-m", "qat.cluster", "--run", str(tmp_path / "runs/mine"), "--processes", "1", "--", "train"]
    launcher = subprocess.Popen([sys.executable, *words], env=stubs.environment(), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    launcher.wait()
    # the end of the output is the end of torchrun, which holds it too
    assert launcher.stdout.read() == ""
    assert node.run_status(tmp_path / "runs/mine") == "preempted"


SLURM = ["cluster=slurm", "cluster.partition=gpu", "cluster.account=me", "cluster.memory_gib=0"]
SLURM += ['cluster.sbatch=[exclusive,"constraint=h100"]', "cluster.setup=[module load cuda]"]


def options_of(script: str) -> dict[str, str]:
    """The #SBATCH options of a script."""
    pairs = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE)
    return {name: shlex.split(value)[0] if value else "" for name, value in pairs}


def test_dry_run_prints_what_sbatch_gets(qat, tmp_path, stubs):
    words = ["recipe=tiny", *PATHS, *SLURM, "name=mine", f"runs_dir={tmp_path / 'runs'}", "trainer=fsdp2"]
    code, script, _ = qat("submit", "--dry-run", *words)
    assert code == 0
    assert not (tmp_path / "runs").exists()
    assert qat("submit", *words)[0] == 0
    assert (stubs.folder / "submitted.sh").read_text().strip() == script.strip()
    assert (tmp_path / "runs/.jobs/mine/config.yaml").read_text() == to_yaml(compose_run(words))
    options = options_of(script)
    assert options.pop("output").endswith("runs/.jobs/mine/%j_0_log.out")
    wanted = "account=me partition=gpu mem=0G exclusive= constraint=h100 nodes=1 ntasks-per-node=1 gpus-per-node=2"
    wanted += " job-name=mine time=240 signal=USR1@300 requeue= open-mode=append"
    assert options == dict(word.split("=") for word in wanted.split())
    assert "\nmodule load cuda\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_job_says_how_its_run_stands(tmp_path):
    run = tmp_path / "run"
    submitted = type("Submitted", (), {"state": "PENDING"})()
    job = submit.Job(submitted, run)
    assert job.state() == "waiting"
    submitted.state = "RUNNING"
    assert job.state() == "running"
    submitted.state = "COMPLETED"
    assert job.state() == "failed"
    run.mkdir()
    (run / "run_status.json").write_text('{"status": "finished"}')
    assert job.state() == "finished"


def wait(job: submit.Job) -> str:
    deadline = time.time() + 60
    while job.state() in ("waiting", "running") and time.time() < deadline:
        time.sleep(0.05)
    return job.state()


def test_local_job_goes_on_after_preemption_until_it_is_finished(tmp_path, stubs, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(stubs.folder))
    config = compose_run(["recipe=tiny", *PATHS, "name=mine", f"runs_dir={tmp_path / 'runs'}", "cluster=local"])
    stubs.plot("preempted", "finished")
    job = submit.submit(config, to_yaml(config), tmp_path / "runs/mine")
    assert wait(job) == "finished", job.log.read_text()
    first, second = (call["qat"] for call in stubs.calls)
    assert first == ["train", "--config-file", str(tmp_path / "runs/.jobs/mine/config.yaml")]
    assert second == ["resume", str(tmp_path / "runs/mine"), "trainer.devices=1", "trainer.nodes=1"]
    with pytest.raises(UserError, match="must not be finished"):
        submit.submit(config, to_yaml(config), tmp_path / "runs/mine")


@pytest.mark.parametrize(("file", "nodes"), [("one_node.sbatch", 1), ("several_nodes.sbatch", 2)])
def test_template_asks_for_what_submit_asks_for(qat, file, nodes):
    recipe = ["recipe=llama3_8b_w4a16_g128_fsdp2", "cluster=slurm", f"trainer.nodes={nodes}"]
    ours, theirs = options_of(qat("submit", "--dry-run", *recipe)[1]), options_of((TEMPLATES / file).read_text())
    for name in ("output", "job-name"):
        del ours[name], theirs[name]
    assert theirs == ours


@pytest.mark.parametrize(("file", "nodes"), [("one_node.sbatch", 1), ("several_nodes.sbatch", 2)])
def test_template_runs_every_machine_and_requeues(tmp_path, stubs, monkeypatch, file, nodes):
    """Under submitit's local executor, in bash, with srun, scontrol and torchrun played by scripts."""
    from submitit import LocalExecutor

    monkeypatch.chdir(tmp_path)
    number = str(free_port() - 20000)
    slurm = {"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": str(nodes)}
    for name, value in stubs.environment(SLURM_JOB_NODELIST=",".join(["127.0.0.1"] * nodes), **slurm).items():
        monkeypatch.setenv(name, value)
    # a local job by its own name, so that the template's own requeueing is seen
    stubs.script("go", f"#!/bin/bash\nunset SUBMITIT_EXECUTOR\nexec bash {TEMPLATES / file} mine recipe=tiny seed=3\n")
    stubs.plot("preempted")
    executor = LocalExecutor(tmp_path / "logs")
    executor.update_parameters(timeout_min=1, stderr_to_stdout=True)
    job = submit.Job(executor._submit_command(str(stubs.folder / "go")), tmp_path / "runs/mine")
    assert wait(job) == "preempted", job.log.read_text()
    assert stubs.requeued == f"requeue {number}\n"
    assert len(stubs.calls) == nodes
    more = ["trainer.nodes=2"] if nodes == 2 else []
    words = ["train", "recipe=tiny", "seed=3", "name=mine", "trainer.devices=8", *more]
    assert all(call["qat"] == words for call in stubs.calls)
    if nodes == 2:
        ranks = sorted(word for call in stubs.calls for word in call["torchrun"] if word.startswith("--node-rank"))
        assert ranks == ["--node-rank=0", "--node-rank=1"]


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("cluster=pbs", "must be a file in conf/cluster"),
        ("cluster.kind=pbs", "cluster.kind: must be one of local, slurm"),
        ("cluster.signal_seconds=14400", "must be less than the 14400 s of cluster.time_minutes"),
        ("cluster.port=65535", "cluster.port: must be at most 65534"),
        ('cluster.sbatch=["time=3"]', "must not repeat another setting.*Use cluster.time_minutes"),
        ("cluster.sbatch=[3x]", "must be name=value or name"),
        ("trainer.nodes=2", "cluster=local is one machine, got 2"),
        ("trainer.memory_gib=0", "trainer.memory_gib: must be finite and above 0"),
        ("trainer.timeout_minutes=nan", "trainer.timeout_minutes: must be finite and above 0"),
    ],
)
def test_submit_refuses_a_mistake(qat, override, match):
    code, out, error = qat("submit", "recipe=tiny", "trainer=ddp", *PATHS, override)
    assert (code, out) == (2, "")
    assert re.search(match, error)


def test_submit_without_slurm_says_so(qat, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, error = qat("submit", "recipe=tiny", *PATHS, "cluster=slurm", f"runs_dir={tmp_path}")
    assert code == 2
    assert "cluster=slurm: needs SLURM's srun and sbatch, got neither" in error
