"""Takes the overrides of `qat train`; loads no weights (the model is built from config.json on the meta device).
Exit 2 when a rank needs more than trainer.memory_gib. The formulas are in docs/scaling.md.

qat plan recipe=smollm2_quickstart
qat plan model.path=FOLDER scheme=w4a16_g64
qat plan recipe=llama3_8b_w4a16_g128_fsdp2 trainer.nodes=2
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from qat.config import ModelConfig, recipes_dir
from qat.errors import UserError, nearest, problem

GIB = 2**30


def arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides, and the full table."""
    parser.add_argument("--json", action="store_true", help="print coverage and memory as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    """Print the per-layer table and the totals; raise every problem at once."""
    from qat.cli.compose import compose_run

    # the text plays no part in a plan, so a missing data.path is no reason to refuse
    given = {word.split("=", 1)[0].lstrip("+") for word in args.overrides}
    text = [] if "data.path" in given else ["data.path=unused"]
    config = compose_run([*args.overrides, *text])

    from qat import build
    from qat.models import meta_model
    from qat.scaling import shape_of

    model = meta_model(known_architecture(config.model))
    coverage = build.quantize_layers(model, config)
    shape = shape_of(model.config.get_text_config(), coverage)
    numbers = figures(shape, config)
    for line in tables_of_rules(model, coverage):
        print(f"warning: {line}", file=sys.stderr)
    if args.json:
        import json

        print(json.dumps({**coverage.to_dict(), **numbers}, indent=2))
    else:
        _show_layers(coverage, config)
        _show_figures(numbers, config)
    refuse_too_large(shape, config)
    return 0


def tables_of_rules(model: Any, coverage: Any) -> list[str]:
    """A line for each plan rule with a wildcard that takes the token table or the output head too."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {f"{name}.weight" for name, module in model.named_modules() if any(module is table for table in tables)}
    return [
        f"{layer.reason} also takes {layer.name}: {layer.scheme}. Put a rule of its own before it if that is not meant."
        for layer in coverage.layers
        if layer.name in names and layer.scheme and layer.reason.startswith("rule") and "*" in layer.reason
    ]


def known_architecture(model: ModelConfig) -> ModelConfig:
    """What a plan reads: the shipped config.json of `model.architecture` when no file has the model's path.

    Raises:
        UserError: no such architecture is shipped.
    """
    if model.architecture is None or Path(model.path).expanduser().exists():
        return model
    folder = recipes_dir() / "architectures"
    known = sorted(entry.name for entry in folder.iterdir())
    if model.architecture not in known:
        fix = nearest(model.architecture, known)
        raise UserError(problem("model.architecture", f"must stand in {folder}", f"'{model.architecture}'", fix))
    return replace(model, path=str(folder / model.architecture), revision=None)


def figures(shape: Any, config: Any) -> dict[str, Any]:
    """Memory, traffic, tokens and files of the run and of its stages, memory and traffic under every strategy.

    The strategies are compared in the stage, blockwise ones apart, that needs most memory.
    """
    from qat.scaling import checkpoint_bytes, job_of, memory, sent, side_by_side, stage_needs, traffic

    def gib(parts: dict[str, float]) -> dict[str, float]:
        return {name: size / GIB for name, size in parts.items()}

    stages = stage_needs(shape, config)
    largest, host = max(stages, key=lambda stage: stage.memory.peak), max(stage.memory.host for stage in stages)
    jobs = [(stage.memory.peak, place, stage.job) for place, stage in enumerate(stages) if stage.job is not None]
    job = max(jobs)[2] if jobs else job_of(config)
    strategies = {}
    for one in side_by_side(job):
        need, moved = memory(shape, one), traffic(shape, one)
        strategies[one.strategy] = {
            "ranks": one.ranks,
            "memory_gib": need.peak / GIB,
            "peak_at": need.moment,
            "traffic_gib": gib(moved),
            "sent_gib": sent(moved, one.ranks) / GIB,
        }
    return {
        "memory_gib": {**gib(largest.memory.parts), "total": largest.memory.peak / GIB},
        # under fsdp2 one rank loads the models and deals them out
        "host_gib": (1 if job.strategy == "fsdp2" else config.trainer.devices) * host / GIB,
        "strategies": strategies,
        "tokens_per_step": job.tokens_per_step,
        "steps": sum(stage.steps for stage in stages),
        "tokens": sum(stage.tokens for stage in stages),
        "stages": [
            {
                "kind": stage.kind,
                "steps": stage.steps,
                "tokens": stage.tokens,
                "memory_gib": stage.memory.peak / GIB,
                "peak_at": stage.memory.moment,
            }
            for stage in stages
        ],
        "files_gib": gib(checkpoint_bytes(shape, job)),
    }


def refuse_too_large(shape: Any, config: Any) -> None:
    """UserError, naming what would help and how much, when a rank needs more memory than its device has."""
    from qat.scaling import stage_needs

    largest = max(stage_needs(shape, config), key=lambda stage: stage.memory.peak)
    limit, need = config.trainer.memory_gib or _gpu_gib(config), largest.memory.peak / GIB
    if limit is None or need <= limit:
        return
    wanted = f"a rank must fit into the {limit:.1f} GiB of its device"
    if largest.job is None:
        fix = "Lower trainer.batch_size, or leave the blockwise stage out."
        raise UserError(problem("trainer.memory_gib", wanted, f"{need:.1f} GiB in the blockwise stage", fix))
    fix = ways_to_fit(shape, largest.job, config)
    raise UserError(problem("trainer.memory_gib", wanted, f"{need:.1f} GiB", fix))


def ways_to_fit(shape: Any, job: Any, config: Any) -> str:
    """The settings that would make a rank need less, the least first, with what it would need then."""
    from qat.scaling import memory

    need = memory(shape, job).peak / GIB
    changes = {
        "trainer.gradient_checkpointing=true": replace(job, checkpointing=True),
        "trainer.batch_size=1": replace(job, batch=1),
        "distill=ce (no teacher)": replace(job, teacher=False),
        "trainer=fsdp2": replace(job, strategy="fsdp2"),
        f"trainer.nodes={2 * config.trainer.nodes}": replace(job, ranks=2 * job.ranks),
        "distill.chunk_tokens=32": replace(job, chunk=min(32, job.chunk)),
    }
    after = {text: memory(shape, changed).peak / GIB for text, changed in changes.items()}
    helps = sorted((size, text) for text, size in after.items() if size < 0.99 * need)
    if not helps:
        return "Use a smaller model."
    return "Cheapest ways to fit: " + "; ".join(f"{text} ({size:.1f} GiB)" for size, text in helps) + "."


def _show_layers(coverage: Any, config: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "kind", "shape", "scheme", "bits", "bytes", "why", title=f"plan: {config.scheme.name}")
    for layer in coverage.layers:
        shape = "x".join(map(str, layer.shape))
        why = f"tied to {layer.tied_to}" if layer.tied_to else layer.reason
        scheme = layer.scheme or "float"
        table.add_row(layer.name, layer.kind, shape, scheme, f"{layer.bits:g}", f"{layer.bytes:,}", why)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    total = f"{coverage.quantized_weights:,} of {coverage.weights:,} weights quantized ({coverage.coverage:.2%})"
    print(f"{total}; {coverage.bits_per_weight:.3f} bits per weight with everything counted")
    print(
        f"packed {coverage.bytes / 1e6:.1f} MB, float32 {4 * coverage.weights / 1e6:.1f} MB; "
        f"kv cache: {coverage.kv or 'float'}"
    )


def _show_figures(numbers: dict[str, Any], config: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("strategy", "ranks", "GiB per rank", "peak at", "GiB sent per step", title="one rank, estimated")
    for name, row in numbers["strategies"].items():
        moved = ", ".join(f"{what} {size:.2f}" for what, size in row["traffic_gib"].items())
        sent = f"{row['sent_gib']:.2f} ({moved})" if moved else "0"
        mark = "> " if name == config.trainer.strategy else ""
        table.add_row(f"{mark}{name}", str(row["ranks"]), f"{row['memory_gib']:.2f}", row["peak_at"], sent)
    Console(width=None if Console().is_terminal else 160).print(table)
    memory = numbers["memory_gib"]
    parts = ", ".join(f"{name} {size:.2f}" for name, size in memory.items() if name != "total")
    print(f"training memory per process, estimated: {memory['total']:.2f} GiB ({parts})")
    if numbers["host_gib"]:
        print(f"main memory per machine while loading, estimated: {numbers['host_gib']:.1f} GiB")
    files = ", ".join(f"{name} {size:.2f} GiB" for name, size in numbers["files_gib"].items())
    print(f"{numbers['tokens_per_step']:,} tokens per step, {numbers['steps']:,} steps, {numbers['tokens']:,} tokens")
    for place, stage in enumerate(numbers["stages"] if len(numbers["stages"]) > 1 else []):
        size = f"{stage['memory_gib']:.2f} GiB at {stage['peak_at']}"
        print(f"stage {place}: {stage['kind']}: {stage['steps']:,} steps, {stage['tokens']:,} tokens, {size}")
    print(f"checkpoints: {files}")
    available = available_gib()
    need = memory["total"] * config.trainer.devices
    if available is not None and config.trainer.accelerator == "cpu" and need > available:
        have = f"{available:.1f} GiB free, {config.trainer.devices} of these processes need {need:.1f}"
        print(
            f"warning: this machine has {have}. "
            "Cheapest ways to fit: trainer.gradient_checkpointing=true, a smaller trainer.batch_size, distill=ce."
        )


def _gpu_gib(config: Any) -> float | None:
    """Memory of this machine's GPU, None without one or when the run is not for GPUs."""
    import torch

    if config.trainer.accelerator != "gpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / GIB


def available_gib() -> float | None:
    """Free memory of this machine, None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return int(line.split()[1]) / 2**20
    except (OSError, StopIteration):
        return None
