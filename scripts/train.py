"""`qat train` under Hydra's own launcher, for --multirun grids of single-process runs.

    python scripts/train.py recipes=smollm2_quickstart name=w4
    python scripts/train.py --multirun recipes=smollm2_quickstart scheme=w4a16_g32,w4a16_g64 'name=grid_${scheme.name}'

The qat command gives better messages; this gives Hydra's whole command line.
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from qat.cli.compose import settle, to_yaml
from qat.config import RunConfig, conf_dir, recipes_dir
from qat.errors import UserError, problem

ConfigStore.instance().store(name="run_schema", node=RunConfig)


def check_one_process(config: RunConfig) -> None:
    """Refuse jobs of several processes: Hydra composes in each of them, and they would not agree."""
    processes, world = config.trainer.devices * config.trainer.nodes, os.environ.get("WORLD_SIZE", "1")
    fix = "Use `qat sweep`, whose trials are jobs of their own, or torchrun with `qat train` for one run."
    where, wanted = "scripts/train.py", "runs one process per job"
    if processes > 1:
        raise UserError(problem(where, wanted, f"a run that needs {processes} processes", fix))
    if world != "1":
        raise UserError(problem(where, wanted, f"WORLD_SIZE={world}", fix))


@hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
def main(composed: DictConfig) -> None:
    """One run of the grid."""
    try:
        config = settle(composed)
        check_one_process(config)

        from qat import pipeline
        from qat.cli.train import show

        show(pipeline.run(config, to_yaml(config)), config.export.format)
    except UserError as error:
        raise SystemExit("\n".join(f"error: {line}" for line in error.problems)) from None


if __name__ == "__main__":
    # recipes/ stands beside conf/; Hydra writes its own logs nowhere
    quiet = ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra.sweep.dir=.", "hydra.sweep.subdir=."]
    sys.argv += [f"hydra.searchpath=[file://{recipes_dir().parent}]", *quiet, "hydra/job_logging=disabled"]
    main()
