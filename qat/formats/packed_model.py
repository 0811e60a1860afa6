"""PackedModel: what every file format writes and reads. Plain data; no files, no modules.

Names are those of the Hugging Face checkpoint. A module's name is its weight's name without `.weight`; a fused expert
weight is a parameter without that ending, and its name stands for the module as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qat import grid
from qat.errors import UserError, problem
from qat.grid import QParams
from qat.packing import PackedTensor, scale_problems
from qat.scheme import KvSpec, QuantScheme, QuantSpec

KINDS = ("linear", "conv1d", "embedding", "experts")
FIX = "The file is damaged or was not written by qat: export again."


@dataclass
class PackedModel:
    """A quantized causal LM.

    `tensors`, `schemes` and `modules` (linear, conv1d, embedding or experts) share their keys: full weight names such
    as `model.layers.0.self_attn.q_proj.weight`. A conv1d weight is held as [N out, K in], like a linear one.
    `tied` maps an alias to the weight it shares, `lm_head.weight` to `model.embed_tokens.weight`.
    `input_qparams` holds, by module name, the stored input grid (scale [1], zero_point [1]) of static schemes.
    `floats` is everything else, `config` the content of config.json, `kv` the grid of keys and values or None.
    """

    tensors: dict[str, PackedTensor]
    schemes: dict[str, QuantScheme]
    tied: dict[str, str]
    input_qparams: dict[str, QParams]
    floats: dict[str, Tensor]
    config: dict[str, Any]
    kv: KvSpec | None
    modules: dict[str, str]

    def check(self) -> None:
        """Prove that the parts belong together.

        Raises:
            UserError: all problems at once; see `structure_problems` and `PackedTensor.check`.
        """
        problems = structure_problems(self)
        if problems:
            raise UserError(*problems)
        for name, tensor in self.tensors.items():
            try:
                tensor.check(name)
            except UserError as error:
                problems.extend(error.problems)
        for name, qparams in self.input_qparams.items():
            problems.extend(input_problems(name, qparams, self.static_inputs()[name]))
        if problems:
            raise UserError(*problems)

    def aliases(self, name: str) -> list[str]:
        """The other names of weight `name`."""
        return [alias for alias, owner in self.tied.items() if owner == name]

    def static_inputs(self) -> dict[str, QuantSpec]:
        """Spec of every module whose input grid is stored."""
        return dict(self._static_inputs())

    def _static_inputs(self) -> Iterator[tuple[str, QuantSpec]]:
        for name, scheme in self.schemes.items():
            if scheme.input is not None and not scheme.input.dynamic:
                for weight in (name, *self.aliases(name)):
                    yield weight.removesuffix(".weight"), scheme.input


def structure_problems(model: PackedModel) -> list[str]:
    """A line for every name without its counterpart and every kind or scheme that cannot be."""
    names = set(model.tensors)
    problems = []
    for part, keys in (("scheme", set(model.schemes)), ("module kind", set(model.modules))):
        problems += [problem(n, f"must be in tensors and have a {part}", "only one", FIX) for n in sorted(keys ^ names)]
    for name in sorted(names & set(model.schemes) & set(model.modules)):
        kind, scheme, tensor = model.modules[name], model.schemes[name], model.tensors[name]
        if kind not in KINDS:
            problems.append(problem(name, f"module kind must be one of {KINDS}", kind, FIX))
        if scheme.weight != tensor.spec:
            wanted = f"weight must be {scheme.weight.describe()} as its scheme {scheme.name} says"
            problems.append(problem(name, wanted, tensor.spec.describe(), FIX))
        if len(tensor.shape) != (3 if kind == "experts" else 2):
            wanted = f"{kind} weight must have {3 if kind == 'experts' else 2} dimensions"
            problems.append(problem(name, wanted, list(tensor.shape), FIX))
        if scheme.input is not None and kind in ("embedding", "experts"):
            problems.append(problem(name, f"{kind} inputs stay float", scheme.name, "Use a weight-only scheme."))
    for alias, owner in model.tied.items():
        if owner not in names or alias in names or alias in model.floats:
            problems.append(problem(f"{alias} = {owner}", "an alias must share a packed weight", "another", FIX))
    for name in sorted(names & set(model.floats)):
        problems.append(problem(name, "must be packed or float", "both", FIX))
    for name in sorted(set(model.static_inputs()) ^ set(model.input_qparams)):
        given = "none" if name not in model.input_qparams else "one for float or dynamic inputs"
        problems.append(problem(name, "a static input needs exactly one stored grid", given, FIX))
    return problems


def input_problems(name: str, qparams: QParams, spec: QuantSpec) -> list[str]:
    """A line for each part of a stored input grid that cannot be used."""
    where = f"{name}.input"
    if qparams.scale.shape != (1,) or qparams.zero_point.shape != (1,):
        given = f"{list(qparams.scale.shape)} and {list(qparams.zero_point.shape)}"
        return [problem(where, "scale and zero point must have shape [1]", given, FIX)]
    low, high = (0, 0) if spec.symmetric else grid.code_range(spec)
    zero_point = int(qparams.zero_point)
    problems = scale_problems(where, qparams.scale)
    if not low <= zero_point <= high:
        problems.append(problem(where, f"zero point must be in [{low}, {high}]", zero_point, FIX))
    return problems
