"""File formats of packed models; each module has `write(model, folder)` and `read(folder)`, inverse of each other.

How a training model becomes a PackedModel is in `convert.py`; tokenizer and model card are not here.
"""

from __future__ import annotations

from types import ModuleType

from qat.formats import compressed_tensors

FORMATS: dict[str, ModuleType] = {"compressed_tensors": compressed_tensors}
