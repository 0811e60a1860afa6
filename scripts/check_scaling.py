"""The memory and traffic model of qat/scaling.py: tables for large models, and measured small runs beside it.

    python scripts/check_scaling.py            # both, written into docs/scaling.md and docs/results/scaling.json
    python scripts/check_scaling.py --tables   # the tables only, no measuring

A measured run is training itself (qat.train.fit) on a random Llama, in processes started by torchrun on gloo. Memory is
the peak of a process's anonymous pages after the first step, less those before the model was made; bytes are counted
at torch's dispatcher. Exit 1 when a figure is further from the model than TOLERANCE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"memory": 0.05, "traffic": 0.001}
LARGE = {"8B": "llama3_8b", "70B": "llama3_70b", "405B": "llama3_405b"}
RANKS = (8, 64, 512)
DOCUMENT, RESULTS = ROOT / "docs/scaling.md", ROOT / "docs/results/scaling.json"
SMALL = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
COMMON = ["model.path=random", "data.path=none", "data.block_size=256", "trainer.threads=1", "trainer.max_steps=4"]
COMMON += ["trainer.accelerator=cpu", "trainer.batch_size=4", "trainer.layer_stats_every=0"]
CASES = {
    "single": ["trainer=cpu"],
    "single, checkpointing": ["trainer=cpu", "trainer.gradient_checkpointing=true"],
    "single, cross entropy": ["trainer=cpu", "distill=ce"],
    "single, float32": ["trainer=cpu", "trainer.precision=fp32"],
    "single, W4A8": ["trainer=cpu", "scheme=w4a8_g32"],
    "single, learned scales": ["trainer=cpu", "fake_quant=learned"],
    "ddp, 2 ranks": ["trainer=ddp"],
    "ddp, 2 ranks, accumulate 2": ["trainer=ddp", "trainer.accumulate=2"],
    "fsdp2, 2 ranks": ["trainer=fsdp2", "trainer.gradient_checkpointing=false"],
    "fsdp2, 2 ranks, checkpointing": ["trainer=fsdp2"],
    "fsdp2, 2 ranks, accumulate 2": ["trainer=fsdp2", "trainer.accumulate=2"],
}


def case_config(name: str) -> Any:
    """The run of a measured case."""
    from qat.cli.compose import compose_run

    return compose_run([*COMMON, *CASES[name]])


def measure(name: str) -> dict[str, Any]:
    """Train one case in this process, one of its ranks; what rank 0 found."""
    import torch

    from qat import ranks
    from qat.scaling import job_of, memory, shape_of, traffic

    config = case_config(name)
    torch.set_num_threads(1)
    ranks.connect(config.trainer.accelerator, config.trainer.timeout_minutes)
    # what torch and Lightning load at the first step is no part of the model
    train(config, SMALL | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64})
    before = anonymous_pages()
    watch, hf_config, coverage = train(config, SMALL)
    shape, job = shape_of(hf_config, coverage), job_of(config)
    paper = memory(shape, job)
    return {
        "case": name,
        "memory": {"paper": paper.peak, "measured": watch.peak - before, "moment": paper.moment, "parts": paper.parts},
        "traffic": {"paper": traffic(shape, job), "measured": watch.step_bytes()},
    }


def train(config: Any, shape: dict[str, Any]) -> tuple[Watch, Any, Any]:
    """A run of the training loop as qat.pipeline does it: the float model stays, the teacher is made from it."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from qat import build
    from qat.train.fit import as_teacher, fit

    torch.manual_seed(0)
    floating = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32).eval()
    student = copy.deepcopy(floating)
    coverage = build.quantize_layers(student, config)
    teacher = as_teacher(floating, config.trainer.precision) if config.distill.kl_weight > 0 else None
    windows = torch.randint(shape["vocab_size"], (64, config.data.block_size))
    watch: Any = Watch()
    with watch:
        fit(student, teacher, windows, **build.training(config), metrics=watch)
    return watch, floating.config, coverage


class Watch:
    """Stands in for metrics.jsonl: at every step it notes the bytes of collectives; a thread watches the memory."""

    def __init__(self) -> None:
        self.peak, self.bytes, self._steps, self._done = 0, {}, [], threading.Event()  # type: ignore[var-annotated]

    def write(self, kind: str, step: int, **values: Any) -> None:
        """The end of a step; memory counts from the second on, when everything has been made."""
        if kind == "train":
            self._steps.append(dict(self.bytes))
            if len(self._steps) == 1:
                threading.Thread(target=self._sample, daemon=True).start()
            if len(self._steps) == 4:
                self._done.set()

    def truncate(self, step: int) -> None:
        """Nothing to take back."""

    def close(self) -> None:
        """Nothing to close."""

    def step_bytes(self) -> dict[str, float]:
        """Bytes of each collective in the last step."""
        last, before = self._steps[-1], self._steps[-2]
        return {name: size - before.get(name, 0) for name, size in last.items() if size > before.get(name, 0)}

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, anonymous_pages())

    def __enter__(self) -> Watch:
        from torch.utils._python_dispatch import TorchDispatchMode

        counts = self.bytes

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = COLLECTIVES.get(func._schema.name)
                if name:
                    counts[name] = counts.get(name, 0) + payload(name, args)
                return func(*args, **(kwargs or {}))

        self._count = Count()
        self._count.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._count.__exit__(*error)
        self._done.set()


COLLECTIVES = {
    "c10d::allreduce_": "all-reduce",
    "c10d::allreduce_coalesced_": "all-reduce",
    "c10d::broadcast_": "broadcast",
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::reduce_scatter_": "reduce-scatter",
}


