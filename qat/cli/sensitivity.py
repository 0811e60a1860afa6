"""Takes the overrides of `qat train`. Measures KL(float || one layer quantized) for every linear layer of the decoder
blocks and every candidate, on windows of the training text. A measurement that was stopped goes on with the same
command; with other --budget it is only solved again. Layers that rules of the plan decide are left out of it.

  qat sensitivity recipe=smollm2_quickstart --budget 3.5 --write plan.yaml
  qat train recipe=smollm2_quickstart plan=plan.yaml
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.config import RunConfig


def arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides, what is measured, and the budget."""
    candidates = "w2a16_g32,w3a16_g64,w4a16_g64,w8a16"
    parser.add_argument("--candidates", default=candidates, help=f"schemes, with commas between (default {candidates})")
    parser.add_argument("--windows", type=int, default=2, help="windows, evenly spread over the text (default 2)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window, its first (default 128)")
    parser.add_argument("--share-inputs", action="store_true", help="one choice for layers that read the same input")
    parser.add_argument("--budget", type=float, help="bits per weight, scales counted, of the layers chosen for")
    parser.add_argument("--whole-model", action="store_true", help="the budget counts the model: embedding, norms, all")
    parser.add_argument("--write", type=Path, metavar="PLAN.yaml", help="where the plan goes (with --budget)")
    parser.add_argument("--out", type=Path, help="folder of the measurements (default RUNS_DIR/NAME-sensitivity)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    """Refuse what cannot be met, measure, draw, choose, write the plan."""
    from qat.cli.compose import compose_run

    config = compose_run(args.overrides)
    schemes = check_arguments(args)

    from qat import build
    from qat.checkpoint import weights_fingerprint
    from qat.data import fingerprint, load_windows
    from qat.models import meta_model
    from qat.paths import write_json_atomic
    from qat.progress import say
    from qat.report.figures import write_figures
    from qat.sensitivity import measure, plan

    before, wanted = build.checks.plan_from(config), meta_model(config.model)
    check_budget(args, measure.units(wanted, before), schemes, wanted, before)
    build.use_machine(config)
    model, tokenizer = build.float_model(config)
    windows = load_windows(config.data, tokenizer)
    ids = spread(windows.train, args.windows)[:, : args.length]
    shared = measure.layers_that_share_inputs(model, before, ids[:1]) if args.share_inputs else []
    found = measure.units(model, before, shared)
    facts = {
        "model": config.model.path,
        "weights": weights_fingerprint(model),
        "text": config.data.path,
        "tokens": fingerprint(replace(windows, train=ids)),
        "windows": list(ids.shape),
    }
    out = args.out or Path(config.runs_dir) / f"{config.name}-sensitivity"
    out.mkdir(parents=True, exist_ok=True)
    passes = len(schemes) * sum(1 - unit.block / (found[-1].block + 1) for unit in found)
    say(f"{len(found)} x {len(schemes)} measurements, about {passes:.0f} forward passes over {ids.numel()} tokens")
    measured = measure.measure(measure.Sensitivity(model, ids), found, schemes, facts, out)
    chosen = None if args.budget is None else choose(args, found, schemes, measured, model, before)
    content = plan.result(facts, found, schemes, measured, chosen)
    write_json_atomic(out / "sensitivity.json", content)
    figure = write_figures(out)["sensitivity"]
    for scheme in schemes:
        print(line(f"all {scheme.name}", plan.totals(content, [scheme.name] * len(found))))
    if chosen is not None:
        print(line(f"budget {args.budget:g}", plan.totals(content, chosen)))
        write_plan(args, config, found, chosen, measure.decoder_blocks(model)[0], out)
    print(f"measurements: {out / 'sensitivity.json'}\nheat map:     {figure}")
    return 0


def check_arguments(args: argparse.Namespace) -> list[Any]:
    """The candidate schemes; UserError for every option that cannot be or does nothing."""
    from qat.config import load_scheme
    from qat.errors import UserError, problem

    problems: list[str] = []
    schemes = {}
    for name in args.candidates.split(","):
        try:
            schemes[name] = load_scheme(name, "--candidates")
        except UserError as error:
            problems += error.problems
    for name, count in (("--windows", args.windows), ("--length", args.length)):
        if count < 1:
            problems.append(problem(name, "must be at least 1", count, f"Drop {name} for the default."))
    for name, given in (("--write", args.write), ("--whole-model", args.whole_model)):
        if given and args.budget is None:
            problems.append(problem(name, "needs a budget", "none", "Add --budget BITS."))
    if problems:
        raise UserError(*problems)
    return list(schemes.values())


def check_budget(args: argparse.Namespace, found: list, schemes: list, model: Any, before: Any) -> None:
    """Refuse candidates that a layer cannot have and a budget that cannot be met; `model` may be on meta."""
    from qat.sensitivity.measure import check_candidates

    check_candidates(found, schemes)
    if args.budget is not None:
        budget(args, found, schemes, model, before)


def budget(args: argparse.Namespace, found: list, schemes: list, model: Any, before: Any) -> tuple[list, int]:
    """Bytes of every unit by candidate, and the bytes that the budget leaves for them together."""
    from qat.insert import survey
    from qat.sensitivity.allocate import budget_bytes

    sizes = [{scheme.name: unit.bytes(scheme) for scheme in schemes} for unit in found]
    weights, rest = sum(unit.weights for unit in found), 0
    if args.whole_model:
        ours = {site.layer.name for unit in found for site in unit.sites}
        coverage = survey(model, before)[1]
        weights, rest = coverage.weights, sum(la.bytes for la in coverage.layers if la.name not in ours)
    return sizes, budget_bytes(args.budget, sizes, weights, rest)


def choose(args: argparse.Namespace, found: list, schemes: list, measured: dict, model: Any, before: Any) -> list[str]:
    """The scheme of every unit."""
    from qat.sensitivity.allocate import allocate

    sizes, room = budget(args, found, schemes, model, before)
    costs = [{scheme.name: measured[unit.names, scheme.name] for scheme in schemes} for unit in found]
    return allocate(costs, sizes, room)


def write_plan(
    args: argparse.Namespace, config: RunConfig, found: list, chosen: list[str], stack: str, out: Path
) -> None:
    """Write the plan, when asked, and say what the whole model takes with it, as coverage counts."""
    from qat import build
    from qat.config import RuleConfig
    from qat.models import meta_model
    from qat.paths import write_text_atomic
    from qat.sensitivity.plan import plan_yaml, rules

    own = [(rule.match, rule.scheme) for rule in config.plan.rules]
    picked = rules(found, chosen, stack, own)
    mixed = replace(config.plan, rules=[RuleConfig(match, scheme) for match, scheme in picked])
    coverage = build.quantize_layers(meta_model(config.model), replace(config, plan=mixed))
    print(f"whole model: {coverage.bits_per_weight:.3f} bits per weight, {coverage.bytes / 1e6:.1f} MB, all counted")
    if args.write:
        counted = "whole model" if args.whole_model else "linear layers"
        title = f"{Path(config.model.path).stem}: {args.budget:g} bits per weight in the {counted}, by sensitivity"
        text = plan_yaml(title, picked, config.plan.embedding, str(out / "sensitivity.json"))
        write_text_atomic(args.write, text)
        print(f"plan:         {args.write}")


def spread(windows: Any, count: int) -> Any:
    """`count` windows [count, T], evenly spread over windows [n, T]."""
    return windows[[int((i + 0.5) * len(windows) / count) for i in range(min(count, len(windows)))]]


def line(name: str, totals: dict[str, float]) -> str:
    """A line of the closing table."""
    return f"{name:<16} {totals['bits_per_weight']:.3f} bits per weight, sum of single KL {totals['kl_sum']:.4f}"
