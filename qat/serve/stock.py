"""One import, and stock transformers serves compressed-tensors folders from our packed layers and kernels.

    import qat.serve.stock
    model = AutoModelForCausalLM.from_pretrained("EXPORT_FOLDER")

Importing puts `PackedLoading` in the place that transformers' table has for compressed-tensors. Folders that it cannot
take (floats of 4 or 8 bits, quantized caches, a GPU asked for, `dequantize=True`) go to the loading that stood there
before, and a warning says why. Activations are float32 here, so a dtype asked for is replaced, with a warning.
`use("as_trained")` serves with the arithmetic of training instead of the fastest kernels.

transformers changes around this place in every release: only the two `_process_model_*` steps, `update_dtype` and the
table are used. Tested with 5.17 and 5.23 (`make test-transformers`).
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from qat.errors import UserError, problem
from qat.formats import standard
from qat.formats.facts import KEY
from qat.formats.folder import CONFIG, read_json
from qat.formats.packed_model import PackedModel
from qat.nn.kv import install_kv
from qat.serve.load import _install, read_export

METHOD = "compressed-tensors"
log = logging.getLogger(__name__)


class PackedLoading(CompressedTensorsHfQuantizer):
    """What transformers calls while it loads a folder: sets packed layers in place of the float ones."""

    backend = "auto"

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.refused = self._reason(quantization_config)
        if self.refused:
            log.warning("qat does not serve this folder, %s; transformers loads it its own way", self.refused)

    @staticmethod
    def _reason(given: Any) -> str | None:
        if getattr(given, "dequantize", False):
            return "for dequantize=True was asked"
        told = given.quantization_config
        reason = standard.refuses(told.model_dump(mode="json")) if told is not None else "it has no config_groups"
        return f"for {reason}" if reason else None

    def update_dtype(self, dtype: Any) -> Any:
        """float32, which packed layers answer in."""
        dtype = super().update_dtype(dtype)
        if self.refused or dtype == torch.float32:
            return dtype
        log.warning("qat serves with float32 activations; %s was asked or is the folder's default", dtype)
        return torch.float32

    def update_device_map(self, device_map: Any) -> Any:
        """Packed layers are on the CPU: with another device in the map, transformers loads its own way."""
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not self.refused and not all(str(device) in ("cpu", "None", "auto") for device in devices):
            self.refused = f"for device_map {device_map} was asked"
            log.warning("qat does not serve this folder, %s; transformers loads it its own way", self.refused)
        return super().update_device_map(device_map)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.refused:
            return super()._process_model_before_weight_loading(model, **kwargs)
        with torch.device("cpu"):  # transformers builds models under the meta device
            self.packed = _read(model, kwargs.get("checkpoint_files"))
        self.kept = _set_aside(model, self.packed)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.refused:
            return super()._process_model_after_weight_loading(model, **kwargs)
        packed = self.packed
        for name, module in self.kept.items():
            model.set_submodule(name, module)
        for name, tensor in packed.tensors.items():
            for owned in (name, *packed.aliases(name)):
                _install(model, owned, packed, tensor, torch.float32, self.backend, scheme_name=name)
        install_kv(model, packed.kv)
        del self.packed, self.kept
        return model

    @property
    def is_trainable(self) -> bool:
        """Packed layers have no gradients."""
        return bool(self.refused) and bool(super().is_trainable)

    def is_serializable(self) -> bool:
        """The folder that was read is the file; the layers in memory hold another layout."""
        return bool(self.refused) and bool(super().is_serializable())


def _read(model: Any, files: list[str] | None) -> PackedModel:
    """The packed weights of the folder that transformers is loading."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise UserError(problem("qat.serve.stock", "must load a folder of safetensors", files, "Name the folder."))
    folder = Path(files[0]).parent
    if KEY in read_json(folder / CONFIG):
        return read_export(folder)
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return standard.read_standard(folder, [Path(file) for file in files], linear)


def _set_aside(model: Any, packed: PackedModel) -> dict[str, nn.Module]:
    """Take the layers that will be packed out of the model, so that transformers neither fills nor ties them.

    Returns the float layers, on meta, by name.
    """
    names = [name.removesuffix(".weight") for name in (*packed.tensors, *packed.tied)]
    kept = {name: model.get_submodule(name) for name in names}
    for name in names:
        model.set_submodule(name, nn.Identity())
    gone = set(names)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for alias, owner in list(tied.items()):
        if {alias.rpartition(".")[0], owner.rpartition(".")[0]} & gone:
            del tied[alias]
    # their tensors in the files have no place in the model while it is loaded; that is no reason to warn
    ignored = {rf"^{re.escape(name)}\." for name in names}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
    return kept


def use(backend: str) -> None:
    """Serve folders loaded from now on with this backend: `auto`, `as_trained` or a name of `kernels.dispatch`."""
    PackedLoading.backend = backend


def install() -> None:
    """Serve compressed-tensors folders; importing this module does it."""
    AUTO_QUANTIZER_MAPPING[METHOD] = PackedLoading


def restore() -> None:
    """Give transformers its own loading back."""
    AUTO_QUANTIZER_MAPPING[METHOD] = CompressedTensorsHfQuantizer


install()
