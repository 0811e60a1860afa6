"""The study: which values each trial takes, and what became of it. The only place that knows optuna.

Everything stands in one append-only journal file, so that a sweep whose driver died goes on with the same trials. The
sampler of a trial is seeded by (sweep.seed, trial number): stopping and continuing changes no draw.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.errors import UserError, problem
from qat.sweep.config import SweepConfig, grid

if TYPE_CHECKING:
    import optuna.trial

JOURNAL = "study.journal"
# Drawn at random before tpe has enough to learn from
TPE_STARTUP = 8


class Study:
    """An optuna study of a sweep, asked and told trial by trial.

    Args:
        config: a checked sweep.
        max_steps: optimizer steps of one run; hyperband's longest rung.
        folder: the sweep folder; None keeps the study in memory, for a look at what would be tried.
    Raises:
        UserError: optuna is not installed.
    """

    def __init__(self, config: SweepConfig, max_steps: int, folder: Path | None):
        optuna = import_optuna()
        storage: Any = None
        if folder is not None:
            end_last_line(folder / JOURNAL)
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL)))
        self.config = config
        self._spaces = {parameter.key: _distribution(optuna, parameter) for parameter in config.space}
        self._study = optuna.create_study(
            study_name=config.name,
            storage=storage,
            directions=[objective.direction for objective in config.objectives],
            pruner=_pruner(optuna, config, max_steps),
            load_if_exists=True,
        )
        self._running: dict[int, Any] = {}
        if config.sampler == "grid":
            for params in grid(config):
                self._study.enqueue_trial(params, skip_if_exists=True)

    @property
    def total(self) -> int:
        """How many trials the sweep has in all."""
        return len(grid(self.config)) if self.config.sampler == "grid" else self.config.trials or 0

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Every trial so far, by number."""
        return self._study.get_trials(deepcopy=False)

    def interrupted(self) -> list[int]:
        """Trials that were running when an earlier driver ended. They are taken up again, with their numbers."""
        found = [
            trial for trial in self.trials() if trial.state.name == "RUNNING" and trial.number not in self._running
        ]
        for trial in found:
            self._running[trial.number] = import_optuna().trial.Trial(self._study, trial._trial_id)
        return [trial.number for trial in found]

    def ask(self) -> int | None:
        """The number of the next trial; None when the sweep has no more."""
        started = [trial for trial in self.trials() if trial.state.name != "WAITING"]
        if len(started) >= self.total:
            return None
        self._study.sampler = _sampler(import_optuna(), self.config, len(started))
        trial = self._study.ask(self._spaces)
        self._running[trial.number] = trial
        return trial.number

    def params(self, number: int) -> dict[str, Any]:
        """Key -> value of a running trial."""
        return dict(self._running[number].params)

    def report(self, number: int, step: int, value: float) -> bool:
        """Record what a running trial has reached; True when it should be stopped."""
        trial = self._running[number]
        with warnings.catch_warnings():
            # a trial that was taken up again repeats what it reported before
            warnings.simplefilter("ignore")
            trial.report(value, step)
        completed = sum(other.state.name == "COMPLETE" for other in self.trials())
        return completed >= self.config.pruning.startup_trials and trial.should_prune()

    def note(self, number: int, **facts: Any) -> None:
        """Keep facts (minutes, reason, metrics) with a running trial."""
        for name, value in facts.items():
            self._running[number].set_user_attr(name, value)

    def facts(self, number: int) -> dict[str, Any]:
        """What `note` kept with a running trial."""
        return dict(self._running[number].user_attrs)

    def tell(self, number: int, state: str, values: list[float] | None = None) -> None:
        """End a running trial as complete (with one value for each objective), pruned or failed."""
        states = import_optuna().trial.TrialState
        name = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[state]
        self._study.tell(number, values, state=name)
        del self._running[number]


def planned(config: SweepConfig, max_steps: int, most: int) -> list[dict[str, Any]]:
    """What a new sweep would try: the first `most` trials, as drawn before any has ended."""
    study = Study(config, max_steps, None)
    numbers = [number for _ in range(min(most, study.total)) if (number := study.ask()) is not None]
    return [study.params(number) for number in numbers]


def import_optuna() -> Any:
    """optuna, quiet; UserError with the way to install it."""
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        fix = "Run: pip install 'qat[sweep]', or pip install 'optuna>=4'."
        raise UserError(problem("qat sweep", "needs the package optuna", "not installed", fix)) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def end_last_line(journal: Path) -> None:
    """Cut off a last line that a full disk or a power cut left unfinished; optuna would write on behind it."""
    if journal.is_file() and (content := journal.read_bytes()) and not content.endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _distribution(optuna: Any, parameter: Any) -> Any:
    kinds = optuna.distributions
    if parameter.kind == "choice":
        return kinds.CategoricalDistribution(parameter.values)
    if parameter.kind == "int":
        return kinds.IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return kinds.FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _sampler(optuna: Any, config: SweepConfig, number: int) -> Any:
    seed = 100_003 * config.seed + number
    if config.sampler != "tpe":
        # the trials of a grid are queued; nothing is left to draw
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # trials side by side keep away from one another
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=TPE_STARTUP, constant_liar=config.parallel > 1)


def _pruner(optuna: Any, config: SweepConfig, max_steps: int) -> Any:
    pruning = config.pruning
    if pruning.kind == "median":
        return optuna.pruners.MedianPruner(pruning.startup_trials, pruning.warmup_steps)
    if pruning.kind == "hyperband":
        shortest = min(pruning.warmup_steps, max_steps)
        return optuna.pruners.HyperbandPruner(min_resource=shortest, max_resource=max_steps)
    return optuna.pruners.NopPruner()
