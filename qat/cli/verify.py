"""PATH is a run folder (compared with its training model, logits and perplexity too; writes parity.json) or an export
folder (checksums, bounds, and the digests of the training codes stored in it). Exit 0 only if all is equal.

  qat verify runs/smollm2_quickstart
  qat verify runs/smollm2_quickstart/export/compressed_tensors
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The path."""
    parser.add_argument("path", type=Path, help="run folder or export folder")


def run(args: argparse.Namespace) -> int:
    """Print the parity report as JSON, and the verdict on stderr."""
    from qat.cli.compose import from_yaml

    resolved = args.path / "resolved.yaml"
    config = from_yaml(resolved) if resolved.is_file() else None

    from qat.report.table import parity_is_equal, parity_text
    from qat.verify import verify_export, verify_run

    parity = verify_run(config, args.path) if config else verify_export(args.path)
    print(json.dumps(parity, indent=2))
    print(f"parity: {parity_text(parity)}", file=sys.stderr)
    return 0 if parity_is_equal(parity) else 1
