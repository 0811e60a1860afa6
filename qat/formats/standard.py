"""Compressed-tensors folders that other programs wrote, as a PackedModel: integer weights per tensor, channel or group.

Config groups are matched to linear layers the way compressed-tensors does: a target is a class name, a full module name
or `re:` and a regular expression; `ignore` wins. Inputs on 8-bit grids run on our own, which divides by 127 (vLLM's
convention; compressed-tensors itself by 127.5). Our own folders say more: see `compressed_tensors.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError, problem
from qat.formats.compressed_tensors import QUANTIZATION, loaded_input, loaded_weight
from qat.formats.folder import CONFIG, read_json
from qat.formats.packed_model import PackedModel
from qat.formats.quantization_config import INT_QUANTIZED, PACK_QUANTIZED
from qat.scheme import QuantScheme, QuantSpec

FIX = "Load it without qat.serve.stock, or export it as integers per channel or group."


def refuses(told: dict[str, Any]) -> str | None:
    """Why a quantization_config cannot be served from packed weights, or None."""
    if told.get("kv_cache_scheme"):
        return "keys and values are quantized"
    for name, group in (told.get("config_groups") or {}).items():
        stored = group.get("format") or told.get("format")
        if stored not in (INT_QUANTIZED, PACK_QUANTIZED):
            return f"{name} is stored as {stored}"
        if group.get("output_activations"):
            return f"{name} quantizes outputs"
        try:
            scheme_of(name, group)
        except (UserError, TypeError) as error:
            return str(error)
    return None if told.get("config_groups") else "it has no config_groups"


def scheme_of(name: str, group: dict[str, Any]) -> QuantScheme:
    """The scheme of one config group. Raises UserError for grids that are not ours."""
    given = group.get("input_activations")
    return QuantScheme(name, spec_of(name, group["weights"]), spec_of(name, given, True) if given else None)


def spec_of(where: str, given: dict[str, Any], is_activation: bool = False) -> QuantSpec:
    """The grid that QuantizationArgs name."""
    strategy: Any = given.get("strategy")
    bits: Any = given.get("num_bits")
    allowed = ("token", "tensor") if is_activation else ("tensor", "channel", "group")
    dynamic = given.get("dynamic", False)
    if given.get("type") != "int" or strategy not in allowed or given.get("actorder") or not isinstance(dynamic, bool):
        asked = f"{given.get('type')} {strategy}, actorder {given.get('actorder')}, dynamic {dynamic}"
        raise UserError(problem(where, f"must be int by {', '.join(allowed)}, in order, dynamic or not", asked, FIX))
    size = given.get("group_size") if strategy == "group" else None
    scale_dtype = "float32" if dynamic else "bfloat16"
    return QuantSpec(bits, given.get("symmetric", True), strategy, size, dynamic, scale_dtype, is_activation)


def matches(name: str, kind: str, targets: list[str]) -> bool:
    """A module of class `kind` is one of the targets."""
    return any(
        re.match(target[3:], name) is not None if target.startswith("re:") else target in (name, kind)
        for target in targets
    )


def read_standard(folder: Path, files: list[Path], linear: list[str]) -> PackedModel:
    """The model in `files` of `folder`; `linear` are the full names of its nn.Linear modules.

    Raises:
        UserError: a grid that is not ours, or a tensor that is missing, misshapen or out of bounds.
    """
    from safetensors.torch import load_file

    config = read_json(folder / CONFIG)
    told = config.pop(QUANTIZATION)
    reason = refuses(told)
    if reason:
        raise UserError(problem(str(folder), "must hold integer weights that we can serve", reason, FIX))
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    model = PackedModel({}, {}, {}, {}, {}, config, None, {})
    used: set[str] = set()
    for name in linear:
        group = next((g for g in told["config_groups"].items() if matches(name, "Linear", g[1]["targets"])), None)
        if group is None or matches(name, "Linear", told.get("ignore") or []):
            continue
        used |= _take(model, name, scheme_of(*group), group[1].get("format") or told["format"], tensors)
    model.floats = {name: tensor for name, tensor in tensors.items() if name not in used}
    model.check()
    return model


def _take(model: PackedModel, module: str, scheme: QuantScheme, stored: str, tensors: dict[str, Tensor]) -> set[str]:
    """Put one layer into the model; the names of the tensors it took."""
    weight, as_int = f"{module}.weight", stored == INT_QUANTIZED
    needed = {weight if as_int else f"{weight}_packed", f"{weight}_scale"} | (set() if as_int else {f"{weight}_shape"})
    if not scheme.weight.symmetric:
        needed.add(f"{weight}_zero_point")
    static = scheme.input is not None and not scheme.input.dynamic
    if scheme.input is not None and static:
        needed |= {f"{module}.input_scale"} | (set() if scheme.input.symmetric else {f"{module}.input_zero_point"})
    missing = sorted(needed - set(tensors))
    if missing:
        raise UserError(problem(module, f"must have {', '.join(missing)}", "none", FIX))
    for name in [name for name in needed if name.endswith("_scale")]:
        tensors[name] = _bfloat16(name, tensors[name])
    model.schemes[weight], model.modules[weight] = scheme, "linear"
    model.tensors[weight] = loaded_weight(model, weight, tensors, as_int)
    if scheme.input is not None and static:
        model.input_qparams[module] = loaded_input(module, scheme.input.symmetric, tensors)
    # some writers store zero points of symmetric grids as well; they are zeros
    return needed | {f"{weight}_zero_point", f"{module}.input_zero_point"}


def _bfloat16(name: str, scale: Tensor) -> Tensor:
    """The scale [...] in bfloat16, which must hold it exactly."""
    if not torch.equal(scale.bfloat16().float(), scale.float()):
        raise UserError(problem(name, "scales must be exact in bfloat16", str(scale.dtype), FIX))
    return scale.bfloat16()
