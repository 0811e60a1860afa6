"""A conversation in the terminal. /reset forgets it, /exit or Ctrl-D ends it, Ctrl-C stops the answer only.

qat chat runs/smollm2_quickstart/export/compressed_tensors --temperature 0.7
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from qat.cli.sampling import sampling, sampling_arguments
from qat.progress import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Folder, system message, sampling, sizes."""
    parser.add_argument("folder", type=Path, help="export folder")
    parser.add_argument("--system", help="a system message that stands before every conversation")
    sampling_arguments(parser, 256)
    parser.add_argument("--positions", type=int, default=2048, help="longest conversation in tokens (default 2048)")
    parser.add_argument("--backend", default="auto", help="auto (decode engine if it can), or cpu, dense, reference")


def run(args: argparse.Namespace) -> int:
    """Ask, answer, until the user leaves."""
    options = sampling(args)

    from qat.serve.chat import Conversation
    from qat.serve.generate import open_model

    talk = Conversation(open_model(args.folder, args.positions, 1, args.backend), options, args.system)
    say("/reset forgets the conversation, /exit ends it, Ctrl-C stops an answer")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if line == "/exit":
            return 0
        if line == "/reset":
            talk.reset()
        elif line:
            started = time.perf_counter()
            tokens = talk.ask(line, lambda text: print(text, end="", flush=True))
            print()
            say(f"{tokens} tokens, {tokens / (time.perf_counter() - started):.1f} per second")
