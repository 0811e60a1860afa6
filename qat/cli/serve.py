"""An OpenAI-compatible server for one export folder, on this machine only unless --host says otherwise.

qat serve runs/smollm2_quickstart/export/compressed_tensors --port 8000 --slots 4

SIGTERM or Ctrl-C: new requests get 503, running answers finish within --drain-seconds, exit code 0; a second
one stops at once.
"""

from __future__ import annotations

import argparse
import ipaddress
from pathlib import Path

from qat.errors import UserError, problem


def arguments(parser: argparse.ArgumentParser) -> None:
    """Folder, address, sizes, limits."""
    add = parser.add_argument
    add("folder", type=Path, help="export folder")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0 takes any that is free (default 8000)")
    add("--name", help="name of the model in requests (default: the folder's)")
    add("--slots", type=int, default=4, help="answers decoded at a time (default 4)")
    add("--positions", type=int, default=2048, help="longest prompt with answer (default 2048)")
    add("--queue", type=int, default=64, help="requests that may wait before 429 (default 64)")
    add("--max-body-mb", type=float, default=1.0, help="larger requests get 413 (default 1)")
    add("--body-seconds", type=float, default=30.0, help="slower requests get 408 (default 30)")
    add("--drain-seconds", type=float, default=30.0, help="time to finish at the end (default 30)")
    add("--api-key", help="ask for this key as a Bearer token (default: none; needed with a --host others reach)")
    add("--backend", default="auto", help="auto (decode engine if it can), or cpu, dense, reference")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    least = {"slots": 1, "positions": 2, "queue": 0, "drain_seconds": 0, "max_body_mb": 0.001, "body_seconds": 0.1}
    problems = [
        problem(f"--{name.replace('_', '-')}", f"must be at least {low}", value, "Leave it out for the default.")
        for name, low in least.items()
        if not (value := getattr(args, name)) >= low
    ]
    if args.api_key is None and not is_this_machine(args.host):
        fix = "Add --api-key=SECRET, or listen on 127.0.0.1 behind a proxy that asks."
        problems.append(problem("--api-key", "must be given when other machines can ask", f"--host {args.host}", fix))
    if problems:
        raise UserError(*problems)
    try:
        from qat.serve.server import Limits, bind, run_server
    except ModuleNotFoundError as error:
        fix = "Install the extra: pip install 'qat[serve]'."
        raise UserError(problem("qat serve", "needs the web server's packages", f"no {error.name}", fix)) from None
    from qat.serve.generate import open_model

    with bind(args.host, args.port) as sock:
        model = open_model(args.folder, args.positions, args.slots, args.backend)
        model.name = args.name or model.name
        body_bytes = int(args.max_body_mb * 2**20)
        limits = Limits(args.queue, body_bytes, args.drain_seconds, args.api_key, args.body_seconds)
        run_server(model, sock, limits)
    return 0


def is_this_machine(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
