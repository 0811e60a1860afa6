"""Random shapes, grids and inputs through the C++ kernels against the reference; run under sanitizers by
`make test-sanitize`, for a limited time.

    python tests/fuzz_kernels.py [--seconds 120] [--seed 0]

Each case is one of CASES. What the kernels may refuse they refuse with an exception; anything else must be right, and
no access may leave its memory. To fuzz another op, write one function and add it to the table.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qat import grid
from qat.kernels import cpu, reference
from qat.packing import PackedTensor, pack
from qat.scheme import QuantSpec

TOKEN = QuantSpec(8, True, "token", None, True, "float32", True)
# As in tests/tolerances.py: float inputs as two int8 planes, and one code per input on a tie
FLOAT_INPUTS, INTEGER_INPUTS = 2**-14, 2e-6 + 1 / 127


def random_spec(rng: random.Random) -> QuantSpec:
    """A grid that the kernels know, or one that they must refuse."""
    bits, symmetric = rng.choice((2, 3, 4, 5, 8)), rng.random() < 0.6
    size = rng.choice((None, None, 32, 64, 96, 128, 48))
    if size:
        return QuantSpec(bits, symmetric, "group", size)
    return QuantSpec(bits, symmetric, rng.choice(("channel", "tensor")))


def random_weight(rng: random.Random) -> PackedTensor:
    """A weight of random shape; K is a multiple of the group size."""
    spec = random_spec(rng)
    n = rng.choice((1, 2, 15, 16, 17, 33, rng.randint(1, 200)))
    k = (
        (spec.group_size or 1) * rng.randint(1, 5)
        if spec.group_size
        else rng.choice((1, 31, 32, 33, rng.randint(1, 300)))
    )
    weight = torch.randn(n, k) * 10 ** rng.uniform(-4, 2)
    if rng.random() < 0.2:
        weight[rng.randrange(n)] = 0
    qparams = grid.choose_qparams(*grid.min_max(weight, spec), spec)
    return pack(grid.quantize(weight, qparams, spec), qparams, spec)


def matmul_case(rng: random.Random) -> str:
    """packed_matmul with finite inputs, some of them zero or huge, is that of the reference."""
    weight, planes, m = random_weight(rng), rng.choice((1, 2)), rng.choice((0, 1, 2, 3, 5, 6, 7, 13, 64))
    if cpu.refuses(weight):
        return "refused"
    k = weight.shape[-1]
    x = torch.randn(m, k) * 10 ** rng.uniform(-6, 6)
    if m and rng.random() < 0.3:
        x[rng.randrange(m)] = 0
    found = cpu.packed_matmul(x, cpu.prepack([weight]), planes)
    if planes == 1:
        wanted = reference.wna8_matmul(x, weight, TOKEN, None)
    else:
        wanted = reference.wna16_matmul(x, weight)
    largest = x.abs().amax(-1, keepdim=True) if m else x.sum(-1, keepdim=True)
    bound = largest @ weight.dequantize(torch.float32).abs().sum(-1)[None]
    limit = INTEGER_INPUTS if planes == 1 else FLOAT_INPUTS
    assert found.shape == wanted.shape and bool(((found - wanted).abs() <= limit * bound + 1e-30).all()), weight.spec
    return f"planes {planes}"


def special_case(rng: random.Random) -> str:
    """NaN and infinite inputs spoil their own row and no other, and crash nothing."""
    weight = random_weight(rng)
    if cpu.refuses(weight):
        return "refused"
    x = torch.randn(5, weight.shape[-1])
    state, planes = cpu.prepack([weight]), rng.choice((1, 2))
    clean = cpu.packed_matmul(x, state, planes)
    row = rng.randrange(5)
    x[row, rng.randrange(x.shape[1])] = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38))
    found = cpu.packed_matmul(x, state, planes)
    others = [i for i in range(5) if i != row]
    assert torch.equal(found[others], clean[others]), "another row changed"
    return f"special {planes}"


def tampered_case(rng: random.Random) -> str:
    """A blob with other bytes gives other numbers or a refusal; facts that do not fit the blob are refused."""
    weight = random_weight(rng)
    if cpu.refuses(weight):
        return "refused"
    state = cpu.prepack([weight])
    blob = state.blob.clone()
    facts = [state.n, state.k, state.group, state.bits]
    how = rng.choice(("bytes", "short", "facts"))
    if how == "bytes":
        blob[torch.randint(0, blob.numel(), (blob.numel() // 4 + 1,))] = rng.randrange(256)
    elif how == "short":
        blob = blob[: rng.randrange(blob.numel())].clone()
    else:
        facts[rng.randrange(4)] = rng.choice((-1, 0, 1, 7, 31, 32, 10**6, 2**40))
    x = torch.randn(3, max(1, min(facts[1], 10**5)))
    try:
        torch.ops.qat.packed_matmul(x, blob, *facts, rng.choice((1, 2, 0, 3)))
    except RuntimeError:
        return f"tampered {how}, refused"
    return f"tampered {how}, computed"


def wrong_case(rng: random.Random) -> str:
    """Wrong dtypes, dimensions and strides are refused by the op itself."""
    weight = random_weight(rng)
    if cpu.refuses(weight):
        return "refused"
    state = cpu.prepack([weight])
    k = state.k
    wrong: list[Tensor] = [torch.randn(3, k).double(), torch.randn(k), torch.randn(3, k + 1), torch.randn(2, 3, k)]
    if k > 1:
        wrong.append(torch.randn(k, 3).t())
    x = rng.choice(wrong)
    try:
        torch.ops.qat.packed_matmul(x, state.blob, state.n, k, state.group, state.bits, 1)
    except RuntimeError:
        return "wrong input refused"
    raise AssertionError(f"accepted {x.dtype} {tuple(x.shape)} for K = {k}")


CASES: dict[str, Callable[[random.Random], str]] = {
    "matmul": matmul_case,
    "special": special_case,
    "tampered": tampered_case,
    "wrong": wrong_case,
}


def main() -> None:
    """Run cases until the time is over; a failing one names the seed that repeats it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--one", action="store_true", help="only the case of --seed")
    args = parser.parse_args()
    if cpu.unavailable():
        raise SystemExit(f"no kernels to fuzz: {cpu.unavailable()}")
    seen: dict[str, int] = {}
    until, seed = time.monotonic() + args.seconds, args.seed
    while time.monotonic() < until:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        name = rng.choice(list(CASES))
        try:
            outcome = CASES[name](rng)
        except Exception as error:
            raise SystemExit(f"case {name}, seed {seed}: {type(error).__name__}: {error}") from error
        seen[outcome] = seen.get(outcome, 0) + 1
        seed += 1
        if args.one:
            break
    print(f"{seed - args.seed} cases from seed {args.seed}: {dict(sorted(seen.items()))}")


if __name__ == "__main__":
    main()
