"""The native format: compressed-tensors, as vLLM, SGLang and transformers read it, plus our own facts.

    pack-quantized, linear X [N, K], b bits             int-quantized, X [N, K]
    X.weight_packed      int32 [N, ceil(K b / 32)]      X.weight             int8 [N, K]
    X.weight_scale       bf16  [N, G], or [1]           X.weight_scale       bf16 [N, G], or [1]
    X.weight_shape       int64 [2]                      X.weight_zero_point  int8, like the scale
    X.weight_zero_point  int32 [ceil(N b / 32), G]      (zero points of asymmetric grids only)
                         (packed down the rows), or int8 [1]
    X.input_scale bf16 [1], X.input_zero_point int8 [1]: inputs with a stored grid

Rows of words are the canonical bytes of `packing.py`, filled up to whole words. The aliases of a tied matrix get copies
of its scale and zero point, which stock transformers needs to load it. Fused experts E [e, N, K] are stored as one
matrix of e N rows: `E_packed`, `E_scale`, `E_shape` [3], `E_zero_point`. Such weights, and Conv1D ones, have no place
in compressed-tensors, and a stock load would fill them with random values after one log line. Their config.json says
`model_type: qat-...`, which stock loaders do not know, and their files are called `qat*.safetensors`, because a model
class called by its name (GPT2LMHeadModel) only warns about a foreign model_type.

`transformers` 5.23 with compressed-tensors 0.20 loads what is here exactly in its default mode, except pack-quantized
zero points per channel or group: it allocates them unpacked, finds another shape in the file and raises, as it does for
compressed-tensors' own files. `dequantize=True` fails there for models with several config groups. Its 8-bit inputs
divide by 127.5, ours (and vLLM's) by 127. See `quantization_config.py` for the containers.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qat import grid
from qat.errors import UserError, problem
from qat.formats.facts import KEY, facts, read_facts
from qat.formats.folder import CONFIG, read_json, read_tensors, write_json, write_tensors
from qat.formats.packed_model import FIX, PackedModel
from qat.formats.quantization_config import INT_QUANTIZED, container, is_portable, quantization_config
from qat.grid import QParams
from qat.packing import PackedTensor, pack_rows, packed_width, padding_is_clear, tight, unpack_rows
from qat.scheme import QuantSpec

QUANTIZATION = "quantization_config"


def write(model: PackedModel, folder: Path) -> None:
    """Write config.json and the safetensors files into the existing `folder`; not tokenizer, card or checksums.

    Raises:
        UserError: see `PackedModel.check`; or the config is that of a model that is quantized already.
    """
    model.check()
    taken = sorted({QUANTIZATION, KEY} & set(model.config))
    if taken:
        raise UserError(problem(CONFIG, "must be that of a float model", taken, "Start from a float model."))
    tensors = dict(model.floats)
    for name in model.tensors:
        tensors.update(stored_weight(model, name))
    for name, spec in model.static_inputs().items():
        tensors[f"{name}.input_scale"] = model.input_qparams[name].scale.bfloat16()
        if not spec.symmetric:
            tensors[f"{name}.input_zero_point"] = model.input_qparams[name].zero_point.to(torch.int8)
    assert set(tensors) == expected_names(model, list(model.floats))
    write_tensors(tensors, folder, stem(model))
    ours: dict[str, Any] = {QUANTIZATION: quantization_config(model), KEY: facts(model)}
    ours["model_type"] = stored_model_type(model, model.config["model_type"])
    write_json(folder / CONFIG, model.config | ours)


def read(folder: Path) -> PackedModel:
    """The model in a folder that `write` made.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unexpected, misshapen or out of bounds, or the
            parts of config.json disagree with each other or with the tensors.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    model, floats = read_facts(config, where)
    told, original = config.pop(QUANTIZATION, None), config.pop(KEY)["model_type"]
    if told is None:
        raise UserError(problem(where, f"must hold {QUANTIZATION}", "none", FIX))
    if config.get("model_type") != stored_model_type(model, original):
        wanted = f"model_type must be {stored_model_type(model, original)}"
        raise UserError(problem(where, wanted, config.get("model_type"), FIX))
    model.config = config | {"model_type": original}
    tensors = read_tensors(folder, stem(model))
    check_names(str(folder), set(tensors), expected_names(model, floats))
    model.floats = {name: tensors[name] for name in floats}
    for name in model.schemes:
        model.tensors[name] = loaded_weight(model, name, tensors)
    for name, spec in model.static_inputs().items():
        model.input_qparams[name] = loaded_input(name, spec.symmetric, tensors)
    model.check()
    if told != quantization_config(model):
        fix = "config.json was edited or belongs to other tensors: export again."
        raise UserError(problem(where, f"{QUANTIZATION} must say what the tensors hold", "another", fix))
    return model


