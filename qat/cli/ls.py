"""What can be chosen: groups of conf/ (schemes, models, data, recipes, sweeps, ...), and the tables in code (methods,
observers, estimators, formats, kernels). Without a name, all names.

  qat ls            qat ls schemes            qat ls recipes
"""

from __future__ import annotations

import argparse

from qat.errors import UserError, nearest, problem


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to list."""
    parser.add_argument("what", nargs="?", help="a group, or methods, observers, estimators, formats, kernels")


def run(args: argparse.Namespace) -> int:
    """Print names with one line each."""
    from qat.cli.groups import SWEEP, groups, list_group

    tables = {
        "methods": _methods,
        "observers": _observers,
        "estimators": _estimators,
        "formats": _formats,
        "kernels": _kernels,
    }
    known = [*groups(), SWEEP, *tables]
    if args.what in (None, "groups"):
        for name in known:
            print(name)
        return 0
    if args.what not in known and args.what.removesuffix("s") not in known:
        raise UserError(problem("qat ls", "must name a group or a table", f"'{args.what}'", nearest(args.what, known)))
    lines = tables[args.what]() if args.what in tables else list_group(args.what)
    width = max(len(name) for name, _ in lines)
    for name, line in lines:
        print(f"{name:<{width}}  {line}{_bits(args.what, name)}")
    return 0


def _bits(what: str, name: str) -> str:
    """For schemes: bits per weight of a 576-wide linear layer, scales counted."""
    if what not in ("scheme", "schemes"):
        return ""
    from qat.config import load_scheme

    weight = load_scheme(name).weight
    width = 576 if not weight.group_size or 576 % weight.group_size == 0 else 1536
    return f"  ({8 * weight.packed_bytes((64, width)) / (64 * width):.2f} bits per weight at {width} inputs)"


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _methods() -> list[tuple[str, str]]:
    from qat.ptq import PTQ_METHODS

    return [(name, _first_line(method)) for name, method in PTQ_METHODS.items()]


def _observers() -> list[tuple[str, str]]:
    from qat.observers import OBSERVERS

    return [(name, _first_line(observer)) for name, observer in OBSERVERS.items()]


def _estimators() -> list[tuple[str, str]]:
    from qat.estimators import ESTIMATORS

    return [(name, str(estimator)) for name, estimator in ESTIMATORS.items()]


def _formats() -> list[tuple[str, str]]:
    from qat.formats import FORMATS

    return [(name, _first_line(module)) for name, module in FORMATS.items()]


def _kernels() -> list[tuple[str, str]]:
    from qat.kernels.dispatch import KERNELS

    return [(op, backend) for op, backend in KERNELS]
