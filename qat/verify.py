"""Is what is served what was trained? Read an export back, bounds and checksums first, and compare code for code.

`verify_run` compares with the training model itself, rebuilt from the run's final checkpoint, and with the digests that
the training process left; then logits and perplexity of both. `verify_export` needs the folder alone: it compares with
the digests stored beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qat import build, pipeline
from qat.config import RunConfig
from qat.convert import compare, digests, pack_model
from qat.data import load_windows
from qat.errors import UserError, problem
from qat.evaluate.perplexity import score
from qat.export import DIGESTS
from qat.formats.folder import check_checksums, read_json
from qat.formats.packed_model import PackedModel
from qat.models import load_tokenizer
from qat.paths import write_json_atomic
from qat.serve.load import read_export, serve


def verify_export(folder: Path) -> dict[str, Any]:
    """Checksums, bounds, and the codes' digests of an export folder: the dictionary of parity.json without logits.

    Raises:
        UserError: a damaged, incomplete or changed file.
    """
    check_checksums(folder)
    packed = read_export(folder)
    return {"verdict": "equal", "tensors": _against_digests(packed, folder), "bytes": weight_bytes(folder)}


def _against_digests(packed: PackedModel, folder: Path) -> list[dict[str, Any]]:
    """One line per tensor; raises UserError for tensors whose codes or scales are not those of training."""
    trained, found = read_json(folder / DIGESTS), digests(packed)
    problems, lines = [], []
    for name in sorted(set(trained) | set(found)):
        if trained.get(name) != found.get(name):
            fix = "Export the run again; do not serve this folder."
            wanted = "codes and scales" if name in packed.tensors else "values"
            problems.append(problem(f"{folder}: {name}", f"{wanted} must be those of training", "others", fix))
            continue
        if name not in packed.tensors:
            continue
        tensor = packed.tensors[name]
        lines.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "bits": tensor.spec.bits,
                "codes": tensor.codes().numel(),
                "mismatched_codes": 0,
                "scales_equal": True,
                "zero_points_equal": True,
            }
        )
    if problems:
        raise UserError(*problems, before_work=False)
    return lines


def verify_run(config: RunConfig, run: Path) -> dict[str, Any]:
    """Compare a run's export with its training model and write parity.json; returns its content.

    The verdict is `equal` only if every code, scale, zero point and float value is that of training and the packed
    perplexity is within 0.1 % of the fake-quantized one.
    """
    build.use_machine(config)
    export = run / "export" / config.export.format
    check_checksums(export)
    served = read_export(export)
    model, coverage = pipeline.rebuild(config, run)
    trained = pack_model(model, coverage, served.config, served.kv)
    lines = compare(trained, served)
    stored, wanted, found = read_json(export / DIGESTS), digests(trained), digests(served)
    for line in lines:
        line["digest_equal"] = stored.get(line["name"]) == wanted[line["name"]]
    rest = {*stored, *wanted, *found} - set(trained.tensors)
    changed = sorted(name for name in rest if not stored.get(name) == wanted.get(name) == found.get(name))
    dtype = torch.bfloat16 if config.evaluate.precision == "bf16" else torch.float32
    packed_model = serve(served, dtype)
    windows = load_windows(config.data, load_tokenizer(config.model)).evaluation
    evaluate = config.evaluate
    packed = score(packed_model, windows, evaluate.batch_size, evaluate.precision, model, "evaluate packed")
    fake = packed.reference_perplexity
    assert fake is not None
    difference = abs(packed.perplexity / fake - 1)
    exact = all(
        line["mismatched_codes"] == 0 and line["scales_equal"] and line["zero_points_equal"] and line["digest_equal"]
        for line in lines
    )
    parity = {
        "verdict": "equal" if exact and not changed and difference <= 1e-3 else "different",
        "tensors": lines,
        "different_floats": changed,
        "logits": {"max_abs_difference": packed.max_difference, "mean_kl": packed.kl, "top1_agreement": packed.top1},
        "perplexity": {
            "fake_quant": fake,
            "packed": packed.perplexity,
            "relative_difference": difference,
        },
        "bytes": weight_bytes(export),
    }
    write_json_atomic(run / "parity.json", parity)
    return parity


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of an export."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
