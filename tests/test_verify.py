"""`qat verify` says equal for what training left, and names file or tensor when anything was changed since."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import read, same_process, tiny_run

from qat import pipeline
from qat.cli.compose import from_yaml
from qat.cli.main import main
from qat.errors import UserError
from qat.formats.folder import write_checksums
from qat.verify import verify_export, verify_run

EXPORT = "export/compressed_tensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"
TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, tiny_text):
    """A finished run: 4-bit asymmetric weights, static 8-bit inputs, int8 table."""
    scheme = ["scheme=w4a16_g32_asym", "scheme.name=w4a8", "+scheme.input.bits=8", "+scheme.input.granularity=tensor"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_fresh_process", same_process)
        return tiny_run(tmp_path_factory.mktemp("finished"), tiny_model_dir, tiny_text, *scheme)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def export(run):
    return run / EXPORT


def change(export, name, edit) -> None:
    """Edit one stored tensor, or remove it, and make the checksums agree again."""
    stored = load_file(export / "model.safetensors")
    tensor = edit(stored.pop(name))
    if tensor is not None:
        stored[name] = tensor
    save_file(stored, export / "model.safetensors", metadata={"format": "pt"})
    write_checksums(export)


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """One bit of the first element's lowest byte changed."""
    changed = tensor.clone()
    changed.view(torch.uint8).view(-1)[0] ^= 1
    return changed


def test_untouched_export_is_equal(export, capsys):
    report = verify_export(export)
    assert report["verdict"] == "equal"
    assert len(report["tensors"]) == 15
    assert main(["verify", str(export)]) == 0
    assert "parity: equal: all" in capsys.readouterr().err


def test_untouched_run_is_equal_and_writes_its_report(run):
    (run / "parity.json").unlink()
    report = verify_run(from_yaml(run / "resolved.yaml"), run)
    assert report["verdict"] == "equal"
    assert report == read(run, "parity.json")
    assert report["bytes"] == (run / EXPORT / "model.safetensors").stat().st_size


def test_verify_leaves_gradients_on(run):
    verify_run(from_yaml(run / "resolved.yaml"), run)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training_digests.json"])
def test_flipped_byte_is_refused_by_its_checksum(export, name):
    file = export / name
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: must have sha256 [0-9a-f]{{64}}, got [0-9a-f]{{64}}"):
        verify_export(export)


STORED = {
    "codes": (f"{QUERY}_packed", QUERY),
    "scale": (f"{QUERY}_scale", QUERY),
    "zero-point": (f"{QUERY}_zero_point", QUERY),
    "int8-codes": (TABLE, TABLE),
}


@pytest.mark.parametrize("part", STORED)
def test_flipped_bit_with_new_checksums_is_refused_by_its_digest(export, part):
    stored, name = STORED[part]
    change(export, stored, flipped)
    with pytest.raises(UserError, match=rf"{name}: codes and scales must be those of training, got others") as caught:
        verify_export(export)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("part", STORED)
def test_flipped_bit_with_new_checksums_makes_the_run_different(run, part, capsys):
    stored, name = STORED[part]
    change(run / EXPORT, stored, flipped)
    assert main(["verify", str(run)]) == 1
    report = read(run, "parity.json")
    assert report["verdict"] == "different"
    line = next(line for line in report["tensors"] if line["name"] == name)
    codes_differ = part.endswith("codes")
    assert line["mismatched_codes"] == (1 if codes_differ else 0)
    assert line["scales_equal"] == (part != "scale")
    assert line["zero_points_equal"] == (part != "zero-point")
    assert [other["name"] for other in report["tensors"] if other != line and other["mismatched_codes"]] == []
    assert "different" in capsys.readouterr().err


@pytest.mark.parametrize("stored", ["model.norm.weight", f"{QUERY.removesuffix('.weight')}.input_scale"])
def test_changed_float_or_input_grid_with_new_checksums_is_refused(run, export, stored):
    """What stays float, and the grids of static inputs, are part of what was trained."""
    change(export, stored, lambda tensor: tensor * 2)
    name = stored.removesuffix("_scale")
    with pytest.raises(UserError, match=rf"{name}.*: values must be those of training, got others"):
        verify_export(export)
    assert main(["verify", str(run)]) == 1
    report = read(run, "parity.json")
    assert (report["verdict"], report["different_floats"]) == ("different", [name])


def test_truncated_weights_are_refused_with_and_without_new_checksums(export):
    file = export / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: must have sha256"):
        verify_export(export)
    write_checksums(export)
    with pytest.raises(UserError, match=r"model\.safetensors: must be a whole safetensors file"):
        verify_export(export)


@pytest.mark.parametrize("stored", [f"{QUERY}_packed", f"{QUERY}_scale", TABLE, "model.norm.weight"])
def test_missing_tensor_is_named(export, stored):
    change(export, stored, lambda tensor: None)
    with pytest.raises(UserError, match=rf"must hold {stored}, got 1 missing"):
        verify_export(export)


@pytest.mark.parametrize("name", ["model.safetensors", "checksums.json", "training_digests.json", "config.json"])
def test_missing_file_is_named(export, name):
    (export / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: must (exist|have sha256 \w+), got no such file"):
        verify_export(export)


def test_digests_of_fewer_tensors_are_refused(export):
    file = export / "training_digests.json"
    digests = json.loads(file.read_text())
    del digests[QUERY]
    file.write_text(json.dumps(digests))
    write_checksums(export)
    with pytest.raises(UserError, match=rf"{QUERY}: .*must be those of training"):
        verify_export(export)


def test_run_whose_checkpoint_was_trained_on_is_different(run):
    """The final checkpoint no longer holds the weights that were packed."""
    file = run / "checkpoints/final/model.safetensors"
    state = load_file(file)
    state[QUERY] = state[QUERY] * 1.3 + 0.01
    save_file(state, file)
    report = verify_run(from_yaml(run / "resolved.yaml"), run)
    assert report["verdict"] == "different"
    line = next(line for line in report["tensors"] if line["name"] == QUERY)
    assert line["mismatched_codes"] > 0
    assert not line["digest_equal"]


def test_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"checksums\.json: must exist, got no such file"):
        verify_export(tmp_path)
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
