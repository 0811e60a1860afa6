"""Answers each prompt (through the model's chat template when it has one) with the packed model.

qat generate runs/smollm2_quickstart/export/compressed_tensors "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from qat.cli.sampling import sampling, sampling_arguments
from qat.progress import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Folder, prompts, sampling, kernel."""
    parser.add_argument("folder", type=Path, help="export folder")
    parser.add_argument("prompts", nargs="+")
    sampling_arguments(parser, 64)
    parser.add_argument("--backend", default="auto", help="auto (decode engine if it can), or cpu, dense, reference")
    parser.add_argument("--json", action="store_true", help="print a JSON list of {prompt, answer}")


def run(args: argparse.Namespace) -> int:
    """Print the answers, one that stands alone on a terminal as it is written."""
    options = sampling(args)

    from qat.serve.generate import reply

    is_live = len(args.prompts) == 1 and not args.json and sys.stdout.isatty()

    def listen(text: str) -> None:
        print(text, end="", flush=True)

    started = time.perf_counter()
    answers, tokens = reply(args.folder, args.prompts, options, args.backend, listen if is_live else None)
    seconds = time.perf_counter() - started
    if args.json:
        print(json.dumps([{"prompt": p, "answer": a} for p, a in zip(args.prompts, answers, strict=True)]))
    elif is_live:
        print()
    else:
        for prompt, answer in zip(args.prompts, answers, strict=True):
            print(f"> {prompt}\n{answer}\n")
    say(f"{tokens} tokens, {tokens / seconds:.1f} per second with loading")
    return 0
