"""`qat VERB [arguments] [key=value ...]`. Verbs are a table; each imports what it needs when it runs.

Exit codes: 0 done, 1 failed or a check that says no, 2 refused before any work, 75 asked to stop by a signal and can be
resumed, 130 the same by Ctrl-C. No traceback for a user's mistake unless --debug is given.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from importlib import import_module

from qat import signals
from qat.errors import UserError, nearest, problem
from qat.paths import is_full_disk

# verb -> (module with `arguments(parser)` and `run(args) -> exit code`, one line)
VERBS: dict[str, tuple[str, str]] = {
    "doctor": ("qat.cli.doctor", "What this machine has: versions, CPU, compiler, kernels, write access"),
    "ls": ("qat.cli.ls", "List schemes, recipes, models, data, observers, formats"),
    "plan": ("qat.cli.plan", "Dry run: what every layer gets, bits per weight, memory, and every error at once"),
    "sensitivity": ("qat.cli.sensitivity", "How much each layer loses at each width, and the best plan for a budget"),
    "train": ("qat.cli.train", "A whole run: load, calibrate, train, evaluate, export, verify, report"),
    "resume": ("qat.cli.resume", "Go on with a run that stopped, bit for bit"),
    "sweep": ("qat.cli.sweep", "Many runs of one recipe: search or grid, stopped early where hopeless, resumable"),
    "report": ("qat.cli.report", "Make the report of a run or a sweep again"),
    "submit": ("qat.cli.submit", "The same run as a job of a cluster (SLURM), preempted and requeued without loss"),
    "quantize": (
        "qat.cli.quantize",
        "RTN, GPTQ, AWQ, ... without training: quantize, evaluate, export, verify, report",
    ),
    "evaluate": ("qat.cli.evaluate", "Perplexity of a run (fake and packed) or of an export folder"),
    "export": ("qat.cli.export", "Pack a finished run again"),
    "verify": ("qat.cli.verify", "Prove that an export holds the codes of training"),
    "generate": ("qat.cli.generate", "Text from a packed model"),
    "chat": ("qat.cli.chat", "A conversation with a packed model in the terminal"),
    "serve": ("qat.cli.serve", "An OpenAI-compatible server for a packed model"),
    "inspect": ("qat.cli.inspect", "What is in a run folder, an export, a model folder or a safetensors file"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (the console script passes it on)."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    try:
        return _dispatch(argv)
    except UserError as error:
        if debug:
            traceback.print_exc()
        for line in () if error.told_elsewhere else error.problems:
            print(f"error: {line}", file=sys.stderr)
        return 2 if error.before_work else 1
    except signals.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_full_disk(error):
            raise
        if debug:
            traceback.print_exc()
        where = getattr(error, "filename", None) or f"qat {argv[0]}"
        fix = "Free some there; a run goes on with `qat resume RUN`."
        print(f"error: {problem(str(where), 'must have room on its disk', error, fix)}", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items())
    epilog = f"verbs:\n{verbs}\n\n`qat VERB --help` says more. --debug shows tracebacks."
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: qat VERB [arguments] [key=value ...]\n\n" + epilog)
        return 0 if argv else 2
    verb = argv[0]
    if verb not in VERBS:
        raise UserError(problem("qat", "must name a verb", verb, nearest(verb, list(VERBS))))
    module_name, line = VERBS[verb]
    module = import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"qat {verb}",
        description=line,
        epilog=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(parser)
    run: Callable[[argparse.Namespace], int] = module.run
    # options may stand anywhere among the overrides
    return run(parser.parse_intermixed_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
