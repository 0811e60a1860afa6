"""Microseconds of single operations: our kernels, torch, ONNX Runtime and OpenVINO, in one run, alternating.

    python scripts/bench_ops.py [--n 4096] [--k 4096] [--rounds 7] [--noisy]

Rows M = 1 (weights out of cache: enough copies that the third-level cache does not hold them, used in turn), 16, 256
and 2048; threads 1 and 2. Attention over 1024 cached tokens is the difference of two decode steps, per layer.
Nothing is printed when an output is not that of float weights within LIMITS. ONNX Runtime and OpenVINO are taken from
build/peers-env (`make bench-peers`); what is not there is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_machine import check_quiet, describe, fastest, median_share, others_share, read_bandwidth
from ops_peers import openvino_op, ort_op, peers_path
from torch import Tensor

from qat import grid
from qat.kernels import cpu
from qat.packing import PackedTensor, pack
from qat.scheme import QuantSpec

ROWS = (1, 16, 256, 2048)
CACHE = 3 * 32e6  # bytes that copies of a weight must exceed to be read from memory each time
GROUP = 32
PAUSE = 0.2  # seconds before a contender's turn, in which the threads of the one before stop spinning
# Largest error as a share of the largest output, from a float matmul with the same integer weights. int8 inputs per
# token or per block: half a step of 1/127 of the largest input, averaged over K; bf16: 2^-8.
LIMITS = {"w4a8": 0.03, "w8a8": 0.03, "int_mm": 0.03, "acc 4": 0.03, "u4": 0.03, "": 0.02}


def ours(x: Tensor, weight: cpu.CpuWeight, planes: int) -> Tensor:
    """The one place that knows how our op is called."""
    return cpu.matmul(f"w{4 if weight.bits <= 4 else 8}a{8 if planes == 1 else 16}_matmul", x, weight)


def rounded(n: int, k: int, spec: QuantSpec) -> PackedTensor:
    """A random weight [n, k] on a grid."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05
    qparams = grid.choose_qparams(*grid.min_max(weight, spec), spec)
    return pack(grid.quantize(weight, qparams, spec), qparams, spec)


