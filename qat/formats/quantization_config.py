"""`quantization_config` of config.json: the words in which compressed-tensors says what each module holds.

Layers with the same grids and the same container form one config group, whose targets are exact module names. Two
containers are used:
    int-quantized   int8 codes in `weight`: embeddings, tied matrices (stock transformers loads a tied matrix exactly
                    only this way), and 8-bit linear layers with quantized inputs
    pack-quantized  int32 words in `weight_packed`: everything else
Conv1D and fused expert weights have no place in that vocabulary (it knows nn.Linear and nn.Embedding); they are stored
pack-quantized and named by our own facts only. The tensors themselves are in `compressed_tensors.py`.
"""

from __future__ import annotations

from typing import Any

from qat.formats.packed_model import PackedModel
from qat.scheme import QuantSpec

INT_QUANTIZED = "int-quantized"
PACK_QUANTIZED = "pack-quantized"


def container(model: PackedModel, name: str) -> str:
    """How weight `name` is stored."""
    scheme, kind = model.schemes[name], model.modules[name]
    if kind == "embedding" or model.aliases(name):
        return INT_QUANTIZED
    if kind == "linear" and scheme.weight.bits == 8 and scheme.input is not None:
        return INT_QUANTIZED
    return PACK_QUANTIZED


def is_portable(model: PackedModel) -> bool:
    """Other engines can hold every weight: there is no conv1d and no fused expert weight."""
    return not {"conv1d", "experts"} & set(model.modules.values())


def quantization_config(model: PackedModel) -> dict[str, Any]:
    """The JSON content; a pure function of the model, so that a reader can compare it with what the file says."""
    groups: dict[tuple, list[str]] = {}
    for name in model.tensors:
        if model.modules[name] in ("linear", "embedding"):
            scheme = model.schemes[name]
            targets = groups.setdefault((scheme.weight, scheme.input, container(model, name)), [])
            targets += [weight.removesuffix(".weight") for weight in (name, *model.aliases(name))]
    formats = sorted({stored for _, _, stored in groups})
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": float_modules(model),
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{index}": {
                "targets": targets,
                "format": stored,
                "weights": arguments(weight),
                "input_activations": arguments(inputs) if inputs else None,
                "output_activations": None,
            }
            for index, ((weight, inputs, stored), targets) in enumerate(groups.items())
        },
    }


def arguments(spec: QuantSpec) -> dict[str, Any]:
    """A spec as compressed-tensors' QuantizationArgs."""
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity,
        "group_size": spec.group_size,
        "dynamic": spec.dynamic,
    }


def float_modules(model: PackedModel) -> list[str]:
    """Modules with a float matrix. vLLM refuses a linear layer that is neither a target nor ignored."""
    names = [n.removesuffix(".weight") for n, t in model.floats.items() if n.endswith(".weight") and t.dim() == 2]
    # A tied float matrix is stored under one name only; engines that build the other module look it up here.
    head_is_known = "lm_head" in names or "lm_head.weight" in model.tensors or "lm_head.weight" in model.tied
    return names if head_is_known else [*names, "lm_head"]