def payload(name: str, args: Any) -> int:
    """Bytes of the whole tensor of a collective: the gathered one, the one to be scattered, or the reduced one."""
    import torch

    found = [part for part in flat(args[:2]) if isinstance(part, torch.Tensor)]
    sizes = [part.numel() * part.element_size() for part in found]
    return max(sizes) if name in ("all-gather", "reduce-scatter") else sum(sizes)


def flat(value: Any) -> list[Any]:
    """The leaves of nested lists and tuples."""
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else [value]


def anonymous_pages() -> int:
    """Bytes of this process that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def measured(name: str) -> dict[str, Any]:
    """One case in fresh processes."""
    ranks = "2" if "2 ranks" in name else "1"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        subprocess.run([*launch, __file__, "--case", name, "--output", str(output)], check=True, env=environment)
        return json.loads(output.read_text())


def large_shape(name: str) -> Any:
    """The shape of a large model, from its config.json and the recipe's plan."""
    from qat.checks import plan_from
    from qat.config import ModelConfig, recipes_dir
    from qat.insert import survey
    from qat.models import meta_model
    from qat.scaling import shape_of

    model = meta_model(ModelConfig(path=str(recipes_dir() / "architectures" / name)))
    _, coverage = survey(model, plan_from(large_config()))
    return shape_of(model.config, coverage)


def large_config() -> Any:
    """The run of the tables: the recipe for 8 GPUs with one window a rank."""
    from qat.cli.compose import compose_run

    return compose_run(["recipe=llama3_8b_w4a16_g128_fsdp2", "trainer.batch_size=1"])


def paper_tables() -> str:
    """Peak memory and bytes sent of the large models, and what the peak is made of."""
    from qat.scaling import job_of, memory, sent, traffic

    job = job_of(large_config())
    shapes = {name: large_shape(folder) for name, folder in LARGE.items()}
    head = ["Model", "Strategy", *(f"{n} ranks: GiB" for n in RANKS), *(f"{n} ranks: GiB sent" for n in RANKS)]
    rows = []
    for name, shape in shapes.items():
        for strategy in ("ddp", "fsdp2"):
            jobs = [replace(job, strategy=strategy, ranks=n) for n in RANKS]
            need = [f"{memory(shape, one).peak / 2**30:,.1f}" for one in jobs]
            moved = [f"{sent(traffic(shape, one), one.ranks) / 2**30:,.0f}" for one in jobs]
            rows.append([name, strategy, *need, *moved])
    parts: dict[str, list[str]] = {}
    for column, shape in enumerate(shapes.values()):
        found = memory(shape, replace(job, strategy="fsdp2", ranks=64))
        for part, size in {**found.parts, "**peak**": found.peak, "main memory of rank 0": found.host}.items():
            parts.setdefault(part, ["–"] * len(shapes))[column] = f"{size / 2**30:,.2f}"
    lines = [table(head, rows), "", "GiB of rank 0 at its peak, FSDP2, 64 ranks:", ""]
    peak = parts.pop("**peak**"), parts.pop("main memory of rank 0")
    body = [[part, *sizes] for part, sizes in parts.items()]
    body += [["**peak**", *peak[0]], ["main memory while loading", *peak[1]]]
    return "\n".join([*lines, table(["Part", *shapes], body)])


def measured_table(found: list[dict[str, Any]]) -> str:
    """Paper beside measured."""
    rows = []
    for case in found:
        both = case["memory"]
        paper, seen = case["traffic"]["paper"], case["traffic"]["measured"]
        moved = ", ".join(f"{name} {seen.get(name, 0) / 1e6:.2f} / {size / 1e6:.2f}" for name, size in paper.items())
        off = both["measured"] / both["paper"] - 1
        rows.append(
            [case["case"], f"{both['measured'] / 1e6:,.0f}", f"{both['paper'] / 1e6:,.0f}", f"{off:+.1%}", moved]
        )
    return table(["Case", "MB measured", "MB on paper", "off", "collectives of a step, MB measured / paper"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with numbers to the right."""
    lines = [head, [":---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put(name: str, text: str) -> None:
    """Replace what stands between the marks `name` of the document."""
    whole = DOCUMENT.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    before, rest = whole.split(begin)
    DOCUMENT.write_text(before + begin + text + end + rest.split(end)[1], encoding="utf-8")


def too_far(case: dict[str, Any]) -> list[str]:
    """Lines for the figures of a case that are further from the paper than TOLERANCE."""
    paper, seen = case["traffic"]["paper"], case["traffic"]["measured"]
    pairs = {"memory": (case["memory"]["paper"], case["memory"]["measured"])}
    # the last step's agreement of a few bytes on whether to stop is no part of the model
    pairs |= {name: (size, seen.get(name, 0)) for name, size in paper.items()}
    limits = {name: TOLERANCE["memory" if name == "memory" else "traffic"] for name in pairs}
    off = {name: there / here - 1 for name, (here, there) in pairs.items()}
    return [f"{case['case']}: {name} is off by {off[name]:+.1%}" for name in pairs if abs(off[name]) > limits[name]]


def main(argv: list[str] | None = None) -> int:
    """Write tables and measured figures; exit 1 when one is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="the tables only, no measuring")
    parser.add_argument("--case", choices=CASES, help="measure one case, in the processes that this is")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    if args.case:
        found = measure(args.case)
        if int(os.environ.get("RANK", "0")) == 0:
            text = json.dumps(found)
            args.output.write_text(text) if args.output else print(json.dumps(found, indent=1))
        return 0
    put("scaling_tables", paper_tables())
    if args.tables:
        return 0
    cases = [measured(name) for name in CASES]
    RESULTS.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    put("scaling_measured", measured_table(cases))
    wrong = [line for case in cases for line in too_far(case)]
    print("\n".join(wrong) or "all figures are within their limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