def copies(size: float) -> int:
    """How many copies of `size` bytes the cache cannot hold."""
    return max(2, int(CACHE // size) + 1)


Op = tuple[float, list[Any], PackedTensor]  # bytes of the weight, one callable per copy, truth


def our_ops(w4: PackedTensor, w8: PackedTensor) -> dict[str, Op]:
    """w4a8, w4a16 and w8a8 on our kernels."""
    made = {}
    for name, tensor, planes in (("ours w4a8", w4, 1), ("ours w4a16", w4, 2), ("ours w8a8", w8, 1)):
        first = cpu.prepack([tensor])
        size = float(first.blob.numel())
        blobs = [first.blob.clone() for _ in range(copies(size))]
        cpu.in_huge_pages(blobs)  # as layers and engine do
        weights = [replace(first, blob=blob) for blob in blobs]
        calls = [lambda x, w=w, planes=planes: ours(x, w, planes) for w in weights]
        made[name] = (size, calls, tensor)
    return made


def torch_ops(w4: PackedTensor, w8: PackedTensor) -> dict[str, Callable[[], Op]]:
    """What torch brings: bf16, int4 in groups, int8 with scaling."""
    n, k = w4.shape

    def bf16() -> Op:
        weight = w4.dequantize(torch.bfloat16)
        held = [weight.clone() for _ in range(copies(2.0 * n * k))]
        return 2.0 * n * k, [lambda x, w=w: F.linear(x.bfloat16(), w) for w in held], w4

    def int4pack() -> Op:
        stored = (w4.codes().to(torch.int32) + 8).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(stored, 1)
        scale = w4.scale.bfloat16()
        both = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
        size = float(packed.numel() + both.numel() * 2)
        held = [(packed.clone(), both.clone()) for _ in range(copies(size))]
        op = torch.ops.aten._weight_int4pack_mm_for_cpu
        return size, [lambda x, h=h: op(x.bfloat16(), h[0], GROUP, h[1]) for h in held], w4

    def int_mm() -> Op:
        weight, scale = w8.codes().t(), w8.scale.view(1, -1)

        def call(x: Tensor, w: Tensor) -> Tensor:
            step = x.abs().amax(-1, keepdim=True) / 127
            codes = (x / step).round_().to(torch.int8)
            return torch._int_mm(codes, w).float() * step * scale

        held = [weight.clone() for _ in range(copies(float(n * k)))]
        return float(n * k + 2 * n), [lambda x, w=w: call(x, w) for w in held], w8

    return {"torch bf16": bf16, "aten int4pack": int4pack, "torch int_mm + scaling": int_mm}


def peer_ops(w4: PackedTensor) -> dict[str, Callable[[], Op]]:
    """ONNX Runtime and OpenVINO on the same int4 weight; both want a session per thread count, made by `threads`."""
    threads = torch.get_num_threads()
    size = float(w4.nbytes)
    count = copies(size)
    made: dict[str, Callable[[], Op]] = {}
    for level in (4, 0):
        made[f"onnxruntime acc {level}"] = partial(lambda level: (size, ort_op(w4, level, threads, count), w4), level)
    made["openvino u4"] = lambda: (size, openvino_op(w4, threads, count), w4)
    return made


def check(name: str, op: Op, x: Tensor) -> float:
    """Error as a share of the largest output; ends the program above the limit."""
    wanted = x @ op[2].dequantize(torch.float32).t()
    error = float((op[1][0](x).float() - wanted).abs().max() / wanted.abs().max())
    limit = next(value for key, value in LIMITS.items() if key in name)
    if not error < limit:
        raise SystemExit(f"{name}: error {error:.4f}, limit {limit}; no numbers")
    return error


def microseconds(op: Op, x: Tensor) -> float:
    """Mean time of a call, over all copies in turn, after a pause and a call that wakes the threads.

    A single row goes round the copies eight times: in the first milliseconds memory answers more slowly than later.
    """
    calls = op[1]
    repeats = {1: 8 * len(calls), 16: len(calls)}.get(x.shape[0], 2)
    time.sleep(PAUSE)
    calls[-1](x)
    started = time.perf_counter()
    for i in range(repeats):
        calls[i % len(calls)](x)
    return (time.perf_counter() - started) / repeats * 1e6


def matmul_rows(args: argparse.Namespace, threads: int, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every contender at every number of rows; tells `result` of the absent ones and of the read bandwidth."""
    absent, bandwidth = result["absent"], list[dict[str, float]]()
    w4 = rounded(args.n, args.k, QuantSpec(4, True, "group", GROUP))
    w8 = rounded(args.n, args.k, QuantSpec(8))
    ops = our_ops(w4, w8)
    for name, make in (torch_ops(w4, w8) | peer_ops(w4)).items():
        try:
            ops[name] = make()
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"absent: {name}: {absent[name]}", file=sys.stderr)
    rows = []
    for m in args.m:
        x = torch.randn(m, args.k, generator=torch.Generator().manual_seed(m))
        errors: dict[str, float] = {}
        times: dict[str, list[float]] = {name: [] for name in ops}
        for name in list(times):
            try:
                errors[name] = check(name, ops[name], x)
            except RuntimeError as error:  # _int_mm refuses few rows on some builds
                absent[f"{name}, {m} rows"] = str(error).splitlines()[0]
                del times[name]
        for number in range(args.rounds + 1):
            if m == 1 and number:
                bandwidth.append(read_bandwidth(threads))
            for name in times:
                took = microseconds(ops[name], x)
                if number:
                    times[name].append(took)
        for name, values in times.items():
            median = statistics.median(values)
            row = {"op": f"matmul {args.n}x{args.k}", "name": name, "threads": threads, "m": m, "error": errors[name]}
            row |= {"microseconds": median, "spread": [min(values), max(values)]}
            if m == 1:
                row["gigabytes_per_second"] = ops[name][0] / median / 1e3
                speeds = [ops[name][0] / took / 1e3 for took in values]
                row["share_of_bandwidth"] = median_share(speeds, bandwidth)
            rows.append(row)
            print(row, file=sys.stderr)
    result["bandwidth"][threads] = fastest(bandwidth or [read_bandwidth(threads)])
    return rows


def overhead_row(rounds: int) -> dict[str, Any]:
    """A call with next to nothing to compute, 16 outputs of 32 inputs, one thread."""
    weight = cpu.prepack([rounded(16, 32, QuantSpec(4, True, "group", GROUP))])
    x, times = torch.randn(1, 32), []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for _ in range(2000):
            cpu.matmul("w4a8_matmul", x, weight)
        times.append((time.perf_counter() - started) / 2000 * 1e6)
    values = times[1:]
    row = {"op": "call overhead 16x32", "name": "ours w4a8", "threads": torch.get_num_threads(), "m": 1}
    return row | {"microseconds": statistics.median(values), "spread": [min(values), max(values)]}


def attention_rows(threads: int, rounds: int) -> list[dict[str, Any]]:
    """Extra time of a decode step at 1024 tokens of context over one at none, per layer; int8 and bf16 cache."""
    from decode_contenders import OurEngine, packed_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=576,
        intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, 512, (1088,), generator=torch.Generator().manual_seed(0))

    def make() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    engines = {
        name: OurEngine(name, packed_model(make, "w4a8_g32", "w8a16", bits), 1088)
        for name, bits in (("bf16 cache", None), ("int8 cache", 8))
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            far = engine.measure(ids[:1024], ids[1024:], threads)[1]
            near = engine.measure(ids[:1], ids[1:65], threads)[1]
            if number:
                times[name].append((far - near) * 1e6 / 8)
    return [
        {"op": "attention over 1024 tokens, 9 heads on 3", "name": name, "threads": threads, "m": 1}
        | {"microseconds": statistics.median(values), "spread": [min(values), max(values)]}
        for name, values in times.items()
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, for one and two threads."""
    if cpu.unavailable():
        raise SystemExit(f"our kernels are not there: {cpu.unavailable()}")
    sys.path.append(peers_path())
    result: dict[str, Any] = {"machine": describe(), "absent": {}, "bandwidth": {}, "rows": [], "rounds": args.rounds}
    shares = []
    for threads in args.threads:
        shares.append(check_quiet(args.noisy))
        result["rows"] += matmul_rows(args, threads, result)
        result["rows"] += attention_rows(threads, args.rounds)
        result["rows"].append(overhead_row(args.rounds))
    shares.append(others_share())
    return result | {"others_share": max(shares), "quiet": max(shares) <= 0.06}


def main() -> None:
    """Parse, run, write, print."""
    from qat.report.table import ops_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--m", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--noisy", action="store_true", help="measure although others use the machine; marked as such")
    parser.add_argument("--output", type=Path, default=Path("docs/results/bench_ops.json"))
    args = parser.parse_args()
    result = run(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(ops_table(result))


if __name__ == "__main__":
    main()
