"""Text from a packed model: through the decode engine when it can run the model, else transformers' `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qat.config import ModelConfig
from qat.models import load_tokenizer
from qat.progress import say
from qat.serve import engine
from qat.serve.load import read_export, serve


def load_for_generation(folder: Path, backend: str = "auto") -> tuple[Any, Any]:
    """Packed model (bf16 matmuls) and tokenizer of an export folder."""
    return serve(read_export(folder), torch.bfloat16, backend), load_tokenizer(ModelConfig(path=str(folder)))


def reply(
    folder: Path,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    backend: str = "auto",
) -> list[str]:
    """One continuation per prompt of an export folder.

    Args:
        temperature: 0 is greedy.
        backend: auto (the engine if it can), or a kernel of `kernels.dispatch` under transformers' `generate`.
    """
    packed = read_export(folder)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    reason = engine.refuses(packed) if backend == "auto" else "another backend was asked for"
    if reason is not None:
        say(f"decode engine: not used ({reason}); transformers generates on packed layers")
        torch.manual_seed(seed)
        return answer(serve(packed, torch.bfloat16, backend), tokenizer, prompts, max_new_tokens, temperature)
    ids = [tokenizer(_as_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"] for prompt in prompts]
    runner = engine.Engine(packed, max(map(len, ids)) + max_new_tokens, len(prompts))
    new = engine.generate(runner, ids, max_new_tokens, {tokenizer.eos_token_id}, temperature, seed)
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, temperature: float = 0.0) -> list[str]:
    """One continuation per prompt, all in one batch; through the chat template when the tokenizer has one.

    Args:
        temperature: 0 is greedy.
    """
    texts = [_as_chat(tokenizer, prompt) for prompt in prompts]
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(
            **{key: inputs[key] for key in ("input_ids", "attention_mask")},
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _as_chat(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
