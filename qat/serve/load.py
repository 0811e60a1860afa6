"""An export folder -> a Hugging Face model on packed layers, generating through transformers' own `generate`.

The model is built on the meta device, packed layers and float tensors are put in, and whatever is still on meta at the
end is an error: nothing is ever left randomly initialised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import UserError, problem
from qat.formats import FORMATS
from qat.formats.packed_model import PackedModel
from qat.models import meta_from_dict
from qat.nn.kv import install_kv
from qat.nn.packed import PackedEmbedding, PackedLinear, pack_experts


def read_export(folder: Path) -> PackedModel:
    """The packed model of an export folder, every bound checked. Raises UserError naming file and tensor."""
    if not (folder / "config.json").is_file():
        fix = "Name an export folder, such as runs/NAME/export/compressed_tensors."
        raise UserError(problem(str(folder), "must hold an exported model", "no config.json", fix))
    return FORMATS["compressed_tensors"].read(folder)


def serve(packed: PackedModel, dtype: torch.dtype = torch.float32, backend: str = "as_trained") -> Any:
    """A Hugging Face causal LM whose quantized layers are Packed*; float tensors keep their dtype.

    Args:
        dtype: what dense kernels keep their weights in.
        backend: a name of `kernels.dispatch`, `auto` for speed, or `as_trained` for the arithmetic of training.
    """
    model = meta_from_dict(packed.config)
    for name, tensor in packed.tensors.items():
        _install(model, name, packed, tensor, dtype, backend)
    for alias, owner in packed.tied.items():
        packed_alias = packed.tensors[owner]
        _install(model, alias, packed, packed_alias, dtype, backend, scheme_name=owner)
    _load_floats(model, packed)
    install_kv(model, packed.kv)
    model.eval()
    return model


def _install(
    model: nn.Module,
    name: str,
    packed: PackedModel,
    tensor: Any,
    dtype: torch.dtype,
    backend: str,
    scheme_name: str | None = None,
) -> None:
    """Put one packed weight where its float layer stands."""
    scheme = packed.schemes[scheme_name or name]
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    if packed.modules.get(name) == "experts":
        pack_experts(module, attribute, tensor, bool(getattr(module, "is_transposed", False)))
        return
    parent = model.get_submodule(module_name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        layer: nn.Module = PackedEmbedding(tensor, module.padding_idx, backend, dtype)
    else:
        # a bias that the export lacks stays on meta and is refused with the other missing tensors
        empty: Any = module.bias
        bias = None if empty is None else packed.floats.get(f"{module_name}.bias", empty)
        static = packed.input_qparams.get(module_name)
        layer = PackedLinear(tensor, scheme, bias, static, backend, dtype)
    setattr(parent, module_name.rpartition(".")[2], layer)


def _load_floats(model: nn.Module, packed: PackedModel) -> None:
    """Put the float tensors in, and refuse if anything of the model has no value or any tensor no place."""
    extra = model.load_state_dict(packed.floats, strict=False, assign=True).unexpected_keys
    table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if model.config.tie_word_embeddings and type(head) is nn.Linear and type(table) is nn.Embedding:  # type: ignore[union-attr]
        head.weight = table.weight
    for module in model.modules():
        _rebuild_buffers(module, model.config)
    empty = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.device.type == "meta"]
    problems = []
    if empty:
        fix = "The export is incomplete: export the run again."
        problems.append(
            problem("export", "must hold every tensor of the model", f"none for {', '.join(empty[:10])}", fix)
        )
    if extra:
        fix = "The export is of another model than its config.json: export the run again."
        problems.append(problem("export", "must hold tensors of the model only", ", ".join(extra[:10]), fix))
    if problems:
        raise UserError(*problems)


def _rebuild_buffers(module: nn.Module, config: Any) -> None:
    """Non-persistent buffers (rotary frequencies, causal masks) are in no file: make them anew from the config."""
    names = [n for n, b in module._buffers.items() if b is not None and b.device.type == "meta"]
    if not names:
        return
    try:
        fresh = type(module)(config)
    except Exception:
        return
    for name in names:
        value = fresh._buffers.get(name)
        if value is not None:
            module._buffers[name] = value
