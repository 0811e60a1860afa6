"""`check`: everything wrong with a run's values, at once and before any work.

Ranges and spellings are tables over dotted keys; what concerns several fields at a time is one function for each topic.
Types, unknown keys and missing values are refused in `cli/compose.py`, the model's shapes later in `insert.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import reduce
from typing import Any

from qat.config import KvConfig, OptimConfig, RunConfig, kv_spec, plan_from
from qat.errors import UserError, nearest, problem
from qat.stage_checks import phases, stages

OWN_SBATCH = {
    "partition": "cluster.partition",
    "account": "cluster.account",
    "time": "cluster.time_minutes",
    "signal": "cluster.signal_seconds",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue",
    "cpus-per-task": "cluster.cpus_per_node",
    "mem": "cluster.memory_gib",
    "nodes": "trainer.nodes",
    "gpus-per-node": "trainer.devices",
    "ntasks-per-node": "trainer.devices",
    "job-name": "name",
    "output": "runs_dir",
    "error": "runs_dir",
    "open-mode": "runs_dir",
}
LEARNED = ("lsq", "lsq_plus")
PTQ = ("rtn", "rtn_mse", "gptq", "awq")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.attention": ("sdpa", "eager"),
    "data.kind": ("text", "jsonl", "hub", "folder"),
    "data.join": ("eos", "newline", "none"),
    "data.encoding_errors": ("strict", "replace", "ignore"),
    "fake_quant.estimator": ("ste_clipped", "ste_pass_through", *LEARNED),
    "fake_quant.weight_scale": ("dynamic", "static", "learned"),
    "fake_quant.weight_observer": ("minmax", "moving_average", "percentile", "mse", "histogram"),
    "fake_quant.input_observer": ("minmax", "moving_average", "percentile", "mse", "histogram"),
    "ptq.method": ("none", *PTQ),
    "ptq.keep": ("weights", "scales", "compensated"),
    "optim.kind": ("adamw", "adafactor"),
    "trainer.accelerator": ("cpu", "gpu"),
    "trainer.strategy": ("single", "ddp", "fsdp2"),
    "trainer.precision": ("bf16", "fp32"),
    "cluster.kind": ("local", "slurm"),
    "evaluate.precision": ("bf16", "fp32"),
    "export.format": ("compressed_tensors",),
    "logger.wandb": ("off", "offline", "online"),
}
AT_LEAST: dict[str, int] = {
    "seed": 0,
    "data.block_size": 8,
    "data.eval_tokens": 1,
    "kv.sink_tokens": 0,
    "kv.recent_tokens": 0,
    "fake_quant.calibration_batches": 0,
    "optim.weight_decay": 0,
    "optim.grad_clip": 0,
    "distill.kl_weight": 0,
    "distill.ce_weight": 0,
    "distill.chunk_tokens": 1,
    "trainer.devices": 1,
    "trainer.nodes": 1,
    "trainer.max_steps": 0,
    "ptq.windows": 1,
    "trainer.batch_size": 1,
    "trainer.accumulate": 1,
    "trainer.threads": 1,
    "trainer.eval_every": 0,
    "trainer.log_every": 1,
    "trainer.layer_stats_every": 0,
    "trainer.checkpoint_every": 0,
    "trainer.checkpoint_keep": 1,
    "trainer.max_skipped_steps": 0,
    "trainer.loader_workers": 0,
    "cluster.time_minutes": 1,
    "cluster.signal_seconds": 1,
    "cluster.cpus_per_node": 1,
    "cluster.memory_gib": 0,
    "cluster.port": 1024,
    "evaluate.batch_size": 1,
    "evaluate.decode_tokens": 0,
    "export.max_new_tokens": 1,
}
AT_MOST = {"seed": 2**31 - 1, "cluster.port": 65534}
ABOVE_ZERO = (
    *("optim.lr", "optim.scale_lr", "distill.temperature", "ptq.damping"),
    *("trainer.start_timeout_minutes", "trainer.timeout_minutes", "trainer.memory_gib"),
)
FRACTIONS = (
    *("data.eval_fraction", "plan.max_unsupported", "ptq.short_fraction"),
    *("optim.warmup_fraction", "optim.final_lr_fraction", "distill.jsd_beta"),
)


def check(config: RunConfig) -> list[str]:
    """A line for every problem, in the project's error form; empty when the run may start."""
    topics = (
        *(names, choices, ranges, data, model, schemes, fake_quant, ptq, phases, stages, losses, trainer, logger),
        cluster,
    )
    return [line for topic in topics for line in topic(config)]


