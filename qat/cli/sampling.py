"""The options of sampling, shared by `qat generate` and `qat chat`."""

from __future__ import annotations

import argparse
from typing import Any


def sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Length, temperature and what belongs to it, stop strings, seed."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, help=f"longest answer (default {max_new_tokens})")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-k", type=int, default=0, help="draw from this many most likely tokens; 0 is all (default)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share (default 1)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens seen already become less likely")
    add("--seed", type=int, default=0, help="for temperatures above 0 (default 0)")
    add("--stop", action="append", default=[], help="end the answer before this text; may be given several times")


def sampling(args: argparse.Namespace) -> Any:
    """The `Sampling` of parsed arguments. Raises UserError naming every value that cannot be."""
    from qat.serve.sampling import Sampling

    return Sampling(
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
    )
