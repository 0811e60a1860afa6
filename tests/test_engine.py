"""The decode engine against transformers on the same packed weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tolerances import ENGINE_LOGITS

from qat.config import KvConfig, ModelConfig, kv_spec, load_scheme
from qat.convert import pack_model
from qat.errors import UserError
from qat.insert import FakeQuantOptions, insert
from qat.kernels import cpu
from qat.models import load_model
from qat.nn.kv import install_kv
from qat.scheme import QuantPlan
from qat.serve.engine import Engine, refuses
from qat.serve.load import serve

needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"C++ kernels: {cpu.unavailable()}")


def packed_model(folder, scheme: str, kv_bits: int | None = None):
    model = load_model(ModelConfig(path=str(folder)))
    with torch.no_grad():  # random weights of 0.02 give flat logits; larger ones tell positions apart
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    kv = kv_spec(KvConfig(bits=kv_bits))
    coverage = insert(model, QuantPlan((), load_scheme(scheme), load_scheme("w8a16")), FakeQuantOptions())
    config = model.config.to_dict()
    install_kv(model, kv)
    return pack_model(model, coverage, config, kv)


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 290, (length,), generator=torch.Generator().manual_seed(length))


@needs_library
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_row_asym", "w4a8_g32", "w8a8", "w3a16_g64", "w2a16_g32"])
def test_engine_gives_the_logits_of_transformers_in_prefill_and_decoding(tiny_model_dir, scheme, kv_bits):
    packed = packed_model(tiny_model_dir, scheme, kv_bits)
    ids = prompt(37)
    with torch.no_grad():
        wanted = serve(packed)(ids[None]).logits[0]
    engine = Engine(packed, positions=64, slots=2)
    slot = torch.ones(30, dtype=torch.long)
    found = [engine.forward(ids[:30], slot, torch.arange(30), torch.arange(30))]
    for position in range(30, 37):
        at = torch.tensor([position])
        found.append(engine.forward(ids[position : position + 1], slot[:1], at, torch.tensor([0])))
    logits = torch.cat(found)
    assert torch.isfinite(logits).all()
    assert (logits - wanted).abs().max() <= ENGINE_LOGITS * wanted.abs().max()


@needs_library
def test_forward_refuses_positions_outside_the_cache(tiny_model_dir):
    engine = Engine(packed_model(tiny_model_dir, "w4a16_g32"), 16, 1)
    with pytest.raises(RuntimeError, match="slot or position out of range"):
        engine.forward(prompt(1), torch.tensor([0]), torch.tensor([16]), torch.tensor([0]))


def test_engine_says_which_models_it_cannot_run(tiny_gpt2_dir, tiny_mixtral_dir, tiny_model_dir):
    assert "gpt2 is not one of" in str(refuses(packed_model(tiny_gpt2_dir, "w4a16_g32")))
    assert "mixtral is not one of" in str(refuses(packed_model(tiny_mixtral_dir, "w4a16_g32")))
    with pytest.raises(UserError, match="engine: must be able to run the model, got .*stored input grids are not supported"):
        packed = packed_model(tiny_model_dir, "w8a8")
        scheme = load_scheme("w8a8_static")
        packed.schemes = {name: scheme if s.input else s for name, s in packed.schemes.items()}
        Engine(packed)
