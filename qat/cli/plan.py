"""Takes the overrides of `qat train`; loads no weights (the model is built from config.json on the meta device).

qat plan recipe=smollm2_quickstart
qat plan model.path=FOLDER scheme=w4a16_g64
"""

from __future__ import annotations

import argparse
from typing import Any


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

    model = meta_model(config.model)
    coverage = build.quantize_layers(model, config)
    memory = memory_estimate(coverage.weights, model.config, config)
    if args.json:
        import json

        print(json.dumps({**coverage.to_dict(), "memory_gib": memory}, indent=2))
        return 0
    _show(coverage, memory, config)
    return 0


def memory_estimate(weights: int, hf_config: Any, config: Any) -> dict[str, float]:
    """GiB of one process while training, by part; activations after the usual 34 bytes per token, layer and channel."""
    trainer = config.trainer
    text = hf_config.get_text_config()
    shards = trainer.devices * trainer.nodes if trainer.strategy == "fsdp2" else 1
    tokens = trainer.batch_size * config.data.block_size
    hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    per_token = 2 * hidden * layers if trainer.gradient_checkpointing else 34 * hidden * layers
    width = 2 if trainer.precision == "bf16" else 4
    parts = {
        "float32 weights": 4 * weights / shards,
        "gradients": 4 * weights / shards,
        "Adam moments": 8 * weights / shards,
        "fake-quantized copies": width * weights / shards,
        "teacher": (width * weights / shards) if config.distill.kl_weight > 0 else 0.0,
        "activations": tokens * per_token * width / 2,
        "logits of a chunk": 4 * 4 * min(tokens, config.distill.chunk_tokens) * vocabulary,
    }
    sizes = {name: size / 2**30 for name, size in parts.items()}
    sizes["total"] = sum(sizes.values())
    return sizes


def _show(coverage: Any, memory: dict[str, float], config: Any) -> None:
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
    parts = ", ".join(f"{name} {size:.2f}" for name, size in memory.items() if name != "total" and size > 0)
    print(f"training memory per process, estimated: {memory['total']:.2f} GiB ({parts})")
    available = available_gib()
    if available is not None and config.trainer.accelerator == "cpu" and memory["total"] > available:
        print(
            f"warning: this machine has {available:.1f} GiB free. Cheapest ways to fit: "
            "trainer.gradient_checkpointing=true, a smaller trainer.batch_size, distill=ce (no teacher), trainer=fsdp2."
        )


def available_gib() -> float | None:
    """Free memory of this machine, None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return int(line.split()[1]) / 2**20
    except (OSError, StopIteration):
        return None
