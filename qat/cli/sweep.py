"""Many runs of one recipe: what varies is in a YAML of conf/sweep or of your own, the rest is as for `qat train`.
`qat ls sweeps` lists the shipped ones. --dry-run checks everything and shows what would be tried. The same command
again goes on where a stopped sweep was.

  qat sweep recipe=smollm2_quickstart sweep=scheme_lr trainer.eval_every=10 --dry-run
  qat sweep recipe=smollm2_quickstart sweep=my_sweep.yaml sweep.trials=12 sweep.parallel=2
  qat report runs/scheme_lr
"""

from __future__ import annotations

import argparse
import signal
from typing import TYPE_CHECKING, Any

from qat.errors import UserError

if TYPE_CHECKING:
    from qat.cli.compose_sweep import SweepPlan


def arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides and --dry-run."""
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the planned trials, run nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    """Check, then run trials until the sweep is done or stopped; 0 when a trial has completed."""
    from qat.cli.compose_sweep import compose_sweep
    from qat.sweep.folder import check_folder
    from qat.sweep.study import import_optuna

    import_optuna()
    plan = compose_sweep(args.overrides)
    check_folder(plan.folder, plan.identity())
    if args.dry_run:
        return dry_run(plan)
    return drive(plan)


def drive(plan: SweepPlan) -> int:
    """Run what is left of the sweep; then the report."""
    from qat.report.sweep import write_sweep_report
    from qat.report.sweep_record import read_sweep
    from qat.sweep.driver import Driver
    from qat.sweep.folder import claimed
    from qat.sweep.launchers import LAUNCHERS
    from qat.sweep.study import Study

    with claimed(plan.folder, plan.identity()) as folder:
        study = Study(plan.config, plan.base.trainer.max_steps, folder.path)
        stopped = Driver(plan.config, folder, study, plan.trial, LAUNCHERS[plan.config.launcher].start).run()
        write_sweep_report(folder.path)
        record = read_sweep(folder.path)
    show(record)
    if stopped is not None:
        return 130 if stopped == signal.SIGINT else 75
    return 0 if record.complete() else 1


def dry_run(plan: SweepPlan) -> int:
    """The trials that would be tried; the first of them are composed and checked."""
    from rich.console import Console
    from rich.table import Table

    from qat.sweep.study import TPE_STARTUP, planned

    config = plan.config
    trials = planned(config, plan.base.trainer.max_steps, most=200)
    # compose_sweep has checked the corners; these are a sample of what lies between
    problems = [line for number, params in enumerate(trials[:32]) for line in trial_problems(plan, number, params)]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    table = Table("Trial", *(parameter.key for parameter in config.space))
    for number, params in enumerate(trials):
        table.add_row(str(number), *(text(params[parameter.key]) for parameter in config.space))
    Console().print(table)
    print(f"{len(trials)} trials, {config.parallel} at a time, in {plan.folder}")
    if config.sampler == "tpe" and len(trials) > TPE_STARTUP:
        print(f"from trial {TPE_STARTUP} on, tpe chooses by what earlier trials gave; shown is a draw without them")
    return 0


def trial_problems(plan: SweepPlan, number: int, params: dict[str, Any]) -> list[str]:
    """What is wrong with one planned trial."""
    try:
        plan.trial(number, params)
    except UserError as error:
        return list(error.problems)
    return []


def text(value: object) -> str:
    """Floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(record: Any) -> None:
    """The closing table of a sweep; the report has more columns."""
    from rich.console import Console
    from rich.table import Table

    from qat.report.sweep import metric_text

    keys = list(dict.fromkeys(key for trial in record.trials for key in trial.params))
    table = Table("Trial", "State", *keys, *record.objectives)
    for trial in record.trials:
        settings = (text(trial.params.get(key)) for key in keys)
        table.add_row(
            str(trial.number),
            trial.state,
            *settings,
            *(metric_text(m, trial.metrics.get(m)) for m in record.objectives),
        )
    Console().print(table)
    for trial in record.trials:
        if trial.state == "failed":
            print(f"{trial.folder} failed: {trial.reason}")
    print(f"sweep folder: {record.path}\nreport:       {record.path / 'report.html'}")
    best = record.best()
    if best is not None:
        print(f"best:         {best.folder}\nnext:         qat train recipe={record.path / 'best.yaml'}")
