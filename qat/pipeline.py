"""One run from config to report:

    load -> coverage -> calibrate -> train -> control -> evaluate -> export
         -> verify (fresh process) -> generate -> report

Everything lands in the run folder, and a run that stopped anywhere goes on from what stands there (`resume`). What
later commands rebuild a run from is in `rebuild`.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qat import build, checkpoint, ranks, signals, stages
from qat.config import RunConfig
from qat.convert import digests, pack_model
from qat.data import GRAM, TextWindows, fingerprint, load_windows
from qat.errors import UserError, problem
from qat.evaluate.perplexity import Score, recovery, score
from qat.export import write_export
from qat.insert import Coverage
from qat.memory import peak_memory_gib, return_freed_memory
from qat.paths import write_json_atomic
from qat.progress import is_main, say
from qat.run_folder import RunFolder
from qat.stage_config import length

PROTOCOL = (
    "windows of {block} tokens that do not overlap, first token of each not scored, no BOS, {tokens} tokens scored, "
    "{precision} matmuls, all rows by the same function"
)


def run(config: RunConfig, resolved: str, resume: Resume | None = None) -> Path:
    """Do a whole run, or with `resume` what is left of one; returns its folder. `resolved` is the config as YAML.

    Raises:
        UserError: what the user can mend.
        signals.Stopped: the run was asked to stop; it can be resumed.
    """
    signals.listen()
    threads = build.use_machine(config)
    ranks.connect(config.trainer.accelerator, config.trainer.timeout_minutes)
    # a model or text that is refused leaves no folder behind, and an earlier run of that name untouched
    student, tokenizer, windows, coverage, floating = _prepare(config)
    with _claimed(config, resolved, threads, resume) as folder:
        _fingerprint(folder, floating, windows, resume)
        if resume is not None:
            folder.goes_on(resolved)
        teacher = _calibrate(config, folder, student, windows, coverage, floating)
        _enter(folder, "training", step=0)
        train = stages.train(config, folder, student, teacher, floating, windows)
        control = _train_control(config, folder, floating, teacher, windows)
        ranks.disconnect()
        if not is_main():
            return folder.path
        # one reference to the trained model, so that `del` below really frees it
        student, train = train.model, replace(train, model=None)
        _enter(folder, "evaluating", train.steps)
        scores = {"fake_quant": _score(config, student, windows, floating, "evaluate QAT")}
        packed = pack_model(student, coverage, floating.config.to_dict(), build.checks.kv_spec(config.kv))
        del student
        if config.evaluate.baselines:
            _baselines(config, floating, control, windows, scores)
        results = _results(config, scores, windows, train, coverage, control is None)
        del control
        _enter(folder, "exporting", train.steps)
        export = folder.path / "export" / config.export.format
        # an export of this run that an earlier process left is replaced
        write_export(packed, digests(packed), tokenizer, export, _overwriting(config), results)
        del packed, floating, teacher
        return_freed_memory()
        _enter(folder, "verifying", train.steps)
        parity = _fresh_process("verify", str(folder.path))
        answers = _answers(config, export)
        results["decode"] = _decode_speed(config, export)
        _finish(config, folder, results, json.loads(parity), answers)
        folder.status("finished", stage="finished", step=train.steps)
    return folder.path


@dataclass(frozen=True)
class Resume:
    """Going on with a run; `forced` lets text and model differ from those it began with."""

    forced: bool = False


@contextmanager
def _claimed(config: RunConfig, resolved: str, threads: int, resume: Resume | None) -> Iterator[RunFolder]:
    """Hold the run folder, and record in it how the run ended if it did not end well."""
    folder = RunFolder.create(config, resolved, threads) if resume is None else RunFolder.reopen(config)
    say(f"run folder: {folder.path}")
    try:
        yield folder
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        status = error.status if isinstance(error, signals.Stopped) else status
        if folder.where:  # a resume that was refused leaves all as it was
            folder.status(status, **folder.where, error=str(error))
        raise


def _fingerprint(folder: RunFolder, floating: nn.Module, windows: TextWindows, resume: Resume | None) -> None:
    """Record which text and weights the run is of; a run that goes on must find the same."""
    now = {"data": fingerprint(windows), "model": checkpoint.weights_fingerprint(floating)} if is_main() else None
    now, before = ranks.from_main((now, folder.manifest.get("fingerprints")))
    if resume is not None and before is not None and not resume.forced:
        changed = [name for name in now if now[name] != before[name]]
        fix = "Bring back what the run began with, or add --force to go on with what is there."
        if changed:
            raise UserError(
                *(problem(f"{n}.path", "must be what the run began with", "other content", fix) for n in changed)
            )
    folder.record(fingerprints=now)


def _enter(folder: RunFolder, stage: str, step: int) -> None:
    """The next stage of the run, unless a request to stop came in the one before."""
    signals.poll()
    folder.stage(stage, step)


def _overwriting(config: RunConfig) -> RunConfig:
    return replace(config, export=replace(config.export, overwrite=True))


def _prepare(config: RunConfig) -> tuple[Any, Any, TextWindows, Coverage, Any]:
    """Load model and text and insert the training layers; whatever is wrong with them is refused here."""
    say(f"load: {config.model.path}")
    floating, tokenizer = build.float_model(config)
    windows = load_windows(config.data, tokenizer)
    for line in windows.warnings:
        say(f"warning: {line}")
    student = copy.deepcopy(floating)
    coverage = build.quantize_layers(student, config)
    say(
        f"coverage: {coverage.coverage:.2%} of {coverage.weights / 1e6:.1f} M weights, "
        f"{coverage.bits_per_weight:.2f} bits per weight, {coverage.bytes / 1e6:.1f} MB packed"
    )
    build.check_ptq(student, coverage, windows.train, config)
    return student, tokenizer, windows, coverage, floating


def _calibrate(
    config: RunConfig, folder: RunFolder, student: Any, windows: TextWindows, coverage: Coverage, floating: Any
) -> nn.Module | None:
    """Record what was loaded, give every static grid its first scale, and return the teacher."""
    from qat.train.calibrate import calibrate
    from qat.train.fit import as_teacher

    write_json_atomic(folder.path / "coverage.json", coverage.to_dict())
    calibration = windows.train[: config.fake_quant.calibration_batches * config.trainer.batch_size]
    calibrate(student, calibration, config.trainer.batch_size)
    # what a training has saved holds what the method found
    if config.ptq.method == "none" or not stages.begun(config, folder):
        folder.record(ptq=build.apply_ptq(student, windows.train, config))
    steps = [length(stage, config.trainer.max_steps) for stage in config.stages.schedule if stage.kind != "blockwise"]
    has_teacher = config.distill.kl_weight > 0 and any(steps)
    teacher = as_teacher(floating, config.trainer.precision) if has_teacher else None
    folder.record(
        data={"path": config.data.path, "train_windows": len(windows.train), "eval_windows": len(windows.evaluation)}
    )
    folder.record(model={"path": config.model.path, "parameters": coverage.weights})
    return teacher


def _train_control(
    config: RunConfig, folder: RunFolder, floating: nn.Module, teacher: nn.Module | None, windows: TextWindows
) -> nn.Module | None:
    """The float model trained as the student was; None where that is the float model itself."""
    # nothing moves a float model but cross entropy, end to end
    end_to_end = [stage for stage in config.stages.schedule if stage.kind == "end_to_end"]
    moves = config.distill.ce_weight > 0 and any(length(stage, config.trainer.max_steps) for stage in end_to_end)
    if not (config.evaluate.baselines and moves):
        return None
    _enter(folder, "training the control", step=0)
    return stages.train_control(config, folder, floating, teacher, windows)


def _score(config: RunConfig, model: nn.Module, windows: TextWindows, reference: nn.Module | None, title: str) -> Score:
    evaluate = config.evaluate
    return score(model, windows.evaluation, evaluate.batch_size, evaluate.precision, reference, title)


def _baselines(
    config: RunConfig, floating: nn.Module, control: nn.Module | None, windows: TextWindows, scores: dict[str, Score]
) -> None:
    """Score the control, and round-to-nearest of it and of the float model, which `fake_quant` was compared with."""
    theirs = scores["fake_quant"].reference_perplexity
    assert theirs is not None
    scores["float"] = Score(theirs, scores["fake_quant"].tokens)
    scores["rtn"] = _score(config, _rtn(config, floating, windows), windows, floating, "evaluate RTN")
    if control is None:
        scores["control"], scores["rtn_of_control"] = scores["float"], scores["rtn"]
        return
    scores["control"] = _score(config, control, windows, floating, "evaluate control")
    rtn_of_control = _rtn(config, control, windows)
    scores["rtn_of_control"] = _score(config, rtn_of_control, windows, floating, "evaluate RTN of control")


def _rtn(config: RunConfig, model: nn.Module, windows: TextWindows) -> nn.Module:
    from qat.train.calibrate import calibrate

    rounded = copy.deepcopy(model)
    build.rtn_layers(rounded, config)
    # no phase watches for it later
    batches = max(1, config.fake_quant.calibration_batches)
    calibration = windows.train[: batches * config.trainer.batch_size]
    calibrate(rounded, calibration, config.trainer.batch_size)
    return rounded


def _results(
    config: RunConfig,
    scores: dict[str, Score],
    windows: TextWindows,
    train: stages.Trained,
    coverage: Coverage,
    control_is_float: bool,
) -> dict[str, Any]:
    """results.json as known before the export; `packed` is filled in by `_finish`."""
    names = ("float", "control", "rtn", "rtn_of_control", "fake_quant", "packed")
    perplexity = {name: scores[name].perplexity if name in scores else None for name in names}
    block, took = config.data.block_size, train.step_seconds
    return {
        "name": config.name,
        "scheme": config.scheme.name,
        "method": "qat" if train.steps else config.ptq.method,
        "kv": coverage.kv,
        "perplexity": perplexity,
        "kl_to_float": {name: scores[name].kl if name in scores else None for name in names},
        "top1_to_float": {name: scores[name].top1 if name in scores else None for name in names},
        "recovery": None,
        "control_is_float": control_is_float,
        "tokens": {"train": train.tokens, "eval": scores["fake_quant"].tokens},
        "steps": train.steps,
        "stages": train.summary(),
        "bits_per_weight": coverage.bits_per_weight,
        "bytes": {"float": 4 * coverage.weights, "packed": coverage.bytes},
        "seconds": {
            "step_median": statistics.median(took) if took else None,
            "training": sum(took),
            "stages": [sum(stage["step_seconds"]) for stage in train.stages],
        },
        "tokens_per_second": train.tokens / sum(took) if took else None,
        "peak_memory_gib": peak_memory_gib(),
        "overlap": {"tokens": GRAM, "share": windows.overlap},
        "protocol": PROTOCOL.format(
            block=block, tokens=scores["fake_quant"].tokens, precision=config.evaluate.precision
        ),
        "seed": config.seed,
        "notes": [*windows.warnings, *_repetition(train.tokens, windows)],
    }


def _repetition(tokens: int, windows: TextWindows) -> list[str]:
    """A note when the training text was seen more than once: with little text, QAT memorises it."""
    passes = tokens / windows.train.numel()
    return [f"the training text ({windows.train.numel()} tokens) was seen {passes:.1f} times"] if passes > 1 else []


def _finish(config: RunConfig, folder: RunFolder, results: dict, parity: dict, answers: list[dict]) -> None:
    """Fill in what the fresh process found, write results.json and the report, refresh the model card."""
    from qat.export import write_card
    from qat.report.page import write_report

    packed = parity["perplexity"]["packed"]
    results["perplexity"]["packed"] = packed
    results["bytes"]["packed"] = parity["bytes"]
    table = results["perplexity"]
    if table["control"] and table["rtn_of_control"]:
        results["recovery"] = recovery(packed, table["control"], table["rtn_of_control"])
    results["rows"] = _rows(results)
    results["answers"] = answers
    results["seconds"]["total"] = folder.seconds
    write_json_atomic(folder.path / "results.json", results)
    write_card(folder.path / "export" / config.export.format, config, results)
    write_report(folder.path)
    if parity["verdict"] != "equal":
        exact = ("scales_equal", "zero_points_equal", "digest_equal")
        wrong = [t["name"] for t in parity["tensors"] if t["mismatched_codes"] or not all(t[key] for key in exact)]
        wrong += parity["different_floats"]
        fix = "Do not ship this export; report the scheme."
        wanted, given = "served codes must be trained codes", f"others in {', '.join(wrong[:10])}"
        if not wrong:
            fake = parity["perplexity"]["fake_quant"]
            wanted, given = "packed perplexity must be within 0.1 % of the trained one", f"{packed:.4f} for {fake:.4f}"
        raise UserError(problem("parity", wanted, given, fix), before_work=False)


def _rows(results: dict) -> list[dict[str, Any]]:
    """The table: perplexity, bits per weight and bytes of each model."""
    rows = []
    for name, perplexity in results["perplexity"].items():
        is_float = name in ("float", "control")
        rows.append(
            {
                "name": name,
                "perplexity": perplexity,
                "bits_per_weight": 32.0 if is_float else results["bits_per_weight"],
                "bytes": results["bytes"]["float" if is_float else "packed"],
            }
        )
    return rows


def _answers(config: RunConfig, export: Path) -> list[dict]:
    if not config.export.prompts:
        return []
    arguments = [str(export), "--json", f"--max-new-tokens={config.export.max_new_tokens}"]
    return json.loads(_fresh_process("generate", *arguments, *config.export.prompts))


def _decode_speed(config: RunConfig, export: Path) -> dict[str, Any] | None:
    """Tokens per second of the export, its threads and what ran it; None unless asked for."""
    tokens = config.evaluate.decode_tokens
    return json.loads(_fresh_process("generate", str(export), f"--measure={tokens}")) if tokens else None


def _fresh_process(*arguments: str) -> str:
    """Run a qat command in a new interpreter: what is read back owes nothing to this process. Returns its stdout."""
    command = [sys.executable, "-m", "qat.cli.main", *arguments]
    # a process of its own, not a rank of the job that trained
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            out = _listening(process)
        except BaseException:
            process.terminate()
            raise
    if process.returncode not in (0, 1) or not out.strip():
        fix = f"Run it by hand: qat {' '.join(arguments)}"
        wanted = "must succeed in a fresh process"
        raise UserError(problem(f"qat {arguments[0]}", wanted, f"exit {process.returncode}", fix), before_work=False)
    return out


def _listening(process: subprocess.Popen[str]) -> str:
    """What a process prints until it ends, while requests to stop are heard."""
    while True:
        try:
            return process.communicate(timeout=0.5)[0]
        except subprocess.TimeoutExpired:
            signals.poll()


def rebuild(config: RunConfig, folder: Path) -> tuple[Any, Coverage]:
    """The finished training model of a run folder: float structure, the plan's layers, and the final checkpoint."""
    model, _ = build.float_model(config)
    coverage = build.quantize_layers(model, config)
    checkpoint.load_state(model, folder / "checkpoints/final" / checkpoint.WEIGHTS)
    return model.eval().requires_grad_(False), coverage