def value_at(config: RunConfig, key: str) -> Any:
    """The value of a dotted key such as `optim.lr`."""
    return reduce(getattr, key.split("."), config)


def names(config: RunConfig) -> Iterator[str]:
    """The run folder has a plain name in a folder; model and text are somewhere."""
    name = config.name
    if name in ("", ".", "..") or name != name.strip() or any(c in "/\\\0" for c in name):
        yield problem("name", "must be a plain folder name", f"'{name}'", "Use runs_dir for the folder above it.")
    for key in ("model.path", "data.path"):
        if not value_at(config, key).strip():
            yield problem(key, "must be a path or a name", "nothing", f"Use {key}=FOLDER.")
    if not config.runs_dir.strip():
        yield problem("runs_dir", "must be a folder", f"'{config.runs_dir}'", "Use runs_dir=runs.")


def choices(config: RunConfig) -> Iterator[str]:
    """Every word is one of its table."""
    for key, known in CHOICES.items():
        value = value_at(config, key)
        if value not in known:
            # YAML 1.1 reads an unquoted off as false
            hint = "Put 'off' in quotes." if value == "False" and "off" in known else nearest(value, known)
            yield problem(key, f"must be one of {', '.join(known)}", f"'{value}'", hint)


def ranges(config: RunConfig) -> Iterator[str]:
    """Every number is in its range."""
    for key, least in AT_LEAST.items():
        value = value_at(config, key)
        if value is not None and not (math.isfinite(value) and value >= least):
            yield problem(key, f"must be at least {least}", value, f"Use {key}={max(least, 1)} or more.")
    for key, most in AT_MOST.items():
        if value_at(config, key) > most:
            yield problem(key, f"must be at most {most}", value_at(config, key), "Use a smaller number.")
    for key in ABOVE_ZERO:
        value = value_at(config, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            yield problem(key, "must be finite and above 0", value, "Use a small positive number.")
    for key in FRACTIONS:
        value = value_at(config, key)
        if not 0 <= value <= 1:
            yield problem(key, "must be a share from 0 to 1", value, "Write 5 percent as 0.05.")
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield problem("optim.betas", "must be two numbers from 0 to below 1", betas, "Use [0.9,0.95].")
    if config.optim.kind == "adafactor" and betas != OptimConfig().betas:
        yield problem("optim.betas", "only optim.kind=adamw has betas", betas, "Drop optim.betas.")
    if config.optim.kind == "adafactor" and config.trainer.strategy == "fsdp2":
        fix = "Use optim.kind=adamw, whose states fsdp2 deals out, or trainer.strategy=ddp."
        yield problem("optim.kind", "adafactor needs whole weights on every process", "fsdp2", fix)


def data(config: RunConfig) -> Iterator[str]:
    """Settings of the text that contradict each other."""
    chosen = config.data
    if chosen.chat and chosen.kind == "text":
        fix = "Use data=chat (JSON lines), or data.chat=false."
        yield problem("data.chat", "plain text holds no conversations; kind must be jsonl, hub or folder", "text", fix)
    if chosen.eval_path is None and chosen.eval_fraction in (0, 1):
        fix = "Use data.eval_fraction=0.1, or give data.eval_path."
        wanted = "without data.eval_path a share strictly between 0 and 1 is held out"
        yield problem("data.eval_fraction", wanted, chosen.eval_fraction, fix)
    if chosen.subset is not None and chosen.kind in ("text", "jsonl"):
        fix = "Drop data.subset, or use data.kind=hub or folder."
        yield problem("data.subset", f"data.kind={chosen.kind} has no subsets", f"'{chosen.subset}'", fix)


def model(config: RunConfig) -> Iterator[str]:
    """Settings that a packaged or .gguf model cannot have."""
    chosen = config.model
    if not (chosen.path.startswith("package:") or chosen.path.endswith(".gguf")):
        return
    if chosen.trust_remote_code:
        fix = "Drop model.trust_remote_code."
        yield problem("model.trust_remote_code", f"'{chosen.path}' brings no code to run", True, fix)
    if chosen.revision is not None:
        fix = "Drop model.revision."
        yield problem("model.revision", f"'{chosen.path}' has no revisions", f"'{chosen.revision}'", fix)


def schemes(config: RunConfig) -> Iterator[str]:
    """Grids that cannot be, unknown schemes in the plan, and static inputs that nothing calibrates."""
    if config.scheme.weight.dynamic:
        fix = "Use fake_quant.weight_scale=dynamic for scales that follow the weights."
        yield problem("scheme.weight.dynamic", "only inputs have it", True, fix)
    unused = [f.name for f in fields(KvConfig) if f.name != "bits" and getattr(config.kv, f.name) != f.default]
    if config.kv.bits is None and unused:
        fix = "Set kv.bits=4 (or use kv=kv4), or drop it."
        yield problem(f"kv.{unused[0]}", "a float cache has no grid", getattr(config.kv, unused[0]), fix)
    try:
        kv_spec(config.kv)
    except UserError as error:
        yield from error.problems
    try:
        plan = plan_from(config)
    except UserError as error:
        yield from error.problems
        return
    used = [plan.default, *(rule.scheme for rule in plan.rules if rule.scheme)]
    static = next((scheme.name for scheme in used if scheme.input and not scheme.input.dynamic), None)
    observed = config.phases.schedule and config.phases.schedule[0].do == "observe"
    if static and config.fake_quant.calibration_batches == 0 and not observed:
        wanted = f"the static inputs of scheme {static} need a look at the data"
        fix = "Use fake_quant.calibration_batches=8, phases=delayed, or scheme.input.dynamic=true."
        yield problem("fake_quant.calibration_batches", wanted, 0, fix)
    widths = [entry.bits for entry in config.phases.schedule if entry.do == "bits" and entry.bits is not None]
    narrowest = min((scheme for scheme in [*used, plan.embedding] if scheme), key=lambda scheme: scheme.weight.bits)
    if widths and widths[-1] > narrowest.weight.bits:
        wanted = f"training must end at the {narrowest.weight.bits} bits of scheme {narrowest.name}"
        fix = f"Add an entry with bits: {narrowest.weight.bits}."
        yield problem("phases.schedule", wanted, f"bits: {widths[-1]} as the last", fix)


def fake_quant(config: RunConfig) -> Iterator[str]:
    """Estimator, scale mode and observer fit together."""
    chosen = config.fake_quant
    if (chosen.weight_scale == "learned") != (chosen.estimator in LEARNED):
        fix = "Use fake_quant=learned, or estimator=ste_clipped with weight_scale=dynamic or static."
        wanted = "weight_scale=learned goes with estimator lsq or lsq_plus, and only with them"
        got = f"estimator={chosen.estimator} with weight_scale={chosen.weight_scale}"
        yield problem("fake_quant", wanted, got, fix)
    if chosen.weight_scale == "dynamic" and chosen.weight_observer != "minmax":
        fix = "Use weight_observer=minmax, or weight_scale=static or learned."
        wanted = "weight_scale=dynamic takes the weight's own extremes (minmax)"
        yield problem("fake_quant.weight_observer", wanted, f"'{chosen.weight_observer}'", fix)
    if chosen.estimator == "lsq_plus" and config.scheme.weight.symmetric:
        fix = "Use estimator=lsq, or an asymmetric scheme such as w4a16_g32_asym."
        wanted = "lsq_plus trains zero points, which a symmetric scheme has not"
        yield problem("fake_quant.estimator", wanted, f"scheme {config.scheme.name}", fix)


def ptq(config: RunConfig) -> Iterator[str]:
    """A starting point that training would not throw away, and no training only with a method that replaces it."""
    chosen = config.ptq
    if chosen.method == "none":
        if config.trainer.max_steps == 0:
            fix = "Use trainer.max_steps=1 or more, or ptq=gptq."
            yield problem("trainer.max_steps", "only a ptq method needs no training", 0, fix)
        return
    if config.fake_quant.weight_scale == "dynamic":
        fix = "Use fake_quant=static or fake_quant=learned."
        wanted = f"the scales that ptq={chosen.method} finds must be kept; dynamic ones follow the weights"
        yield problem("fake_quant.weight_scale", wanted, "dynamic", fix)
    if any(entry.do in ("observe", "bits") for entry in config.phases.schedule):
        fix = "Use phases=default or freeze."
        wanted = f"phases that choose new ranges would undo ptq={chosen.method}"
        yield problem("phases.schedule", wanted, "observe or bits", fix)
    if chosen.method == "awq" and chosen.keep == "scales":
        wanted = "awq finds scales for weights that it has rescaled, so it needs keep=weights"
        yield problem("ptq.keep", wanted, "scales", "Use ptq.keep=weights.")
    if chosen.keep == "compensated" and chosen.method != "gptq":
        wanted = "only gptq compensates weights before it rounds them"
        yield problem("ptq.keep", wanted, f"compensated with ptq={chosen.method}", "Use ptq.keep=weights.")


def losses(config: RunConfig) -> Iterator[str]:
    """At least one term of the loss is on, and the divergence is one."""
    if config.distill.kl_weight == 0 and config.distill.ce_weight == 0:
        fix = "Use distill=kl, ce or kl_ce."
        yield problem("distill", "kl_weight or ce_weight must be above 0", "0 for both", fix)
    beta = config.distill.jsd_beta
    if beta == 1:
        fix = "Use 0.5 for the symmetric divergence, 0 for forward KL."
        yield problem("distill.jsd_beta", "must be below 1, where nothing would be left of the student", beta, fix)
    elif beta and config.distill.kl_weight == 0:
        yield problem("distill.jsd_beta", "needs a float teacher", "kl_weight 0", "Use distill=jsd, or drop jsd_beta.")


def trainer(config: RunConfig) -> Iterator[str]:
    """Strategy and number of processes fit together."""
    chosen = config.trainer
    if chosen.strategy == "single" and (chosen.devices > 1 or chosen.nodes > 1):
        fix = "Use trainer.strategy=ddp or fsdp2, or one device on one node."
        got = f"devices={chosen.devices} nodes={chosen.nodes}"
        yield problem("trainer.strategy", "single is one process", got, fix)


def logger(config: RunConfig) -> Iterator[str]:
    """A group is wandb's."""
    chosen = config.logger
    if chosen.group is not None and chosen.wandb == "off":
        fix = "Use logger=wandb_offline, or drop logger.group."
        yield problem("logger.group", "is a wandb group, so it needs wandb", "wandb off", fix)


def cluster(config: RunConfig) -> Iterator[str]:
    """The job leaves time to train, and its own options are not given a second time."""
    chosen = config.cluster
    if chosen.signal_seconds >= 60 * chosen.time_minutes:
        fix = "Raise cluster.time_minutes, or lower cluster.signal_seconds."
        wanted = f"must be less than the {60 * chosen.time_minutes} s of cluster.time_minutes"
        yield problem("cluster.signal_seconds", wanted, chosen.signal_seconds, fix)
    for i, option in enumerate(chosen.sbatch):
        name = option.partition("=")[0].lstrip("-")
        if not re.fullmatch(r"[a-z][a-z-]*", name):
            fix = 'Write "constraint=h100", or exclusive.'
            yield problem(f"cluster.sbatch.{i}", "must be name=value or name", f"'{option}'", fix)
        elif name in OWN_SBATCH:
            fix = f"Use {OWN_SBATCH[name]}."
            yield problem(f"cluster.sbatch.{i}", "must not repeat another setting", f"'{option}'", fix)
