"""The trainings of a run, one stage after the other: what each starts from, what it leaves, and the float control.

    checkpoints/stage-0-blockwise/    step-*, then final, until the next stage has published its own
    checkpoints/                      step-*, then final, of the last stage

A run that goes on takes the newest `final` and begins the stage after it, or goes on inside that. Each stage counts its
steps from 0; metrics.jsonl counts them through.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qat import build, checkpoint, ranks
from qat.checkpoints import Checkpoints
from qat.config import RunConfig
from qat.data import TextWindows
from qat.evaluate.perplexity import score
from qat.metrics import Metrics
from qat.progress import is_main, say
from qat.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """The model, whole and on the CPU (under fsdp2 on rank 0 only), and a line {kind, steps, tokens, step_seconds} for
    each stage."""

    model: Any
    stages: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage["steps"] for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens that all processes saw in all stages."""
        return sum(stage["tokens"] for stage in self.stages)

    @property
    def step_seconds(self) -> list[float]:
        """Of every step."""
        return [seconds for stage in self.stages for seconds in stage["step_seconds"]]

    def summary(self) -> list[dict[str, Any]]:
        """The stages for results.json."""
        return [{key: stage[key] for key in ("kind", "steps", "tokens")} for stage in self.stages]


def train(
    config: RunConfig,
    folder: RunFolder,
    student: nn.Module,
    teacher: nn.Module | None,
    floating: nn.Module,
    windows: TextWindows,
) -> Trained:
    """All stages of the run, or what is left of them; `floating` is the model before quantization."""
    metrics = build.metrics(config, folder.path, asdict(config), folder.manifest.get("wandb_run"))
    folder.record(wandb_run=metrics.run_id)
    held_out = windows.evaluation[: max(1, 4096 // config.data.block_size)]

    def validate(model: nn.Module) -> float:
        return score(
            model, held_out, config.evaluate.batch_size, config.evaluate.precision, title="validate"
        ).perplexity

    places = list(range(len(config.stages.schedule)))
    work = _Work(config, places, folder.path / "checkpoints", teacher, floating, windows, metrics, "QAT", validate)
    trained = _through(work, student)
    metrics.close()
    return trained


def begun(config: RunConfig, folder: RunFolder) -> bool:
    """Whether a state stands in the run folder that `train` will take or go on from; all processes call."""
    where, places = folder.path / "checkpoints", list(range(len(config.stages.schedule)))
    finals = [_stage_folder(config, where, places, place) / "final" for place in places]
    is_published = any(checkpoint.read_final(final) is not None for final in finals) if is_main() else None
    first = Checkpoints(_stage_folder(config, where, places, 0), config.trainer.checkpoint_keep)
    return ranks.from_main(is_published) or first.newest()[0] is not None


def train_control(
    config: RunConfig, folder: RunFolder, floating: nn.Module, teacher: nn.Module | None, windows: TextWindows
) -> nn.Module:
    """The float model trained end to end as the student is: the same windows, in the same order, loss and optimizer.

    Taken from evaluate.controls when an earlier run has left it there.
    """
    places = [place for place, stage in enumerate(config.stages.schedule) if stage.kind == "end_to_end"]
    metrics = Metrics(folder.path / "control")
    checkpoints = folder.path / "control/checkpoints"
    if config.evaluate.controls is not None:
        checkpoints = Path(config.evaluate.controls) / control_key(config, folder.manifest["fingerprints"])
    folder.record(control=str(checkpoints / "final"))
    work = _Work(config, places, checkpoints, teacher, floating, windows, metrics, "control", is_float=True)
    return _through(work, copy.deepcopy(floating)).model


def control_key(config: RunConfig, fingerprints: dict[str, str]) -> str:
    """A hash of all that determines the float control; `fingerprints` are those of its text and its model."""
    numbers = ("precision", "max_steps", "batch_size", "accumulate", "devices", "nodes")
    made_by = {
        "fingerprints": fingerprints,
        "seed": config.seed,
        "trainer": {name: getattr(config.trainer, name) for name in numbers},
        "optim": asdict(config.optim),
        "distill": asdict(config.distill),
        "stages": {i: asdict(s) for i, s in enumerate(config.stages.schedule) if s.kind == "end_to_end"},
    }
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Work:
    """What stages have in common; `places` are those of config.stages.schedule that are done here."""

    config: RunConfig
    places: list[int]
    checkpoints: Path
    teacher: nn.Module | None
    floating: nn.Module
    windows: TextWindows
    metrics: Metrics
    title: str
    validate: Callable[[nn.Module], float] | None = None
    is_float: bool = False

    def folder(self, place: int) -> Path:
        """Where a stage saves and publishes."""
        return _stage_folder(self.config, self.checkpoints, self.places, place)

    def name(self, place: int) -> str:
        """For people: the title, with the kind where there are several stages."""
        return f"{self.title} {self.config.stages.schedule[place].kind}" if len(self.places) > 1 else self.title


def _stage_folder(config: RunConfig, checkpoints: Path, places: list[int], place: int) -> Path:
    kind = config.stages.schedule[place].kind
    return checkpoints if place == places[-1] else checkpoints / f"stage-{place}-{kind}"


def _through(work: _Work, model: nn.Module) -> Trained:
    """Every stage that has not been published, each published when it ends."""
    done, stages = _published(work, model)
    for place in work.places[done:]:
        kind, folder = work.config.stages.schedule[place].kind, work.folder(place)
        work.metrics.begin(kind, sum(stage["steps"] for stage in stages))
        store = Checkpoints(folder, work.config.trainer.checkpoint_keep)
        result = _stage(work, place, model, store)
        model = result.model
        stages = [*stages, {"kind": kind} | {key: value for key, value in vars(result).items() if key != "model"}]
        if is_main():
            checkpoint.save_final(model, folder / "final", {"stages": stages})
            store.clear()
            for other in work.places[: work.places.index(place)]:
                shutil.rmtree(work.folder(other), ignore_errors=True)
    return Trained(model.eval(), stages)


def _published(work: _Work, model: nn.Module) -> tuple[int, list[dict[str, Any]]]:
    """How many stages had ended, with their lines; `model` takes the state of the last of them."""
    for done in range(len(work.places), 0, -1):
        final = work.folder(work.places[done - 1]) / "final"
        facts = ranks.from_main(checkpoint.read_final(final) if is_main() else None)
        if facts is None:
            continue
        say(f"{work.name(work.places[done - 1])}: had ended; taking {final}")
        if not any(parameter.is_meta for parameter in model.parameters()):  # under fsdp2 rank 0 deals it out
            checkpoint.load_state(model, final / checkpoint.WEIGHTS)
        return done, facts["stages"]
    return 0, []


def _stage(work: _Work, place: int, model: nn.Module, store: Checkpoints) -> Any:
    """Train one stage to its end, from the newest checkpoint in `store` if there is one."""
    from qat.train.blockwise import fit_blocks
    from qat.train.fit import FitResult, fit

    stage = work.config.stages.schedule[place]
    if build.optimizer(work.config, stage).steps == 0:
        return FitResult(model.eval(), 0, 0, [])
    if stage.kind == "blockwise":
        how = (*build.blockwise(work.config, place), work.metrics, store, work.name(place))
        return fit_blocks(model, work.teacher or work.floating, work.windows.train, *how)
    options = build.training(work.config, place) | ({"schedule": []} if work.is_float else {})
    return fit(
        *(model, work.teacher, work.windows.train),
        **options, metrics=work.metrics, score=work.validate, checkpoints=store, title=work.name(place),
    )  # fmt: skip
