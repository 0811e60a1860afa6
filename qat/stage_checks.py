"""What `checks.py` asks of the schedule of phases and of the stages of a training.

Kinds of stages and phases are known here by name; what they do is in `stages.py` and `train/phases.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from qat.config import RunConfig
from qat.errors import nearest, problem
from qat.stage_config import PhaseConfig, StageConfig, length

STAGES = ("blockwise", "end_to_end", "scales")  # in the order they may stand in
PHASES = ("observe", "fake_quantize", "freeze_scales", "bits")


def phases(config: RunConfig) -> Iterator[str]:
    """The schedule is sorted, inside the run, and quantizes at some point."""
    schedule, previous = config.phases.schedule, 0
    lengths = [
        length(stage, config.trainer.max_steps) for stage in config.stages.schedule if stage.kind == "end_to_end"
    ]
    last_step = max(0, min(lengths, default=1) - 1)
    for i, entry in enumerate(schedule):
        where = f"phases.schedule.{i}"
        if entry.do not in PHASES:
            yield problem(
                f"{where}.do", f"must be one of {', '.join(PHASES)}", f"'{entry.do}'", nearest(entry.do, PHASES)
            )
        if entry.at < 0 or entry.at > last_step:
            fix = "Move the entry, or train longer with trainer.max_steps."
            wanted = f"must be a step of every end_to_end stage, from 0 to {last_step}"
            yield problem(f"{where}.at", wanted, entry.at, fix)
        if entry.at < previous:
            yield problem(
                f"{where}.at", f"entries are sorted by step, the one before is at {previous}", entry.at, "Sort."
            )
        previous = entry.at
        if (entry.do == "bits") != (entry.bits is not None):
            got = f"do: {entry.do} with bits: {entry.bits}"
            yield problem(where, "bits stands with do: bits and nowhere else", got, "Add or drop bits.")
        if entry.bits is not None and not 2 <= entry.bits <= 8:
            yield problem(f"{where}.bits", "must be a whole number from 2 to 8", entry.bits, "Use 8, 6, then 4.")
    if not any(entry.do == "fake_quantize" for entry in schedule):
        fix = "Add {at: 0, do: fake_quantize}."
        yield problem("phases.schedule", "must hold a fake_quantize entry", f"{len(schedule)} others", fix)


def stages(config: RunConfig) -> Iterator[str]:
    """Stages are known, stand in order, have what they need and nothing that they would ignore."""
    schedule = config.stages.schedule
    if not schedule:
        yield problem("stages.schedule", "must hold a stage", "none", "Use stages=default.")
    for i, stage in enumerate(schedule):
        where = f"stages.schedule.{i}"
        if stage.kind not in STAGES:
            hint = nearest(stage.kind, STAGES)
            yield problem(f"{where}.kind", f"must be one of {', '.join(STAGES)}", f"'{stage.kind}'", hint)
            return
        yield from _stage_values(where, stage)
    if config.trainer.strategy == "fsdp2" and any(stage.rank is not None for stage in schedule):
        fix = "Drop rank, since fsdp2 deals the optimizer states out too, or use trainer.strategy=ddp."
        yield problem("stages.schedule", "a rank needs whole weights on every process", "fsdp2", fix)
    kinds = [STAGES.index(stage.kind) for stage in schedule]
    if kinds != sorted(kinds):
        got = ", ".join(stage.kind for stage in schedule)
        yield problem("stages.schedule", f"stages stand in the order {', '.join(STAGES)}", got, "Sort them.")
    if "blockwise" in (stage.kind for stage in schedule):
        yield from _with_blockwise(config)
    elif not any(stage.kind == "end_to_end" for stage in schedule) and config.phases.schedule != [
        PhaseConfig(0, "fake_quantize")
    ]:
        yield problem("phases.schedule", "phases are of end_to_end stages", "no such stage", "Use phases=default.")


def _stage_values(where: str, stage: StageConfig) -> Iterator[str]:
    for name, least in (("steps", 1), ("windows", 2), ("rank", 1)):
        value = getattr(stage, name)
        if value is not None and value < least:
            yield problem(f"{where}.{name}", f"must be at least {least}", value, f"Use {least} or more.")
    for name in ("lr", "scale_lr", "alpha"):
        value = getattr(stage, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            yield problem(f"{where}.{name}", "must be finite and above 0", value, "Use a small positive number.")
    if stage.windows is not None and stage.kind != "blockwise":
        fix = "Drop windows; other stages see all of the training text."
        yield problem(f"{where}.windows", "only blockwise stages have it", f"kind: {stage.kind}", fix)
    if stage.rank is not None and stage.kind != "end_to_end":
        fix = "Drop rank: blocks train their weights, and scales hold them."
        yield problem(f"{where}.rank", "only end_to_end stages have it", f"kind: {stage.kind}", fix)
    if stage.alpha is not None and stage.rank is None:
        yield problem(f"{where}.alpha", "needs a rank", "none", "Add rank: 32, or drop alpha.")


def _with_blockwise(config: RunConfig) -> Iterator[str]:
    """What does not go with blocks that are trained before the model is."""
    if config.trainer.strategy == "fsdp2":
        fix = "Use trainer.strategy=ddp: a process holds one block at a time on its device."
        yield problem("stages.schedule", "blockwise stages need a whole model on every process", "fsdp2", fix)
    later = [entry.do for entry in config.phases.schedule if entry.do in ("observe", "bits")]
    if later:
        fix = "Use phases=default or freeze, or drop the blockwise stage."
        wanted = "after a blockwise stage the scales it trained are kept, so nothing is observed and no width changes"
        yield problem("phases.schedule", wanted, ", ".join(later), fix)
