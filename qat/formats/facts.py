"""Our own part of config.json, under the key `qat`: what quantization_config has no words for.

    format_version  1
    producer        "qat 0.1.0"
    model_type      the original one; see `compressed_tensors.py` for why config.json may say another
    kv              grid of keys and values, or null (other engines refuse int8 here, so they are not told)
    tied            {alias: weight}
    schemes         [{name, weight: {...}, input: {...} or null}]
    modules         {weight name: {kind, scheme: index into schemes}}
    floats          names of the tensors that are not quantized

Reading trusts nothing: every type is checked before a value is used.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from qat import __version__
from qat.errors import UserError, problem
from qat.formats.packed_model import FIX, PackedModel
from qat.scheme import KvSpec, QuantScheme, QuantSpec

KEY = "qat"
FORMAT_VERSION = 1
SPEC_TYPES: dict[str, tuple[type, ...]] = {
    "bits": (int,),
    "symmetric": (bool,),
    "granularity": (str,),
    "group_size": (int, type(None)),
    "dynamic": (bool,),
    "scale_dtype": (str,),
    "is_activation": (bool,),
}


def facts(model: PackedModel) -> dict[str, Any]:
    """The JSON content under `qat`."""
    schemes = list(dict.fromkeys(model.schemes.values()))
    return {
        "format_version": FORMAT_VERSION,
        "producer": f"qat {__version__}",
        "model_type": model.config["model_type"],
        "kv": asdict(model.kv) if model.kv else None,
        "tied": model.tied,
        "schemes": [asdict(scheme) for scheme in schemes],
        "modules": {n: {"kind": model.modules[n], "scheme": schemes.index(s)} for n, s in model.schemes.items()},
        "floats": list(model.floats),
    }


def read_facts(config: dict[str, Any], where: str) -> tuple[PackedModel, list[str]]:
    """The model that config.json describes, without its tensors yet, and the names of its float tensors.

    Raises:
        UserError: no facts, another format version, or anything malformed.
    """
    given = config.get(KEY)
    if not isinstance(given, dict):
        fix = "This folder was not exported by qat; load it with the tool that wrote it."
        raise UserError(problem(where, f"must hold our facts under '{KEY}'", type(given).__name__, fix))
    version = given.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        fix = "Read it with the qat version that wrote it, or export again."
        raise UserError(problem(where, f"format_version must be {FORMAT_VERSION}", version, fix))
    expect_type(f"{where} qat.model_type", given.get("model_type"), str)
    schemes = [
        read_scheme(f"{where} qat.schemes[{index}]", scheme)
        for index, scheme in enumerate(expect_type(f"{where} qat.schemes", given.get("schemes"), list))
    ]
    kv = None if given.get("kv") is None else read_kv(f"{where} qat.kv", given["kv"])
    tied = expect_type(f"{where} qat.tied", given.get("tied"), dict)
    floats = expect_type(f"{where} qat.floats", given.get("floats"), list)
    for name in (*tied.values(), *floats):
        expect_type(f"{where} qat.tied and qat.floats", name, str)
    model = PackedModel({}, {}, dict(tied), {}, {}, {}, kv, {})
    for name, module in expect_type(f"{where} qat.modules", given.get("modules"), dict).items():
        expect_type(f"{where} qat.modules {name}", module, dict)
        index = expect_type(f"{where} qat.modules {name}.scheme", module.get("scheme"), int)
        if not 0 <= index < len(schemes):
            raise UserError(problem(f"{where} {name}", f"scheme must be below {len(schemes)}", index, FIX))
        model.modules[name] = expect_type(f"{where} qat.modules {name}.kind", module.get("kind"), str)
        model.schemes[name] = schemes[index]
    return model, floats


def read_scheme(where: str, given: Any) -> QuantScheme:
    """A scheme from its JSON."""
    expect_type(where, given, dict)
    name = expect_type(f"{where}.name", given.get("name"), str)
    weight = read_spec(f"{where}.weight", given.get("weight"))
    inputs = None if given.get("input") is None else read_spec(f"{where}.input", given["input"])
    if weight.is_activation or weight.dynamic or (inputs is not None and not inputs.is_activation):
        raise UserError(problem(where, "weight grids are stored, input grids are of activations", given, FIX))
    return QuantScheme(name, weight, inputs)


def read_kv(where: str, given: Any) -> KvSpec:
    """The grid of a cache from its JSON."""
    expect_type(where, given, dict)
    wanted = {field.name for field in fields(KvSpec)}
    if set(given) != wanted:
        raise UserError(problem(where, f"must hold {', '.join(sorted(wanted))}", given, FIX))
    values = read_spec(f"{where}.values", given["values"])
    if values.granularity != "token" or not values.is_activation:
        raise UserError(problem(f"{where}.values", "values are quantized per token", given["values"], FIX))
    try:
        return KvSpec(**given | {"values": values})
    except UserError as error:
        raise UserError(*(f"{where}: {line}" for line in error.problems)) from None


def read_spec(where: str, given: Any) -> QuantSpec:
    """A spec from its JSON."""
    expect_type(where, given, dict)
    if set(given) != set(SPEC_TYPES) or any(type(given[key]) not in types for key, types in SPEC_TYPES.items()):
        raise UserError(problem(where, f"must hold {', '.join(SPEC_TYPES)}", given, FIX))
    try:
        return QuantSpec(**given)
    except UserError as error:
        raise UserError(*(f"{where}.{line}" for line in error.problems)) from None


def expect_type(where: str, value: Any, wanted: type) -> Any:
    """`value`, which must be of exactly that type."""
    if type(value) is not wanted:
        raise UserError(problem(where, f"must be a {wanted.__name__}", repr(value), FIX))
    return value
