"""The export folder: packed weights in a format, tokenizer, generation config, chat template, model card, checksums.

Written beside and renamed, so a half-written export never stands under the final name. How bytes are laid out is in
`formats/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qat.config import RunConfig
from qat.formats import FORMATS
from qat.formats.folder import write_checksums
from qat.formats.packed_model import PackedModel
from qat.formats.quantization_config import is_portable
from qat.paths import atomic_dir, write_json_atomic, write_text_atomic
from qat.report.table import markdown_table

DIGESTS = "training_digests.json"


def write_export(
    packed: PackedModel, digests: dict, tokenizer: Any, folder: Path, config: RunConfig, results: dict[str, Any]
) -> None:
    """Write the whole folder atomically; `digests` are the sha256 of the training codes, kept beside the weights.

    Raises:
        UserError: the folder exists and export.overwrite is false.
    """
    with atomic_dir(folder, config.export.overwrite) as temporary:
        FORMATS[config.export.format].write(packed, temporary)
        tokenizer.save_pretrained(temporary)
        _generation_config(packed.config, tokenizer, temporary)
        write_json_atomic(temporary / DIGESTS, digests)
        write_text_atomic(temporary / "README.md", card(config, results, is_portable(packed)))
        write_checksums(temporary)


def write_card(folder: Path, config: RunConfig, results: dict[str, Any]) -> None:
    """Rewrite the model card with the final numbers, and the checksums with it."""
    portable = "cannot load this folder" not in (folder / "README.md").read_text(encoding="utf-8")
    write_text_atomic(folder / "README.md", card(config, results, portable))
    write_checksums(folder)


def _generation_config(hf_config: dict, tokenizer: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    begin = hf_config.get("bos_token_id")
    GenerationConfig(bos_token_id=begin, **tokens).save_pretrained(folder)


def card(config: RunConfig, results: dict[str, Any], portable: bool) -> str:
    """The model card: metadata, the result table, how to load it."""
    base = config.model.path.rsplit("/", 1)[-1]
    load = (
        "```python\nfrom transformers import AutoModelForCausalLM\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")  # needs the package compressed-tensors\n```\n'
        if portable
        else "Stock transformers cannot load this folder (fused experts or Conv1D layers have no place in the format); "
        "use `qat generate`.\n"
    )
    kv = (
        f"Keys and values were trained on a grid of {results['kv']}; only qat serves them so.\n"
        if results["kv"]
        else ""
    )
    return f"""---
base_model: {base}
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
tags: [quantization-aware-training, compressed-tensors, {config.scheme.name}]
---
# {config.name}: {base} at {results["bits_per_weight"]:.2f} bits per weight

Trained with fake quantization ({config.scheme.name}, {results["tokens"]["train"]} tokens, seed {results["seed"]}) and
packed; the codes in these files are those of training, checked tensor by tensor.

{markdown_table(results)}

Measured on held-out text of `{config.data.path}`: {results["protocol"]}.

{load}{kv}
`qat generate THIS_FOLDER "a prompt"` runs it on qat's own packed layers, `qat verify THIS_FOLDER` checks every byte.
"""
