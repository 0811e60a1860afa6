"""Config -> objects, top to bottom. Read this first.

Each function takes the part of RunConfig it needs and returns plain objects; no class below this file ever sees a
config object. The order of a run is in `pipeline.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat import checks, ranks
from qat.config import RunConfig
from qat.insert import Coverage, FakeQuantOptions, insert
from qat.memory import keep_freed_memory
from qat.metrics import Metrics
from qat.models import check_tokenizer, load_model, load_tokenizer, meta_model
from qat.nn.kv import install_kv
from qat.ptq.apply import apply, check
from qat.ptq.options import PtqOptions
from qat.stage_config import BLOCK_WINDOWS, StageConfig, length

if TYPE_CHECKING:
    from qat.train.blockwise import BlockOptions
    from qat.train.module import OptimOptions


def float_model(config: RunConfig) -> tuple[Any, Any]:
    """The float32 Hugging Face model in eval mode, and its tokenizer.

    Under fsdp2 rank 0 alone has weights, and deals them out (train/sharding.py); the others have the structure.
    """
    tokenizer = load_tokenizer(config.model)
    elsewhere = config.trainer.strategy == "fsdp2" and ranks.rank() > 0
    model = meta_model(config.model) if elsewhere else load_model(config.model)
    check_tokenizer(tokenizer, model.config)
    return model, tokenizer


def quantize_layers(model: nn.Module, config: RunConfig) -> Coverage:
    """Put the plan's training layers and the KV grid into a float model, in place."""
    options = FakeQuantOptions(
        config.fake_quant.estimator,
        config.fake_quant.weight_scale,
        config.fake_quant.weight_observer,
        config.fake_quant.input_observer,
        learns_later=any(stage.kind == "scales" for stage in config.stages.schedule),
    )
    return _insert(model, config, options)


def rtn_layers(model: nn.Module, config: RunConfig) -> Coverage:
    """The same plan by round-to-nearest: min-max scales from the weights as they are, nothing trained."""
    return _insert(model, config, FakeQuantOptions(input_observer=config.fake_quant.input_observer))


def check_ptq(model: nn.Module, coverage: Coverage, windows: Tensor, config: RunConfig) -> None:
    """Refuse, before work, a post-training method that cannot do this model; `windows` [n, block] is training text."""
    if config.ptq.method != "none":
        check(model, coverage, windows, _ptq_options(config))


def apply_ptq(model: nn.Module, windows: Tensor, config: RunConfig) -> dict[str, Any] | None:
    """Give a calibrated training model what the run's post-training method finds, and say what was done."""
    if config.ptq.method == "none":
        return None
    return asdict(apply(model, windows, _ptq_options(config)))


def _ptq_options(config: RunConfig) -> PtqOptions:
    ptq = config.ptq
    return PtqOptions(ptq.method, ptq.keep, ptq.windows, ptq.short_fraction, config.seed, ptq.damping, ptq.act_order)


def _insert(model: nn.Module, config: RunConfig, options: FakeQuantOptions) -> Coverage:
    coverage = insert(model, checks.plan_from(config), options, config.plan.max_unsupported)
    kv = checks.kv_spec(config.kv)
    install_kv(model, kv)
    coverage.kv = kv.describe() if kv else None
    return coverage


def training(config: RunConfig, place: int = 0) -> dict[str, Any]:
    """Loss, optimizer, schedule and loop options of stage `place`, as keyword arguments of `train.fit.fit`."""
    from qat.train.fit import FitOptions
    from qat.train.losses import LossWeights
    from qat.train.phases import PhaseEntry

    distill, trainer, stage = config.distill, config.trainer, config.stages.schedule[place]
    schedule = [PhaseEntry(entry.at, entry.do, entry.bits) for entry in config.phases.schedule]
    if stage.kind == "scales":
        schedule = [PhaseEntry(0, "fake_quantize"), PhaseEntry(0, "freeze_codes")]
    optim = optimizer(config, stage)
    return {
        "loss": LossWeights(
            distill.kl_weight, distill.ce_weight, distill.temperature, distill.chunk_tokens, distill.jsd_beta
        ),
        "optim": optim,
        "schedule": schedule,
        "options": FitOptions(
            accelerator=trainer.accelerator,
            strategy=trainer.strategy,
            devices=trainer.devices,
            nodes=trainer.nodes,
            precision=trainer.precision,
            max_steps=optim.steps,
            batch_size=trainer.batch_size,
            accumulate=trainer.accumulate,
            gradient_checkpointing=trainer.gradient_checkpointing,
            log_every=trainer.log_every,
            layer_stats_every=trainer.layer_stats_every,
            eval_every=trainer.eval_every,
            checkpoint_every=trainer.checkpoint_every,
            max_skipped_steps=trainer.max_skipped_steps,
            loader_workers=trainer.loader_workers,
            # later stages see the windows in another order
            seed=config.seed + place,
            trains="scales" if stage.kind == "scales" else "all" if stage.rank is None else "low_rank",
            rank=stage.rank,
            alpha=float(stage.rank or 1) if stage.alpha is None else stage.alpha,
        ),
    }


def blockwise(config: RunConfig, place: int) -> tuple[OptimOptions, BlockOptions]:
    """Optimizer and options of stage `place` for `train.blockwise.fit_blocks`."""
    from qat.train.blockwise import BlockOptions

    trainer, stage = config.trainer, config.stages.schedule[place]
    options = BlockOptions(
        accelerator=trainer.accelerator,
        precision=trainer.precision,
        batch_size=trainer.batch_size,
        windows=BLOCK_WINDOWS if stage.windows is None else stage.windows,
        checkpoint_every=trainer.checkpoint_every,
        max_skipped_steps=trainer.max_skipped_steps,
        seed=config.seed + place,
    )
    return optimizer(config, stage), options


def optimizer(config: RunConfig, stage: StageConfig) -> OptimOptions:
    """Rates and length of a stage, the run's where it gives none of its own."""
    from qat.train.module import OptimOptions

    optim = config.optim
    return OptimOptions(
        optim.lr if stage.lr is None else stage.lr,
        optim.scale_lr if stage.scale_lr is None else stage.scale_lr,
        optim.weight_decay,
        (optim.betas[0], optim.betas[1]),
        optim.warmup_fraction,
        optim.final_lr_fraction,
        optim.grad_clip,
        length(stage, config.trainer.max_steps),
        optim.kind,
    )


def metrics(config: RunConfig, folder: Path, as_dict: dict, run_id: str | None) -> Metrics:
    """The run's metrics.jsonl, with wandb beside it when asked for; `run_id` is an earlier process's wandb run."""
    return Metrics(folder, config.logger.wandb, config.logger.project, as_dict, run_id, config.logger.group)


def use_machine(config: RunConfig) -> int:
    """Apply trainer.threads and let malloc keep what a step frees; returns the number of threads in use."""
    keep_freed_memory()
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    return torch.get_num_threads()
