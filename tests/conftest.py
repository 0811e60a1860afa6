"""Tiny models, one tokenizer and a little text, made once per test session from fixed seeds; nothing is downloaded."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

# Before anything imports the hub client: tests never reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread in each test process and what it starts: tiny tensors gain nothing from a second one, and two pytest
# workers with two threads each on two cores take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

VOCABULARY = 300
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def paragraphs(count: int, seed: int) -> list[str]:
    """`count` different paragraphs of about 47 tiny-tokenizer tokens each, with a grammar simple enough to learn."""
    rng = random.Random(seed)
    who = ["the miller", "a sailor", "my sister", "the old king", "a fox", "the baker"]
    does = ["sees", "carries", "forgets", "paints", "sells", "follows"]
    what = ["the river", "a lamp", "two apples", "the bridge", "an island", "some bread"]
    when = ["at dawn", "in winter", "every day", "before noon", "once more"]

    def sentence(_: int) -> str:
        return " ".join(rng.choice(words) for words in (who, does, what, when)).capitalize() + "."

    return [f"Story {number}. " + " ".join(map(sentence, range(2))) for number in range(count)]


def make_tokenizer():
    """Byte-level BPE of 300 tokens with bos, eos (also the chat's end of turn), pad and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(paragraphs(300, seed=1), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=specials[0],
        bos_token=specials[1],
        eos_token=specials[2],
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == VOCABULARY
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The one tokenizer of all tiny models."""
    return make_tokenizer()


def save_model(folder: Path, hf_config, tokenizer) -> Path:
    """A folder with random weights of seed 0 for `hf_config`, and the tokenizer."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_llama(folder: Path, tokenizer) -> Path:
    """Llama: hidden 64, 2 layers, 4 heads on 2 kv heads, tied embeddings."""
    from transformers import LlamaConfig

    hf_config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return save_model(folder, hf_config, tokenizer)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """The Llama, shared by all tests: do not write into it."""
    return make_llama(tmp_path_factory.mktemp("tiny_llama"), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """GPT-2: n_embd 64, 2 layers, Conv1D linears, tied embeddings. Do not write into it."""
    from transformers import GPT2Config

    hf_config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    return save_model(tmp_path_factory.mktemp("tiny_gpt2"), hf_config, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_mixtral_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """Mixtral: hidden 64, 2 layers, 4 experts of which 2 are used, embeddings not tied. Do not write into it."""
    from transformers import MixtralConfig

    hf_config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    return save_model(tmp_path_factory.mktemp("tiny_mixtral"), hf_config, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A text file of 40 paragraphs: 58 windows of 32 tokens."""
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("\n\n".join(paragraphs(40, seed=2)) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_jsonl(tmp_path_factory) -> Path:
    """The same paragraphs as JSON lines: `text`, and `messages` with a question answered by it."""
    file = tmp_path_factory.mktemp("jsonl") / "stories.jsonl"
    rows = [
        {
            "text": text,
            "messages": [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": text}],
        }
        for text in paragraphs(40, seed=2)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path) -> Path:
    """The Llama, to be spoiled."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_model_dir, tiny_text) -> Path:
    """The folder of a finished run of the Llama at w4a16_g32. Tests that write into it take a copy."""
    from tiny_runs import same_process, tiny_run

    from qat import pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_fresh_process", same_process)
        return tiny_run(tmp_path_factory.mktemp("finished"), tiny_model_dir, tiny_text, "scheme=w4a16_g32")


@pytest.fixture
def own_signals():
    """Handlers and requests to stop are of the process; give back what pytest had."""
    import signal

    from qat import signals

    before = {number: signal.getsignal(number) for number in signals.REQUESTS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.forget()


@pytest.fixture
def qat(capsys):
    """`qat(words...)` -> (exit code, stdout, stderr) of the command, in this process."""
    from qat.cli.main import main

    def call(*words: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:  # argparse
            code = error.code
        return code, *capsys.readouterr()

    return call
