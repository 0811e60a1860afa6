"""Answers each prompt (through the model's chat template when it has one) with the packed model.

qat generate runs/smollm2_quickstart/export/compressed_tensors "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qat.errors import UserError, problem


def arguments(parser: argparse.ArgumentParser) -> None:
    """Folder, prompts, length, temperature, kernel."""
    parser.add_argument("folder", type=Path, help="export folder")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    parser.add_argument("--backend", default="auto", help="auto (decode engine if it can), or cpu, dense, reference")
    parser.add_argument("--json", action="store_true", help="print a JSON list of {prompt, answer}")


def run(args: argparse.Namespace) -> int:
    """Print the answers."""
    if args.max_new_tokens < 1 or args.temperature < 0:
        given = f"{args.max_new_tokens} and {args.temperature}"
        wanted = "max-new-tokens must be at least 1 and temperature at least 0"
        raise UserError(problem("qat generate", wanted, given, "Leave them out for the defaults."))

    from qat.serve.generate import reply

    answers = reply(args.folder, args.prompts, args.max_new_tokens, args.temperature, args.seed, args.backend)
    pairs = [{"prompt": p, "answer": a} for p, a in zip(args.prompts, answers, strict=True)]
    if args.json:
        print(json.dumps(pairs))
        return 0
    for pair in pairs:
        print(f"> {pair['prompt']}\n{pair['answer']}\n")
    return 0
