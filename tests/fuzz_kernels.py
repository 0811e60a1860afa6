"""Random shapes, grids and inputs through the C++ kernels against the reference, random small models through the decode
engine against itself (one sequence at once and alone); run under sanitizers by
`make test-sanitize`, for a limited time.

    python tests/fuzz_kernels.py [--seconds 120] [--seed 0]

Each case is one of CASES. What the kernels may refuse they refuse with an exception; anything else must be right, and
no access may leave its memory. To fuzz another op, write one function and add it to the table.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qat import grid
from qat.errors import UserError
from qat.formats.packed_model import PackedModel
from qat.grid import QParams
from qat.kernels import cpu, reference
from qat.packing import PackedTensor, pack
from qat.scheme import QuantScheme, QuantSpec
from qat.serve.engine import FAMILY, Engine

TOKEN = QuantSpec(8, True, "token", None, True, "float32", True)
STATIC = QuantSpec(8, True, "tensor", is_activation=True)
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
    facts = list(state.grid)
    how = rng.choice(("bytes", "short", "facts"))
    if how == "bytes":
        blob[torch.randint(0, blob.numel(), (blob.numel() // 4 + 1,))] = rng.randrange(256)
    elif how == "short":
        blob = blob[: rng.randrange(blob.numel())].clone()
    else:
        facts[rng.randrange(5)] = rng.choice((-1, 0, 1, 7, 31, 32, 10**6, 2**40))
    x = torch.randn(3, max(1, min(facts[1], 10**5)))
    try:
        rng.choice((torch.ops.qat.w4a16_matmul, torch.ops.qat.w8a16_matmul))(x, blob, *facts)
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
        rng.choice((torch.ops.qat.w4a16_matmul, torch.ops.qat.w8a16_matmul))(x, state.blob, *state.grid)
    except RuntimeError:
        return "wrong input refused"
    raise AssertionError(f"accepted {x.dtype} {tuple(x.shape)} for K = {k}")


def random_model(rng: random.Random) -> PackedModel:
    """A Llama of random small sizes, grids, biases, norms, window and cache; any part may differ from the next."""
    kv, size, layers = rng.randint(1, 3), rng.choice((16, 32, 48, 80)), rng.randint(1, 2)
    heads, inner = kv * rng.randint(1, 4), rng.choice((8, 40, 64, 128))
    hidden = heads * rng.choice((1, 7, 16, 32))  # a config needs a multiple
    vocabulary, positions = rng.choice((1, 31, 33, 100)), rng.choice((1, 5, 16, 40, 40, 300))
    config = {"model_type": rng.choice(FAMILY), "hidden_act": "silu", "hidden_size": hidden, "head_dim": size}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": inner}
    config |= {"num_hidden_layers": layers, "vocab_size": vocabulary, "max_position_embeddings": positions}
    config |= {"rms_norm_eps": 1e-5, "sliding_window": rng.choice((None, 1, 7, 30)), "tie_word_embeddings": False}
    model = PackedModel({}, {}, {}, {}, {"model.norm.weight": torch.rand(hidden)}, config, None, {})
    model.kv = TOKEN if rng.random() < 0.5 else None
    shapes = {f"self_attn.{name}_proj": (heads * size, hidden) for name in "q"}
    shapes |= {f"self_attn.{name}_proj": (kv * size, hidden) for name in "kv"}
    shapes |= {"self_attn.o_proj": (hidden, heads * size), "mlp.down_proj": (hidden, inner)}
    shapes |= {f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
    has_norm, has_bias = rng.random() < 0.3, rng.random() < 0.3
    for layer in range(layers):
        base = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            model.floats[f"{base}{name}.weight"] = torch.rand(hidden)
        for name, shape in shapes.items():
            put_weight(rng, model, base + name, shape)
        for name in "qk" if has_norm else "":
            model.floats[f"{base}self_attn.{name}_norm.weight"] = torch.rand(size)
        for name in "qkv" if has_bias else "":
            model.floats[f"{base}self_attn.{name}_proj.bias"] = torch.randn(shapes[f"self_attn.{name}_proj"][0])
    for name in ("model.embed_tokens", "lm_head"):
        put_weight(rng, model, name, (vocabulary, hidden))
    return model


def put_weight(rng: random.Random, model: PackedModel, name: str, shape: tuple[int, int]) -> None:
    """A weight of a random grid, with float, int8 or stored int8 inputs, or one kept in float."""
    for parts in (model.tensors, model.schemes, model.floats):
        parts.pop(f"{name}.weight", None)
    spec = random_spec(rng)
    if rng.random() < 0.1:
        model.floats[f"{name}.weight"] = torch.randn(shape)
        return
    if spec.group_size and (shape[1] % spec.group_size or spec.group_size % 32):
        spec = QuantSpec(spec.bits, spec.symmetric)
    weight = torch.randn(shape) / shape[1] ** 0.5
    qparams = grid.choose_qparams(*grid.min_max(weight, spec), spec)
    inputs = None if name == "model.embed_tokens" else rng.choice((None, TOKEN, STATIC))
    model.tensors[f"{name}.weight"] = pack(grid.quantize(weight, qparams, spec), qparams, spec)
    model.schemes[f"{name}.weight"] = QuantScheme("random", spec, inputs)
    if inputs is STATIC:
        model.input_qparams[name] = QParams(torch.tensor([10 ** rng.uniform(-3, 0)]), torch.zeros(1, dtype=torch.int32))


def engine_case(rng: random.Random) -> str:
    """Prompts in random pieces, then token by token up to the last position, beside other sequences: the bits that each
    sequence gets alone and at once, and the best of them."""
    model = random_model(rng)
    slots = rng.randint(1, 3)
    engine = Engine(model, model.config["max_position_embeddings"], slots)
    length, vocabulary = engine.positions, engine.vocabulary
    ids = torch.randint(0, vocabulary, (slots, length))
    torch.set_num_threads(rng.choice((1, 2)))
    done, found = [0] * slots, [[] for _ in range(slots)]
    while min(done) < length:
        rows = [(s, p) for s in range(slots) for p in range(done[s], min(length, done[s] + piece(rng)))]
        if rng.random() < 0.5:  # sequences side by side instead of one after another
            rows.sort(key=lambda row: row[1])
        if not rows:
            continue
        slot, position = torch.tensor(rows).t().contiguous()
        logits = engine.forward(ids[slot, position], slot, position, torch.arange(len(rows)))
        for (s, _), row in zip(rows, logits, strict=True):
            found[s].append(row)
            done[s] += 1
    alone = Engine(model, length, 1)
    for s in range(slots):
        at = torch.zeros(length, dtype=torch.long), torch.arange(length)
        wanted = alone.forward(ids[s], *at, torch.arange(length))
        assert torch.equal(torch.stack(found[s]), wanted), f"slot {s} of {slots}, {model.config}"
        k = rng.randint(1, vocabulary)
        best = alone.top(ids[s], *at, torch.tensor([length - 1]), k)
        order = wanted[-1:].sort(dim=-1, descending=True, stable=True)
        assert torch.equal(best[0], order.values[:, :k]) and torch.equal(best[1], order.indices[:, :k]), "not the best"
    return f"engine, {'int8' if model.kv else 'bfloat16'} cache"


def piece(rng: random.Random) -> int:
    """Rows of a sequence in one call: none, one (decoding) or a piece of a prompt."""
    return rng.choice((0, 1, 1, 2, 7, 30))


def engine_refuses_case(rng: random.Random) -> str:
    """Calls and models that do not fit are refused before anything is read."""
    model = random_model(rng)
    length, vocabulary = model.config["max_position_embeddings"], model.config["vocab_size"]
    if rng.random() < 0.5:
        name = rng.choice(sorted(model.floats))
        model.floats[name] = torch.rand(*(max(1, size + rng.choice((-1, 1, 40))) for size in model.floats[name].shape))
        other = rng.choice(sorted(model.tensors))
        if rng.random() < 0.5:
            put_weight(rng, model, other.removesuffix(".weight"), (rng.randint(1, 50), rng.randint(1, 50)))
        try:
            Engine(model, length, 2)
        except (RuntimeError, UserError):
            return "engine, wrong model refused"
        return "engine, other model accepted"
    engine = Engine(model, length, 2)
    one, far = torch.tensor([0]), rng.choice((-1, 2**40))
    call = [one, one, one, one]
    which = rng.randrange(6)
    if which < 4:
        call[which] = torch.tensor([rng.choice((far, (vocabulary, 2, length, 1)[which]))])
    elif which == 4:
        call[rng.randrange(3)] = rng.choice((torch.tensor([0, 0]), torch.tensor([0.0]), torch.tensor([[0]])))
    k = rng.choice((-1, vocabulary + 1, 2**40)) if which == 5 else rng.choice((0, 1))
    try:
        engine.top(*call, k)
    except RuntimeError:
        return "engine, wrong call refused"
    raise AssertionError(f"accepted {call}, k {k} of {vocabulary} tokens and {length} positions")


def top_case(rng: random.Random) -> str:
    """The k best of a head are those of its product, equal ones in order."""
    weight, m = random_weight(rng), rng.choice((0, 1, 2, 9, 70))
    if cpu.refuses(weight):
        return "refused"
    state, int8_inputs, k = cpu.prepack([weight]), rng.random() < 0.5, rng.randint(1, weight.shape[0])
    x = torch.randn(m, weight.shape[-1])
    values, tokens = cpu.lm_head_top(x, state, k, int8_inputs)
    wanted = product(x, state, 1 if int8_inputs else 2).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, wanted.values[:, :k]) and torch.equal(tokens, wanted.indices[:, :k]), weight.spec
    return "top"


CASES: dict[str, Callable[[random.Random], str]] = {
    "matmul": matmul_case,
    "special": special_case,
    "tampered": tampered_case,
    "rows": rows_case,
    "wrong": wrong_case,
    "top": top_case,
    "engine": engine_case,
    "engine refuses": engine_refuses_case,
}


def main() -> None:
    """Run cases until the time is over; a failing one names the seed that repeats it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--one", action="store_true", help="only the case of --seed")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # what transformers says of configurations as small as these
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
