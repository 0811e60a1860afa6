"""Answers each prompt (through the model's chat template when it has one) with the packed model.

qat generate runs/smollm2_quickstart/export/compressed_tensors "What is the capital of France?"
qat generate runs/smollm2_quickstart/export/compressed_tensors --measure 64
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qat.cli.sampling import sampling, sampling_arguments
from qat.errors import UserError, problem
from qat.progress import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Folder, prompts, sampling, kernel, measuring."""
    parser.add_argument("folder", type=Path, help="export folder")
    parser.add_argument("prompts", nargs="*")
    sampling_arguments(parser, 64)
    parser.add_argument("--backend", default="auto", help="auto (decode engine if it can), or cpu, dense, reference")
    parser.add_argument("--json", action="store_true", help="print a JSON list of {prompt, answer}")
    parser.add_argument("--measure", type=int, metavar="N", help="print tokens per second of N decoded ones, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the answers, one that stands alone on a terminal as it is written; with --measure the speed alone."""
    if (args.measure is None) != bool(args.prompts) or (args.measure is not None and args.measure < 1):
        given = f"{len(args.prompts)} prompts, --measure {args.measure}"
        fix = "Give a prompt in quotes, or --measure 64."
        raise UserError(problem("qat generate", "needs prompts, or --measure with a number above 0", given, fix))
    if args.measure is not None:
        from qat.serve.speed import decode_speed

        print(json.dumps(decode_speed(args.folder, args.measure, args.backend)))
        return 0
    options = sampling(args)

    from qat.serve.generate import reply

    is_live = len(args.prompts) == 1 and not args.json and sys.stdout.isatty()

    def listen(text: str) -> None:
        print(text, end="", flush=True)

    answers, tokens, seconds = reply(args.folder, args.prompts, options, args.backend, listen if is_live else None)
    if args.json:
        print(json.dumps([{"prompt": p, "answer": a} for p, a in zip(args.prompts, answers, strict=True)]))
    elif is_live:
        print()
    else:
        for prompt, answer in zip(args.prompts, answers, strict=True):
            print(f"> {prompt}\n{answer}\n")
    say(f"{tokens} tokens, {tokens / seconds:.1f} per second")
    return 0