def stored_model_type(model: PackedModel, original: str) -> str:
    """What config.json says: the original, unless a stock load would silently serve random weights."""
    return original if is_portable(model) else f"qat-{original}"


def stem(model: PackedModel) -> str:
    """What the tensor files are called, for the same reason."""
    return "model" if is_portable(model) else "qat"


def expected_names(model: PackedModel, floats: list[str]) -> set[str]:
    """Every tensor in the files of a model with these schemes, ties and floats."""
    names = set(floats)
    for name, scheme in model.schemes.items():
        parts = ["", "_scale"] if container(model, name) == INT_QUANTIZED else ["_packed", "_scale", "_shape"]
        shared = ["_scale"] if scheme.weight.symmetric else ["_scale", "_zero_point"]
        names.update(name + part for part in {*parts, *shared})
        names.update(alias + part for alias in model.aliases(name) for part in shared)
    for name, spec in model.static_inputs().items():
        names.update([f"{name}.input_scale"] if spec.symmetric else [f"{name}.input_scale", f"{name}.input_zero_point"])
    return names


def check_names(where: str, held: set[str], expected: set[str]) -> None:
    """Both sets of tensor names are the same."""
    problems = []
    for verb, names in (("hold", expected - held), ("not hold", held - expected)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            given = f"{len(names)} {'missing' if verb == 'hold' else 'unexpected'}"
            problems.append(problem(where, f"must {verb} {shown}", given, FIX))
    if problems:
        raise UserError(*problems)


def stored_weight(model: PackedModel, name: str) -> dict[str, Tensor]:
    """The tensors that hold weight `name`, no two sharing memory."""
    tensor = model.tensors[name]
    bits, rows = tensor.spec.bits, tensor.packed.shape[0]
    flat = (1,) if tensor.spec.granularity == "tensor" else (rows, tensor.scale.shape[-1])
    shared = {"_scale": tensor.scale.bfloat16().reshape(flat)}
    as_int = container(model, name) == INT_QUANTIZED
    if tensor.zero_point is not None:
        zero_point = tensor.zero_point.reshape(flat)
        if not as_int and flat != (1,):
            zero_point = to_words(pack_rows(zero_point.t(), bits)).t()
        shared["_zero_point"] = zero_point
    if as_int:
        parts = {"": tensor.codes()}
    else:
        parts = {"_packed": to_words(tensor.packed), "_shape": torch.tensor(tensor.shape)}
    stored = {name + part: value for part, value in (parts | shared).items()}
    for alias in model.aliases(name):
        stored |= {alias + part: value.clone() for part, value in shared.items()}
    return stored


def loaded_weight(
    model: PackedModel, name: str, tensors: dict[str, Tensor], as_int: bool | None = None
) -> PackedTensor:
    """Weight `name` from its tensors; every shape and dtype is checked before it is used.

    Args:
        as_int: stored int-quantized; None for the container that `write` chooses.
    """
    spec = model.schemes[name].weight
    if as_int is None:
        as_int = container(model, name) == INT_QUANTIZED
    check_aliases(model, name, tensors)
    shape = tuple(tensors[name].shape) if as_int else loaded_shape(name, tensors)
    if not 2 <= len(shape) <= 3 or min(shape) < 1:
        raise UserError(problem(name, "must have 2 or 3 dimensions, none empty", list(shape), FIX))
    rows, length = prod(shape[:-1]), shape[-1]
    flat = (1,) if spec.granularity == "tensor" else (rows, spec.groups(length))
    scale = expect(f"{name}_scale", tensors, torch.bfloat16, flat).float().view(spec.scale_shape(shape))
    zero_point = None
    if not spec.symmetric:
        zero_point = loaded_zero_point(f"{name}_zero_point", tensors, spec.bits, flat, as_int).view(scale.shape)
    if as_int:
        packed = pack_rows(loaded_codes(name, tensors, spec).view(rows, length), spec.bits)
    else:
        words = expect(f"{name}_packed", tensors, torch.int32, (rows, -(-length * spec.bits // 32)))
        packed = from_words(f"{name}_packed", words, spec.bits, length)
    return PackedTensor(packed, scale, zero_point, spec, shape)


def check_aliases(model: PackedModel, name: str, tensors: dict[str, Tensor]) -> None:
    """The aliases' copies of scale and zero point are those of the weight."""
    for alias in model.aliases(name):
        for part in ("_scale",) if model.schemes[name].weight.symmetric else ("_scale", "_zero_point"):
            ours, theirs = tensors[name + part], tensors[alias + part]
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                raise UserError(problem(alias + part, f"must equal {name}{part}", "other values", FIX))


def loaded_codes(name: str, tensors: dict[str, Tensor], spec: QuantSpec) -> Tensor:
    """int8 codes of an int-quantized weight, inside the range of its bits."""
    codes = expect(name, tensors, torch.int8, tuple(tensors[name].shape))
    low, high = grid.code_range(spec)
    given = [int(codes.min()), int(codes.max())]
    if given[0] < low or given[1] > high:
        raise UserError(problem(name, f"codes must be in [{low}, {high}]", given, FIX))
    return codes


def loaded_zero_point(name: str, tensors: dict[str, Tensor], bits: int, flat: tuple[int, ...], as_int: bool) -> Tensor:
    """int8 zero points shaped `flat`: [N, G], or [1]."""
    if as_int or flat == (1,):
        return expect(name, tensors, torch.int8, flat)
    rows, groups = flat
    words = expect(name, tensors, torch.int32, (-(-rows * bits // 32), groups))
    return unpack_rows(from_words(name, words.t(), bits, rows), bits, rows).t().contiguous()


def loaded_shape(name: str, tensors: dict[str, Tensor]) -> tuple[int, ...]:
    """The logical shape in `<name>_shape`."""
    stored = tensors[f"{name}_shape"]
    if stored.dtype != torch.int64 or stored.dim() != 1:
        raise UserError(problem(f"{name}_shape", "must be a list of int64", describe(stored), FIX))
    return tuple(stored.tolist())


def loaded_input(name: str, symmetric: bool, tensors: dict[str, Tensor]) -> QParams:
    """The stored input grid of module `name`."""
    scale = expect(f"{name}.input_scale", tensors, torch.bfloat16, (1,)).float()
    if symmetric:
        return QParams(scale, torch.zeros(1, dtype=torch.int32))
    return QParams(scale, expect(f"{name}.input_zero_point", tensors, torch.int8, (1,)).to(torch.int32))


def to_words(packed: Tensor) -> Tensor:
    """uint8 [R, P] as little-endian int32 [R, ceil(P / 4)]."""
    return tight(pad(packed, (0, -packed.shape[1] % 4))).view(torch.int32)


def from_words(where: str, words: Tensor, bits: int, length: int) -> Tensor:
    """int32 [R, W] as the uint8 [R, P] that `length` codes take; what lies behind them must be 0."""
    packed = tight(words).view(torch.uint8)
    if not padding_is_clear(packed, bits, length):
        raise UserError(problem(where, "bits behind the last code of a row must be 0", "others", FIX))
    return tight(packed[:, : packed_width(length, bits)])


def expect(name: str, tensors: dict[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Tensor `name`, which must have that dtype and shape."""
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        wanted = f"must be {str(dtype).removeprefix('torch.')} {list(shape)}"
        raise UserError(problem(name, wanted, describe(tensor), FIX))
    return tensor


def describe(tensor: Tensor) -> str:
    """Such as `int8 [4, 32]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
