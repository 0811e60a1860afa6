"""The loop: a Lightning Trainer with our callbacks around `CausalLMModule`. The only entry from outside this room."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from qat import ranks, signals
from qat.checkpoints import Checkpoints
from qat.metrics import Metrics
from qat.progress import bar, say
from qat.train.callbacks import CheckpointCallback, MetricsCallback, ValidationCallback
from qat.train.data import train_loader
from qat.train.losses import LossWeights
from qat.train.low_rank import attach, merge
from qat.train.module import CausalLMModule, OptimOptions, choose_trained
from qat.train.phases import PhaseEntry
from qat.train.sharding import gathered
from qat.train.state import begin_at, restore_model


@dataclass(frozen=True)
class FitOptions:
    """Where, what (see `choose_trained`) and how long to train; meanings in TrainerConfig and StageConfig."""

    accelerator: str = "cpu"
    strategy: str = "single"
    devices: int = 1
    nodes: int = 1
    precision: str = "bf16"
    max_steps: int = 100
    batch_size: int = 2
    accumulate: int = 1
    gradient_checkpointing: bool = False
    log_every: int = 1
    layer_stats_every: int = 20
    eval_every: int = 0
    checkpoint_every: int = 0
    max_skipped_steps: int = 5
    loader_workers: int = 0
    seed: int = 0
    trains: str = "all"
    rank: int | None = None
    alpha: float = 1.0


@dataclass(frozen=True)
class FitResult:
    """The trained model, whole and on the CPU (under fsdp2 on rank 0 only); steps, tokens of all processes, seconds."""

    model: Any
    steps: int
    tokens: int
    step_seconds: list[float]


def fit(
    student: nn.Module,
    teacher: nn.Module | None,
    windows: Tensor,
    loss: LossWeights,
    optim: OptimOptions,
    schedule: Sequence[PhaseEntry],
    options: FitOptions,
    metrics: Metrics,
    score: Callable[[nn.Module], float] | None = None,
    checkpoints: Checkpoints | None = None,
    title: str = "train",
) -> FitResult:
    """Train `student` on windows [n, block] for `options.max_steps` optimizer steps; use the result's `model` after.

    Args:
        teacher: float model for the KL term, or None.
        schedule: phases; empty trains a float model.
        score: held-out perplexity, for `eval_every`.
        checkpoints: where to save, and to go on from the newest one found there; None neither saves nor resumes.

    Raises:
        signals.Stopped: the run was asked to stop; with `checkpoints`, the state is saved.
    """
    _quiet_lightning()
    L.seed_everything(options.seed, verbose=False)
    module = CausalLMModule(student, teacher, loss, optim, schedule, options.max_skipped_steps)
    student.train()
    if options.rank is not None:
        attach(student, options.rank, options.alpha, options.seed)
    choose_trained(student, options.trains)
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    found, skipped = checkpoints.newest() if checkpoints else (None, [])
    for line in skipped:
        say(f"warning: {line}")
    step, windows_done = (found.facts["step"], found.facts["windows"]) if found else (0, 0)
    if found and found.facts["world"] != ranks.world():
        was = found.facts["world"]
        say(
            f"warning: {was} processes before, {ranks.world()} now: the same windows in the same order, other last bits"
        )
    metrics.truncate(step)
    with bar(title, options.max_steps, step) as advance:
        watcher = MetricsCallback(metrics, advance, options.log_every, options.layer_stats_every)
        callbacks: list[L.Callback] = [watcher]
        if options.eval_every and score is not None:
            callbacks.append(ValidationCallback(metrics, score, options.eval_every))
        if checkpoints is not None:
            checkpoints.sweep()
            per_step = options.accumulate * options.batch_size * ranks.world()
            callbacks.append(CheckpointCallback(checkpoints, options.checkpoint_every, watcher, found, per_step))
        if found and step >= options.max_steps:  # stopped after its last step; Lightning would call nobody
            restore_model(found, student)
            watcher.load_state(found.facts["watcher"], {})
            return _result(student, options, step, watcher)
        trainer = _trainer(options, callbacks)
        begin_at(trainer, step)
        loader = train_loader(
            *(windows, options.batch_size, options.seed, ranks.rank(), ranks.world()),
            done=windows_done,
            workers=options.loader_workers,
        )
        _run(trainer, module, loader)
    trained = gathered(module.student, student) if options.strategy == "fsdp2" else student.cpu()
    return _result(trained, options, trainer.global_step, watcher)


def _result(trained: nn.Module, options: FitOptions, steps: int, watcher: MetricsCallback) -> FitResult:
    if options.rank is not None:
        merge(trained)
    return FitResult(trained.eval(), steps, watcher.tokens, watcher.step_seconds)


def _run(trainer: L.Trainer, module: CausalLMModule, loader: Any) -> None:
    try:
        trainer.fit(module, loader)
    except SystemExit as ended:  # how Lightning passes on a Ctrl-C
        cause = ended.__context__
        raise (cause if isinstance(cause, KeyboardInterrupt) else ended) from None
    finally:
        signals.listen()
    if trainer.should_stop:
        signals.poll()


def as_teacher(model: nn.Module, precision: str) -> nn.Module:
    """A frozen copy of the float model; under bf16 its matmul weights are stored as bf16 (what autocast would use)."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if precision == "bf16":
        table = teacher.get_input_embeddings().weight  # type: ignore[operator]
        linear = {id(module.weight) for module in teacher.modules() if isinstance(module, nn.Linear)}
        for parameter in teacher.parameters():
            if parameter is not table and (id(parameter) in linear or parameter.dim() == 3):  # 3: experts
                parameter.data = parameter.data.bfloat16()
    return teacher


def _trainer(options: FitOptions, callbacks: list[L.Callback]) -> L.Trainer:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    world = options.devices * options.nodes
    strategies: dict[str, Callable[[], Any]] = {
        "single": lambda: "auto",
        # buffers are scales and observers, which train/sync.py brings together; rank 0's alone would be wrong
        "ddp": lambda: DDPStrategy(broadcast_buffers=False),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
    }
    strategy = strategies[options.strategy]()
    return L.Trainer(
        accelerator=options.accelerator,
        strategy=strategy,
        devices=options.devices,
        num_nodes=options.nodes,
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
        max_steps=options.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _quiet_lightning() -> None:
    """Lightning's banners and tips say nothing about a run; its warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*treespec.*is deprecated.*",
        ".*broadcast_buffers. is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    torch.set_float32_matmul_precision("highest")
