"""Training model -> PackedModel, proving on the way that the packed codes are those of training.

For every weight: codes from the training layer's own FakeQuantize, packed, unpacked again, and dequantized; the result
must equal, bit for bit, what the training layer's forward multiplies with. `digests` are what a later process compares
an export against without having the training model.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from qat import signals
from qat.errors import UserError, problem
from qat.formats.packed_model import PackedModel
from qat.grid import QParams
from qat.insert import Coverage
from qat.nn.quant import input_fake_quants, quantized_weights
from qat.packing import pack
from qat.scheme import KvSpec


def pack_model(model: nn.Module, coverage: Coverage, hf_config: dict, kv: KvSpec | None) -> PackedModel:
    """Pack every quantized weight of a training model.

    Raises:
        UserError: a layer whose packed codes are not those of training, or a weight not yet at its final bit width.
        signals.Stopped: between two weights.
    """
    tensors, schemes = {}, {}
    for name, weight, fake_quant in quantized_weights(model):
        signals.poll()
        if fake_quant.now.bits != fake_quant.spec.bits:
            given = f"{fake_quant.now.bits} bits"
            fix = "Train past the last `bits` phase before exporting."
            wanted = f"must be at its final {fake_quant.spec.bits} bits"
            raise UserError(problem(name, wanted, given, fix), before_work=False)
        packed = pack(fake_quant.codes(weight), fake_quant.qparams(weight), fake_quant.spec)
        with torch.no_grad():
            trained = fake_quant(weight.float(), torch.float32)
        differing = int((packed.dequantize(torch.float32) != trained).sum())
        if differing:
            given = f"{differing} of {trained.numel()} values differ"
            fix = "This is a defect of the exporter: please report it with the scheme."
            raise UserError(problem(name, "packed codes must be those of training", given, fix), before_work=False)
        tensors[name], schemes[name] = packed, coverage.schemes[name]
    layers = {layer.name: layer for layer in coverage.layers}
    return PackedModel(
        tensors=tensors,
        schemes=schemes,
        tied={name: layer.tied_to for name, layer in layers.items() if layer.tied_to and layer.scheme},
        input_qparams=static_inputs(model),
        floats=float_tensors(model, set(tensors)),
        config=hf_config,
        kv=kv,
        modules={name: layers[name].kind for name in tensors},
    )


def static_inputs(model: nn.Module) -> dict[str, QParams]:
    """Stored input grids by module name; scale [1] and zero point [1]."""
    static = {}
    for name, fake_quant in input_fake_quants(model):
        if fake_quant.scale_mode == "static":
            qparams = fake_quant.qparams(torch.empty(0))
            static[name] = QParams(qparams.scale.view(1), qparams.zero_point.view(1))
    return static


def float_tensors(model: nn.Module, quantized: set[str]) -> dict[str, Tensor]:
    """Everything a Hugging Face checkpoint of the model holds besides the quantized weights, as trained; ties once."""
    state = model.state_dict(keep_vars=True)
    seen = {id(tensor) for name, tensor in state.items() if name in quantized}
    tensors = {}
    for name, tensor in state.items():
        if id(tensor) not in seen and "fake_quant." not in name and "parametrizations." not in name:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def digest(*tensors: Tensor | None) -> str:
    """sha256 over the bytes of some tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            sha.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def digests(packed: PackedModel) -> dict[str, dict[str, str]]:
    """sha256 of everything served: codes and qparams of a packed tensor, qparams of `MODULE.input`, float values."""
    out = {}
    for name, tensor in packed.tensors.items():
        out[name] = {"codes": digest(tensor.codes()), "qparams": digest(tensor.scale, tensor.zero_point)}
    for name, qparams in packed.input_qparams.items():
        out[f"{name}.input"] = {"qparams": digest(*qparams)}
    for name, values in packed.floats.items():
        out[name] = {"values": digest(values)}
    return out


def compare(trained: PackedModel, served: PackedModel) -> list[dict]:
    """One line per tensor of parity.json: what differs between the training codes and the served ones."""
    lines = []
    for name, want in trained.tensors.items():
        line = {"name": name, "shape": list(want.shape), "bits": want.spec.bits, "codes": want.codes().numel()}
        have = served.tensors.get(name)
        if have is None or have.shape != want.shape:
            lines.append(line | {"mismatched_codes": line["codes"], "scales_equal": False, "zero_points_equal": False})
            continue
        line["mismatched_codes"] = int((have.codes() != want.codes()).sum())
        line["scales_equal"] = torch.equal(have.scale, want.scale)
        line["zero_points_equal"] = _equal(have.zero_point, want.zero_point)
        lines.append(line)
    return lines


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
