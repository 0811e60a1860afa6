"""The final state as safetensors: whole or absent, ties once, and refused when it does not fit."""

from __future__ import annotations

import pytest
import torch
from quant_models import IDS, float_model, logits, plan
from safetensors.torch import load_file

from qat.checkpoint import load_state, save_state, unique_state
from qat.errors import UserError
from qat.insert import FakeQuantOptions, insert
from qat.nn.quant import quantized_weights
from qat.train.calibrate import calibrate
from qat.train.phases import PhaseState, apply_phase

LEARNED = FakeQuantOptions("lsq_plus", "learned", "mse")


def make(folder, scheme="w4a16_g32_asym", options=LEARNED, seed=None):
    model = float_model(folder)
    insert(model, plan(scheme), options)
    if seed is not None:
        calibrate(model, IDS, 2)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("folder", ["tiny_model_dir", "tiny_gpt2_dir", "tiny_mixtral_dir"])
@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a8_static"])
def test_state_brings_back_every_bit_of_the_model(request, tmp_path, folder, scheme):
    folder = request.getfixturevalue(folder)
    options = LEARNED if scheme.endswith("asym") else FakeQuantOptions("ste_clipped", "static", "minmax")
    model = make(folder, scheme, options, seed=1)
    apply_phase(model, PhaseState(quantizing=True, frozen=True))
    save_state(model, tmp_path / "deep/model.safetensors")
    loaded = make(folder, scheme, options)
    assert not torch.equal(logits(loaded), logits(model))
    load_state(loaded, tmp_path / "deep/model.safetensors")
    assert torch.equal(logits(loaded), logits(model))
    for (name, weight, mine), (_, _, theirs) in zip(quantized_weights(model), quantized_weights(loaded), strict=True):
        assert mine.now == theirs.now, name
        assert torch.equal(mine.codes(weight), theirs.codes(weight)), name
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["model.safetensors"]


def test_tied_matrix_is_stored_once(tiny_model_dir, tiny_mixtral_dir, tmp_path):
    save_state(make(tiny_model_dir), tmp_path / "tied.safetensors")
    save_state(make(tiny_mixtral_dir), tmp_path / "untied.safetensors")
    assert "lm_head.weight" not in load_file(tmp_path / "tied.safetensors")
    assert "lm_head.weight" in load_file(tmp_path / "untied.safetensors")


def test_loaded_tied_matrix_is_still_one(tiny_model_dir, tmp_path):
    save_state(make(tiny_model_dir, seed=1), tmp_path / "model.safetensors")
    loaded = make(tiny_model_dir)
    load_state(loaded, tmp_path / "model.safetensors")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_state_that_is_not_finite_is_never_written_and_spares_the_earlier_one(tiny_model_dir, tmp_path, value):
    file = tmp_path / "model.safetensors"
    model = make(tiny_model_dir)
    save_state(model, file)
    before = file.read_bytes()
    model.get_submodule("model.norm").weight.data[0] = value
    with pytest.raises(UserError, match=r"^model\.norm\.weight: must be finite to be saved") as caught:
        save_state(model, file)
    assert not caught.value.before_work
    assert file.read_bytes() == before


def test_save_that_fails_halfway_spares_the_earlier_one(tiny_model_dir, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    model = make(tiny_model_dir)
    save_state(model, file)
    before = file.read_bytes()

    def half(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_state(make(tiny_model_dir, seed=2), file)
    assert file.read_bytes() == before


def test_load_refuses_the_state_of_another_scheme_plan_or_model(tiny_model_dir, tiny_mixtral_dir, tmp_path):
    file = tmp_path / "model.safetensors"
    save_state(make(tiny_model_dir), file)
    others = [
        make(tiny_model_dir, "w4a16_g64_asym"),
        make(tiny_model_dir, "w4a16_g32_asym", FakeQuantOptions("lsq", "learned", "mse")),
        make(tiny_mixtral_dir),
    ]
    for other in others:
        before = {name: tensor.clone() for name, tensor in unique_state(other).items()}
        with pytest.raises(UserError, match=r"must fit the model, got .*belongs to another scheme, plan or model"):
            load_state(other, file)
        assert all(torch.equal(tensor, before[name]) for name, tensor in unique_state(other).items())


@pytest.mark.parametrize(("content", "match"), [(None, "must exist"), (b"x" * 9, "must be a whole safetensors file")])
def test_load_refuses_a_file_that_is_missing_or_damaged(tiny_model_dir, tmp_path, content, match):
    file = tmp_path / "model.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=match):
        load_state(make(tiny_model_dir), file)


def test_load_refuses_a_file_that_was_cut(tiny_model_dir, tmp_path):
    file = tmp_path / "model.safetensors"
    save_state(make(tiny_model_dir), file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="must be a whole safetensors file"):
        load_state(make(tiny_model_dir), file)
