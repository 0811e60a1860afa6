"""The decode engine against transformers on the same packed weights, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolerances import ENGINE_LOGITS

from qat.config import KvConfig, ModelConfig, kv_spec, load_scheme
from qat.convert import pack_model
from qat.errors import UserError
from qat.grid import QParams
from qat.insert import FakeQuantOptions, insert
from qat.kernels import cpu
from qat.models import load_model
from qat.nn.kv import install_kv
from qat.scheme import PlanRule, QuantPlan
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


def assert_same_logits(packed, ids: torch.Tensor, int8_cache: bool | None = None) -> None:
    """Prefill of all but the last five, then token by token, against transformers on the same packed weights."""
    with torch.no_grad():
        wanted = serve(packed)(ids[None]).logits[0]
    count = ids.numel() - 5
    engine = Engine(packed, positions=ids.numel(), slots=1, int8_cache=int8_cache)
    slot = torch.zeros(ids.numel(), dtype=torch.long)
    found = [engine.forward(ids[:count], slot[:count], torch.arange(count), torch.arange(count))]
    for p in range(count, ids.numel()):
        found.append(engine.forward(ids[p : p + 1], slot[:1], torch.tensor([p]), torch.tensor([0])))
    assert (torch.cat(found) - wanted).abs().max() <= ENGINE_LOGITS * wanted.abs().max()


def planned(folder, rules: dict[str, str | None], embedding: str | None):
    model = load_model(ModelConfig(path=str(folder)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    made = tuple(PlanRule(match, load_scheme(name) if name else None) for match, name in rules.items())
    head = load_scheme(embedding) if embedding else None
    coverage = insert(model, QuantPlan(made, load_scheme("w4a8_g32"), head), FakeQuantOptions())
    return pack_model(model, coverage, model.config.to_dict(), None)


@needs_library
def test_engine_runs_mixed_schemes_and_layers_kept_in_float(tiny_model_dir):
    rules = {"*.0.self_attn.v_proj": "w8a16", "*.1.mlp.up_proj": None, "*.1.self_attn.[qk]_proj": "w8a8"}
    assert_same_logits(planned(tiny_model_dir, rules, None), prompt(37))


def with_stored_inputs(packed, spec):
    """The same weights behind stored input grids that hold the inputs of one prompt."""
    model, largest = serve(packed), {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, x, name=name: largest.update({name: x[0].abs().amax()} if x else {}))
    with torch.no_grad():
        model(prompt(37)[None])
    schemes = packed.schemes.items()
    packed.schemes = {name: replace(scheme, input=spec) if scheme.input else scheme for name, scheme in schemes}
    for name in packed.static_inputs():
        scale = (largest[name] / 127).bfloat16().float().view(1)
        packed.input_qparams[name] = QParams(scale, torch.zeros(1, dtype=torch.int32))
    return packed


@needs_library
def test_engine_runs_stored_input_grids(tiny_model_dir):
    packed = packed_model(tiny_model_dir, "w8a8")
    call = prompt(9), torch.zeros(9, dtype=torch.long), torch.arange(9), torch.arange(9)
    dynamic = Engine(packed, 64).forward(*call)
    packed = with_stored_inputs(packed, load_scheme("w8a8_static").input)
    assert_same_logits(packed, prompt(37))
    assert not torch.equal(Engine(packed, 64).forward(*call), dynamic)


@needs_library
def test_engine_attends_past_one_split_of_the_positions_and_within_a_window(tiny_model_dir):
    packed = planned(tiny_model_dir, {}, "w4a16_g32")
    packed.config["max_position_embeddings"] = 512
    assert_same_logits(packed, prompt(300))
    packed.config |= {"model_type": "mistral", "sliding_window": 40, "architectures": ["MistralForCausalLM"]}
    near, far = prompt(300), prompt(300)
    far[:100] = 7  # outside of what two layers of 40 positions reach
    engine = Engine(packed, 300, 1)
    last = [
        engine.forward(ids, torch.zeros(300, dtype=torch.long), torch.arange(300), torch.tensor([299]))
        for ids in (near, far)
    ]
    assert torch.equal(*last)
    assert_same_logits(packed, near)


@needs_library
def test_engine_turns_keys_as_llama3_does(tiny_model_dir):
    packed = planned(tiny_model_dir, {}, "w8a16")
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    packed.config["rope_parameters"] = scaling | {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    assert_same_logits(packed, prompt(60))


@needs_library
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_best_and_top_are_those_of_the_logits(tiny_model_dir, rows):
    engine = Engine(packed_model(tiny_model_dir, "w4a16_g32"), 64, 1)
    call = prompt(rows), torch.zeros(rows, dtype=torch.long), torch.arange(rows), torch.arange(rows)
    logits = engine.forward(*call)
    values, tokens = engine.top(*call, 7)
    wanted = logits.topk(7)
    assert torch.equal(values, wanted.values) and torch.equal(tokens, wanted.indices)
    assert torch.equal(engine.best(*call), logits.argmax(-1))


@needs_library
def test_engine_gives_the_same_bits_with_any_number_of_threads(tiny_model_dir):
    packed, before = packed_model(tiny_model_dir, "w4a8_g32", 8), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            engine = Engine(packed, 64, 2)
            slot = torch.cat([torch.zeros(30, dtype=torch.long), torch.ones(7, dtype=torch.long)])
            position = torch.cat([torch.arange(30), torch.arange(7)])
            out = [engine.forward(prompt(37), slot, position, torch.arange(37))]
            for step in range(12):
                both = torch.tensor([0, 1])
                at = torch.tensor([30 + step, 7 + step])
                out.append(engine.forward(prompt(2) + step, both, at, both))
            results.append(torch.cat(out))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_library
def test_forward_refuses_positions_outside_the_cache(tiny_model_dir):
    engine = Engine(packed_model(tiny_model_dir, "w4a16_g32"), 16, 1)
    with pytest.raises(RuntimeError, match="slot or position out of range"):
        engine.forward(prompt(1), torch.tensor([0]), torch.tensor([16]), torch.tensor([0]))


def test_engine_says_which_models_it_cannot_run(tiny_gpt2_dir, tiny_mixtral_dir, tiny_model_dir):
    assert "gpt2 is not one of" in str(refuses(packed_model(tiny_gpt2_dir, "w4a16_g32")))
    assert "mixtral is not one of" in str(refuses(packed_model(tiny_mixtral_dir, "w4a16_g32")))
    packed = packed_model(tiny_model_dir, "w4a16_g32")
    packed.kv = kv_spec(KvConfig(8, True, "channel", 32))
    assert "a cache of int8 sym token, keys per channel g32 is not supported yet" in str(refuses(packed))
    packed.kv = kv_spec(KvConfig(8, recent_tokens=8))
    assert "0 sink and 8 recent tokens float is not supported yet" in str(refuses(packed))
    with pytest.raises(UserError, match=r"engine: must be able .* stored input grids with zero points are not"):
        scheme = load_scheme("w8a8_static")
        Engine(with_stored_inputs(packed_model(tiny_model_dir, "w8a8"), replace(scheme.input, symmetric=False)))
