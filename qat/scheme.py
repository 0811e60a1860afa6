"""QuantSpec, KvSpec, QuantScheme, QuantPlan: which grid a tensor gets. Frozen data, validated, no tensors, no torch.

A spec is the grid of one tensor; a scheme is what one layer gets; a plan maps layer names to schemes.
How a float becomes a code is in `grid.py`, not here.

Letters: N out_features, K in_features, G groups per row, S group size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

from qat.errors import UserError, nearest, problem

GRANULARITIES = ("tensor", "channel", "group", "token")
SCALE_DTYPES = ("bfloat16", "float32")
KEEP = "keep"


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one tensor.

    `granularity` says how many scales there are: one (`tensor`), one per output row (`channel`), one per `group_size`
    values along the input dimension (`group`), or one per row of activations (`token`). `dynamic` grids take their
    scale from the tensor at hand; static ones hold it. `scale_dtype` is what a stored scale is rounded to, in training
    as in the file; a dynamic activation scale is never stored and stays float32. `is_activation` tells inputs and the
    KV cache from weights: their symmetric scale divides by the highest code (127), that of weights by half the range.
    """

    bits: int
    symmetric: bool = True
    granularity: str = "channel"
    group_size: int | None = None
    dynamic: bool = False
    scale_dtype: str = "bfloat16"
    is_activation: bool = False

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            problems.append(problem("bits", "must be a whole number from 2 to 8", self.bits, "Use 4 or 8."))
        if self.granularity not in GRANULARITIES:
            hint = nearest(str(self.granularity), GRANULARITIES)
            problems.append(problem("granularity", f"must be one of {GRANULARITIES}", self.granularity, hint))
        if self.granularity == "group" and (self.group_size is None or self.group_size < 1):
            fix = "Set group_size=32, 64 or 128."
            problems.append(problem("group_size", "granularity=group needs a positive size", self.group_size, fix))
        if self.granularity != "group" and self.group_size is not None:
            fix = "Drop group_size, or set granularity=group."
            wanted = f"granularity={self.granularity} takes no group size"
            problems.append(problem("group_size", wanted, self.group_size, fix))
        if self.granularity == "token" and not self.dynamic:
            fix = "Set dynamic=true, or granularity=tensor."
            problems.append(problem("dynamic", "per-token scales exist only at run time", self.dynamic, fix))
        if self.scale_dtype not in SCALE_DTYPES:
            hint = nearest(str(self.scale_dtype), SCALE_DTYPES)
            problems.append(problem("scale_dtype", f"must be one of {SCALE_DTYPES}", self.scale_dtype, hint))
        if problems:
            raise UserError(*problems)

    def groups(self, in_features: int) -> int:
        """Scales per row of `in_features` values; the caller has checked that the size divides."""
        return in_features // self.group_size if self.group_size else 1

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a weight [..., N, K]: [..., N, G], or all ones for `tensor`. Never 0-dim (FSDP2)."""
        if self.granularity == "tensor":
            return (1,) * len(shape)
        return (*shape[:-1], self.groups(shape[-1]))

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight [..., N, K]: codes (whole bytes per row), scales at 2 bytes, zero points at `bits` bits."""
        rows, scales = prod(shape[:-1]), prod(self.scale_shape(shape))
        zero_points = 0 if self.symmetric else (scales * self.bits + 7) // 8
        return rows * ((shape[-1] * self.bits + 7) // 8) + 2 * scales + zero_points

    def describe(self) -> str:
        """A short reading such as `int4 sym g32`."""
        size = f"g{self.group_size}" if self.group_size else self.granularity
        mode = " dynamic" if self.dynamic and self.granularity != "token" else ""
        return f"int{self.bits} {'sym' if self.symmetric else 'asym'} {size}{mode}"


@dataclass(frozen=True)
class KvSpec:
    """The grid of a cache: `values` is that of every head's vector of values, and of keys when `key_axis` is token.

    With `key_axis` channel, `group_size` tokens of one channel of keys share a scale, groups counted from the first
    token that is not a sink. The first `sink_tokens` stay float, and for each query its newest `recent_tokens`, itself
    included; a group of keys stays float until all of it is older than that.
    Source: per-channel keys and per-token values: Liu et al., KIVI, arXiv:2402.02750; float sink tokens: Xiao et al.,
    arXiv:2309.17453, and Hooper et al., KVQuant, arXiv:2401.18079.
    """

    values: QuantSpec
    key_axis: str = "token"
    group_size: int | None = None
    sink_tokens: int = 0
    recent_tokens: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.key_axis not in ("token", "channel"):
            fix = nearest(str(self.key_axis), ("token", "channel"))
            problems.append(problem("kv.key_axis", "must be token or channel", self.key_axis, fix))
        size = self.group_size
        if self.key_axis == "channel" and (type(size) is not int or size < 2):
            fix = "Set kv.group_size=32."
            problems.append(problem("kv.group_size", "key_axis=channel needs at least 2 tokens", size, fix))
        if self.key_axis == "token" and size is not None:
            fix = "Drop kv.group_size, or set kv.key_axis=channel."
            problems.append(problem("kv.group_size", "key_axis=token takes no group size", size, fix))
        for name, count in (("sink_tokens", self.sink_tokens), ("recent_tokens", self.recent_tokens)):
            if type(count) is not int or count < 0:  # from a file; of a run, checks.py says it first
                problems.append(problem(f"kv.{name}", "must be a count of tokens", count, f"Use kv.{name}=32 or 0."))
        if problems:
            raise UserError(*problems)

    @property
    def is_uniform(self) -> bool:
        """Whether every token is on the grid of `values`, whatever query reads it."""
        return self.key_axis == "token" and not self.sink_tokens and not self.recent_tokens

    @property
    def keys(self) -> QuantSpec:
        """The grid of keys; with `key_axis` channel of [..., channels, tokens], in groups along the tokens."""
        if self.key_axis == "token":
            return self.values
        return replace(self.values, granularity="group", group_size=self.group_size)

    def describe(self) -> str:
        """A short reading such as `int4 asym token, keys per channel g32, 4 sink and 32 recent tokens float`."""
        keys = f", keys per channel g{self.group_size}" if self.key_axis == "channel" else ""
        kept = f", {self.sink_tokens} sink and {self.recent_tokens} recent tokens float"
        return self.values.describe() + keys + (kept if self.sink_tokens or self.recent_tokens else "")


@dataclass(frozen=True)
class QuantScheme:
    """What one layer gets: a weight grid, and an input grid or None (float inputs)."""

    name: str
    weight: QuantSpec
    input: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.weight.granularity == "token":
            fix = "Use tensor, channel or group."
            raise UserError(problem(f"scheme {self.name}", "weights have no tokens", "granularity=token", fix))
        if self.input is not None and self.input.granularity not in ("tensor", "token"):
            fix = "Use granularity=token (dynamic) or tensor (static)."
            wanted = "inputs are quantized per token or per tensor"
            raise UserError(problem(f"scheme {self.name}.input", wanted, self.input.granularity, fix))
        assert not self.weight.is_activation and (self.input is None or self.input.is_activation)


@dataclass(frozen=True)
class PlanRule:
    """Layers whose full name matches the glob `match` get `scheme`, or stay float when it is None."""

    match: str
    scheme: QuantScheme | None


@dataclass(frozen=True)
class QuantPlan:
    """Ordered rules, first match wins; then `embedding` for token tables and output heads; then `default`."""

    rules: tuple[PlanRule, ...]
    default: QuantScheme
    embedding: QuantScheme | None

    def check_rules(self, names: Iterable[str]) -> list[str]:
        """A problem line for every rule that matches none of `names`."""
        names = list(names)
        problems = []
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.match) for name in names):
                hint = nearest(rule.match.strip("*"), names)
                problems.append(problem(f"plan rule '{rule.match}'", "must match a layer", "no match", hint))
        return problems

    def scheme_for(self, name: str, is_embedding: bool) -> tuple[QuantScheme | None, str]:
        """The scheme of layer `name` and the reason: the rule that decided."""
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                return rule.scheme, f"rule '{rule.match}'"
        if is_embedding:
            return self.embedding, "plan.embedding"
        return self.default, "scheme"


def indivisible(layers: dict[str, tuple[int, QuantSpec]]) -> list[str]:
    """A problem line for each input width that its group size does not divide, naming all layers of that width.

    `layers` maps a name to (in_features, weight spec).
    """
    found: dict[tuple[int, int], list[str]] = {}
    for name, (in_features, spec) in layers.items():
        if spec.group_size and in_features % spec.group_size:
            found.setdefault((in_features, spec.group_size), []).append(name)
    problems = []
    for (in_features, size), names in found.items():
        works = [d for d in (256, 192, 128, 96, 64, 48, 32, 24, 16, 8) if in_features % d == 0]
        fix = f"Use group_size={' or '.join(map(str, works))}," if works else "Use granularity=channel,"
        wanted = f"in_features must be a multiple of group_size={size}"
        problems.append(problem(", ".join(names), wanted, in_features, f"{fix} or keep them in float with plan rules."))
    return problems
