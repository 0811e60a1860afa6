"""A plan on a model: swap float layers for training layers, and say of every parameter what happened to it.

Works on meta tensors too, which is how `qat plan` checks a model of any size in seconds. All problems are collected
and raised together, before anything is changed. Order of operations elsewhere: load -> insert -> (shard).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor, nn

from qat.errors import UserError, problem
from qat.estimators import ESTIMATORS
from qat.fake_quant import FakeQuantize
from qat.nn.quant import QuantConv1D, QuantEmbedding, QuantLinear, quantize_experts
from qat.scheme import QuantPlan, QuantScheme, indivisible


@dataclass(frozen=True)
class FakeQuantOptions:
    """How scales are found and which gradients flow; the same for every layer of a run."""

    estimator: str = "ste_clipped"
    weight_scale: str = "dynamic"
    weight_observer: str = "minmax"
    input_observer: str = "moving_average"
    learns_later: bool = False


@dataclass
class Layer:
    """One weight of the model: `shape` is [..., N, K] as the grid sees it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    scheme: str | None = None
    reason: str = ""
    bits: float = 32.0
    bytes: int = 0
    tied_to: str | None = None
    unsupported: bool = False


@dataclass
class Coverage:
    """What became of every parameter."""

    layers: list[Layer] = field(default_factory=list)
    schemes: dict[str, QuantScheme] = field(default_factory=dict)
    kv: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """All parameters, a tied matrix once."""
        return sum(layer.weights for layer in self.layers)

    @property
    def quantized_weights(self) -> int:
        """Parameters on a grid."""
        return sum(layer.weights for layer in self.layers if layer.scheme)

    @property
    def coverage(self) -> float:
        """Share of the parameters on a grid."""
        return self.quantized_weights / max(1, self.weights)

    @property
    def bytes(self) -> int:
        """Bytes of the whole model as packed: codes, scales, zero points, and float32 for the rest."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Everything counted."""
        return 8 * self.bytes / max(1, self.weights)

    def to_dict(self) -> dict:
        """The content of coverage.json."""
        return {
            "weights": self.weights,
            "quantized_weights": self.quantized_weights,
            "coverage": self.coverage,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes,
            "float_bytes": 4 * self.weights,
            "kv": self.kv,
            "layers": [asdict(layer) for layer in self.layers],
        }


@dataclass
class Site:
    """Where a weight sits: enough to swap it."""

    layer: Layer
    attribute: str
    module: nn.Module
    weight: Tensor
    transposed: bool = False


def insert(model: nn.Module, plan: QuantPlan, options: FakeQuantOptions, max_unsupported: float = 1.0) -> Coverage:
    """Swap the planned layers of a Hugging Face causal LM in place.

    Raises:
        UserError: every rule without a match, every group size that does not divide, a tied matrix with two schemes,
            or more than `max_unsupported` of the weights in layers without a grid that no rule keeps, all in one.
    """
    sites, coverage = survey(model, plan)
    problems = coverage.problems + plan.check_rules([layer.name.removesuffix(".weight") for layer in coverage.layers])
    grids = {s.layer.name: coverage.schemes[s.layer.name] for s in sites if s.layer.scheme}
    shapes = {site.layer.name: site.layer.shape for site in sites}
    problems += indivisible({name: (shapes[name][-1], scheme.weight) for name, scheme in grids.items()})
    unsupported = [layer for layer in coverage.layers if layer.unsupported]
    share = sum(layer.weights for layer in unsupported) / max(1, coverage.weights)
    if share > max_unsupported:
        names = "; ".join(f"{x.name} ({x.reason})" for x in sorted(unsupported, key=lambda x: -x.weights)[:5])
        wanted = f"at most {max_unsupported:.0%} of the weights may be of layers without a grid"
        fix = f"Largest: {names}. Keep them by plan rules if that is meant, or raise plan.max_unsupported."
        problems.append(problem("plan.max_unsupported", wanted, f"{share:.1%}, which would stay float", fix))
    if problems:
        raise UserError(*problems)
    owners: dict[int, FakeQuantize] = {}
    planned = [site for site in sites if site.layer.scheme]
    _put(model, {id(site.module): _made(site, grids[site.layer.name], options, owners) for site in planned})
    model.train(model.training)  # new layers are born in training mode whatever the model is in
    return coverage


def survey(model: nn.Module, plan: QuantPlan) -> tuple[list[Site], Coverage]:
    """Every weight that could be quantized with the plan's decision, and the coverage of all parameters."""
    tables = {id(m) for m in (_call(model, "get_input_embeddings"), _call(model, "get_output_embeddings")) if m}
    coverage, sites = Coverage(), []
    first_name: dict[int, str] = {}
    for module_name, module in model.named_modules():
        handled = set()
        for site in _sites(model, module_name, module):
            handled.add(site.layer.name.removeprefix(f"{module_name}."))
            owner = first_name.setdefault(id(site.weight), site.layer.name)
            _decide(site, plan, id(module) in tables, owner, coverage)
            sites.append(site)
        for name, parameter in module.named_parameters(recurse=False):
            if name in handled or id(parameter) in first_name:
                continue
            first_name[id(parameter)] = f"{module_name}.{name}"
            coverage.layers.append(_kept(module_name, module, name, parameter, plan))
    return sites, coverage


