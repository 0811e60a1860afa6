"""Takes the overrides of `qat train`, and settings of the job under `cluster`: partition, account, time_minutes, ...
The run folder is runs_dir/name: a job that was preempted, or whose time was over, goes on where it saved.

  qat submit recipe=llama3_8b_w4a16_g128_fsdp2 cluster=slurm cluster.partition=gpu cluster.account=me
  qat submit --dry-run recipe=llama3_8b_w4a16_g128_fsdp2 cluster=slurm
  qat submit recipe=smollm2_quickstart cluster=local
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.errors import UserError, problem


def arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides, and whether only to show the script."""
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    """Submit, and say where the output goes and what to type next."""
    from qat.cli.compose import compose_run, to_yaml
    from qat.cluster.submit import node_command, script, submit
    from qat.run_folder import check_free

    config = compose_run(args.overrides)
    if config.cluster.kind == "local" and config.trainer.nodes > 1:
        fix = "Use cluster=slurm, or trainer.nodes=1."
        raise UserError(problem("trainer.nodes", "cluster=local is one machine", config.trainer.nodes, fix))
    folder = Path(config.runs_dir) / config.name
    if not (folder / "run_status.json").is_file():
        check_free(folder, config.overwrite)
    if args.dry_run:
        is_slurm = config.cluster.kind == "slurm"
        print(script(config, folder) if is_slurm else node_command(config, folder))
        return 0
    job = submit(config, to_yaml(config), folder)
    print(f"job:        {job.number}")
    print(f"run folder: {folder}")
    print(f"output:     {job.log}")
    return 0
