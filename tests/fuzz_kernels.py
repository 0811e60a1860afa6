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


def product(x: Tensor, weight: cpu.CpuWeight, planes: int) -> Tensor:
    """The op for the weight's bits; one plane is int8 inputs, two are float ones."""
    return cpu.matmul(f"w{4 if weight.bits <= 4 else 8}a{8 if planes == 1 else 16}_matmul", x, weight)


def matmul_case(rng: random.Random) -> str:
    """A product with finite inputs, some of them zero or huge, is that of the reference."""
    weight, planes, m = random_weight(rng), rng.choice((1, 2)), rng.choice((0, 1, 2, 3, 5, 6, 7, 13, 64))
    if cpu.refuses(weight):
        return "refused"
    k = weight.shape[-1]
    x = torch.randn(m, k) * 10 ** rng.uniform(-6, 6)
    if m and rng.random() < 0.3:
        x[rng.randrange(m)] = 0
    found = product(x, cpu.prepack([weight]), planes)
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
    clean = product(x, state, planes)
    row = rng.randrange(5)
    x[row, rng.randrange(x.shape[1])] = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38))
    found = product(x, state, planes)
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
    facts = state.grid
    how = rng.choice(("bytes", "short", "facts"))
    if how == "bytes":
        blob[torch.randint(0, blob.numel(), (blob.numel() // 4 + 1,))] = rng.randrange(256)
    elif how == "short":
        blob = blob[: rng.randrange(blob.numel())].clone()
    else:
        facts[rng.randrange(5)] = rng.choice((-1, 0, 1, 7, 31, 32, 10**6, 2**40))
    x = torch.randn(3, max(1, min(facts[1], 10**5)))
    try:
        rng.choice((torch.ops.qat.w4a16_matmul, torch.ops.qat.w8a16_matmul))(x, blob, facts)
    except RuntimeError:
        return f"tampered {how}, refused"
    return f"tampered {how}, computed"


def rows_case(rng: random.Random) -> str:
    """Rows of a table, norms and gates are those of the reference; attention reads only what it was given."""
    table = random_weight(rng)
    if cpu.refuses(table):
        return "refused"
    ids = torch.randint(0, table.shape[0], (rng.choice((0, 1, 5)),))
    assert torch.equal(cpu.embedding(ids, cpu.prepack([table])), reference.packed_embedding(ids, table)), table.spec
    x = torch.randn(3, rng.randint(1, 300)) * 10 ** rng.uniform(-4, 4)
    other = torch.randn_like(x)
    for found, wanted in (
        (torch.ops.qat.rmsnorm_quantize(x, other[0], 1e-5), reference.rmsnorm_quantize(x, other[0], 1e-5)),
        (torch.ops.qat.silu_mul_quantize(x, other), reference.silu_mul_quantize(x, other)),
    ):
        assert torch.allclose(found[1], wanted[1], rtol=1e-4, atol=1e-30)
        assert (found[0].int() - wanted[0].int()).abs().max() <= 1
    d, kv, shared, length = rng.choice((16, 48, 64, 128)), rng.randint(1, 3), rng.randint(1, 9), 16 * rng.randint(1, 40)
    is_int8, position = rng.random() < 0.5, torch.tensor([rng.randrange(length)])
    keys, values = (torch.zeros(1, kv, length, d if is_int8 else 2 * d, dtype=torch.uint8) for _ in range(2))
    scales = [torch.ones(1, kv, length) if is_int8 else torch.empty(0, 0, 0) for _ in range(2)]
    q, k, v = torch.randn(1, kv * shared, d), torch.randn(1, kv, d), torch.randn(1, kv, d)
    turn = torch.randn(length, d // 2)
    out = torch.ops.qat.decode_attention(q, k, v, turn, turn, position, keys, scales[0], values, scales[1])
    assert torch.isfinite(out).all()
    return "rows"


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
        rng.choice((torch.ops.qat.w4a16_matmul, torch.ops.qat.w8a16_matmul))(x, state.blob, state.grid)
    except RuntimeError:
        return "wrong input refused"
    raise AssertionError(f"accepted {x.dtype} {tuple(x.shape)} for K = {k}")


CASES: dict[str, Callable[[random.Random], str]] = {
    "matmul": matmul_case,
    "special": special_case,
    "tampered": tampered_case,
    "rows": rows_case,
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