def _kept(module_name: str, module: nn.Module, name: str, parameter: Tensor, plan: QuantPlan) -> Layer:
    """The line of a parameter that has no grid: a vector, or a matrix of a layer type we do not know."""
    kind, size = type(module).__name__, parameter.numel()
    kept = Layer(f"{module_name}.{name}", kind, tuple(parameter.shape), size, reason="vector", bytes=4 * size)
    if parameter.dim() >= 2:
        scheme, why = plan.scheme_for(module_name, False)
        by_rule = scheme is None and why != "scheme"
        kept.reason = f"kept by {why}" if by_rule else f"{kind} is not a layer type with a grid"
        kept.unsupported = not by_rule
    return kept


def _call(model: nn.Module, method: str) -> nn.Module | None:
    return getattr(model, method)() if hasattr(model, method) else None


def _sites(model: nn.Module, module_name: str, module: nn.Module) -> Iterator[Site]:
    """The quantizable weights that `module` itself owns."""
    kind = {nn.Linear: "linear", nn.Embedding: "embedding"}.get(type(module))
    if kind is None and type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        kind = "conv1d"
    if kind:
        weight: Tensor = getattr(module, "weight")  # noqa: B009 - nn.Module has no such attribute for the type checker
        shape = tuple(weight.shape) if kind != "conv1d" else tuple(weight.shape[::-1])
        layer = Layer(f"{module_name}.weight", kind, shape, weight.numel())
        yield Site(layer, "weight", module, weight, kind == "conv1d")
        return
    if type(module).__module__.startswith("torch.nn."):
        return  # convolutions and the like: a 3-D kernel is no stack of experts
    transposed = bool(getattr(module, "is_transposed", False))
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3:
            e, n, k = parameter.shape
            shape = (e, k, n) if transposed else (e, n, k)
            layer = Layer(f"{module_name}.{name}", "experts", shape, parameter.numel())
            yield Site(layer, name, module, parameter, transposed)


def _decide(site: Site, plan: QuantPlan, is_table: bool, owner: str, coverage: Coverage) -> None:
    """Write scheme, reason and bytes into the site's layer; record it in the coverage."""
    layer = site.layer
    module_name = layer.name.removesuffix(".weight")
    scheme, reason = plan.scheme_for(module_name, is_table)
    if layer.kind == "embedding" and not is_table and reason == "scheme":
        scheme, reason = None, "a position or type table, not a token table"
    elif scheme is None:
        reason = f"kept by {reason}"
    if scheme is not None and scheme.input is not None and layer.kind in ("experts", "embedding"):
        why = "inputs of fused experts stay float" if layer.kind == "experts" else "a table has no input to quantize"
        scheme, reason = replace(scheme, input=None), f"{reason}; {why}"
    if owner != layer.name:
        layer.tied_to, layer.weights = owner, 0
        owner_scheme = coverage.schemes.get(owner)
        if (scheme.weight if scheme else None) != (owner_scheme.weight if owner_scheme else None):
            fix = "Give both names the same scheme, or set plan.embedding alone."
            given = f"{scheme.name if scheme else 'keep'} and {owner_scheme.name if owner_scheme else 'keep'}"
            coverage.problems.append(problem(f"{layer.name} = {owner}", "a tied matrix has one scheme", given, fix))
        if scheme is not None and scheme.input is not None:
            reason = f"{reason}; a tied head takes the scheme of its table, whose inputs stay float"
        scheme = owner_scheme
    if scheme is not None:
        layer.scheme, layer.reason, layer.bits = scheme.name, reason, float(scheme.weight.bits)
        coverage.schemes[layer.name] = scheme
        if not layer.tied_to and not indivisible({layer.name: (layer.shape[-1], scheme.weight)}):
            layer.bytes = scheme.weight.packed_bytes(layer.shape)
    else:
        layer.reason, layer.bytes = reason, 4 * layer.weights
    coverage.layers.append(layer)


def _made(site: Site, scheme: QuantScheme, options: FakeQuantOptions, owners: dict[int, FakeQuantize]) -> nn.Module:
    """The training layer of one float layer (experts: itself, changed); a tied weight shares one FakeQuantize."""
    weight_fq = owners.get(id(site.weight))
    if weight_fq is None:
        shape = scheme.weight.scale_shape(site.layer.shape)
        estimator = ESTIMATORS[options.estimator]
        how = (estimator, options.weight_scale, options.weight_observer, options.learns_later)
        weight_fq = FakeQuantize(scheme.weight, shape, *how)
        weight_fq.to(site.weight.device)
        owners[id(site.weight)] = weight_fq
    if site.layer.kind == "experts":
        quantize_experts(site.module, site.attribute, weight_fq, site.transposed)
        return site.module
    if site.layer.kind == "embedding":
        assert isinstance(site.module, nn.Embedding)
        return QuantEmbedding(site.module, weight_fq)
    input_fq = None
    if scheme.input is not None:
        mode = "dynamic" if scheme.input.dynamic else "static"
        input_fq = FakeQuantize(scheme.input, (1,), ESTIMATORS["ste_clipped"], mode, options.input_observer)
        input_fq.to(site.weight.device)
    if site.layer.kind == "linear":
        assert isinstance(site.module, nn.Linear)
        return QuantLinear(site.module, weight_fq, input_fq)
    return QuantConv1D(site.module, weight_fq, input_fq)


def _put(model: nn.Module, made: dict[int, nn.Module]) -> None:
    """Training layers in the place, or the several places, where a model calls the float ones."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in made:
                setattr(parent, name, made[id(child)])
