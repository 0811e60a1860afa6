"""Text from a packed model: greedy decoding is the argmax of the logits, alone or in a padded batch."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from tiny_runs import same_process, tiny_run

from qat import pipeline
from qat.cli.main import main
from qat.config import ModelConfig
from qat.errors import UserError
from qat.models import load_tokenizer
from qat.serve.generate import encode_prompt, reply
from qat.serve.load import read_export
from qat.serve.runner import open_runner
from qat.serve.sampling import Sampling

PROMPTS = ["The miller sees", "At dawn the old king paints two apples and a lamp", "Once"]


@pytest.fixture(scope="module", params=["scheme=w4a16_g32", "scheme=w8a8"])
def export(request, tmp_path_factory, tiny_model_dir, tiny_jsonl):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_fresh_process", same_process)
        folder = tmp_path_factory.mktemp("generate")
        # a few real steps on conversations, so that the answers are neither empty nor one token repeated
        learn = ["distill=ce", "optim.lr=0.005", "trainer.max_steps=100", "trainer.batch_size=8"]
        run = tiny_run(
            folder, tiny_model_dir, tiny_jsonl, "data=chat", "evaluate.baselines=false", request.param, *learn
        )
    return run / "export/compressed_tensors"


def argmax_loop(export, prompt: str, count: int, backend: str) -> str:
    """Greedy decoding without a cache: the whole sequence again for every token."""
    runner, tokenizer = open_runner(read_export(export), 256, 1, backend), load_tokenizer(ModelConfig(path=str(export)))
    ids = encode_prompt(tokenizer, prompt)
    start = len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        slots, last = torch.zeros(len(ids), dtype=torch.long), torch.tensor([len(ids) - 1])
        ids.append(int(runner.forward(torch.tensor(ids), slots, torch.arange(len(ids)), last).argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_greedy_answer_is_the_argmax_at_every_step(export, backend):
    answers, tokens, _ = reply(export, PROMPTS[:1], Sampling(max_tokens=16), backend)
    assert answers == [argmax_loop(export, PROMPTS[0], 16, backend)]
    assert len(set(answers[0].split())) > 2 and 1 < tokens <= 16


def test_answers_together_are_those_of_single_prompts(export):
    together = reply(export, PROMPTS, Sampling(max_tokens=12))[0]
    assert together == [reply(export, [prompt], Sampling(max_tokens=12))[0][0] for prompt in PROMPTS]
    assert len(set(together)) > 1


def test_temperature_samples_and_a_seed_repeats_it(export, capsys):
    def ask(seed: int) -> list[dict]:
        arguments = ["generate", str(export), *PROMPTS, "--json", "--temperature=2", f"--seed={seed}"]
        assert main([*arguments, "--max-new-tokens=12"]) == 0
        return json.loads(capsys.readouterr().out)

    first = ask(1)
    assert first == ask(1)
    assert first != ask(2)
    assert [pair["prompt"] for pair in first] == PROMPTS


def test_answer_has_at_most_the_tokens_asked_for_and_streams_as_it_is(export):
    heard: list[str] = []
    long = reply(export, PROMPTS[:1], Sampling(max_tokens=8), listen=heard.append)[0][0]
    short, tokens, _ = reply(export, PROMPTS[:1], Sampling(max_tokens=2))
    assert long.startswith(short[0]) and len(short[0]) < len(long) and tokens == 2
    assert "".join(heard).strip() == long and len(heard) > 1


def test_every_backend_gives_the_same_answer_or_is_refused(export):
    answers = {}
    for backend in ("as_trained", "dense", "reference"):
        try:
            answers[backend] = reply(export, PROMPTS, Sampling(max_tokens=8), backend)[0]
        except UserError as error:
            # int8 inputs are multiplied as integers only
            assert "kernel for wna8_matmul" in str(error) or "a8_matmul" in str(error)
    assert {"as_trained", "reference"} <= set(answers)
    assert all(given == answers["as_trained"] for given in answers.values())


def test_unknown_backend_is_refused_with_those_there_are(export):
    with pytest.raises(UserError, match=r"backend must be one of \[.*'reference'\], got refrence. Did you mean"):
        reply(export, PROMPTS, Sampling(), "refrence")


def test_tokenizer_without_template_completes_the_plain_prompt(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    assert tokenizer.decode(encode_prompt(tokenizer, "The miller")).endswith("<|im_start|>assistant\n")
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "The miller")) == "The miller"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--max-new-tokens=0", "max_tokens: must be a whole number of at least 1, got 0"),
        ("--temperature=nan", "temperature: must be a number from 0 to 100, got nan"),
        ("--top-p=0", "top_p: must be a number above 0"),
        ("--stop=", "stop: must be at most"),
    ],
)
def test_impossible_options_are_refused(qat, export, wrong, message):
    code, _, error = qat("generate", export, "hi", wrong)
    assert code == 2 and message in error


def test_generate_stops_at_a_text_and_says_its_speed(qat, export):
    whole = json.loads(qat("generate", export, PROMPTS[0], "--json", "--max-new-tokens=12")[1])[0]["answer"]
    stop = whole[4:7]
    code, out, error = qat("generate", export, PROMPTS[0], "--json", "--max-new-tokens=12", "--stop", stop)
    assert code == 0 and json.loads(out)[0]["answer"] == whole.partition(stop)[0].strip()
    assert re.search(r"\d+ tokens, [\d.]+ per second", error)


def test_repetition_penalty_changes_the_answer(qat, export):
    plain, punished = (
        qat("generate", export, PROMPTS[0], "--max-new-tokens=24", f"--repetition-penalty={value}")[1]
        for value in (1, 5)
    )
    assert plain != punished


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_speed_is_that_of_the_asked_number_of_steps(export, capsys, backend):
    assert main(["generate", str(export), "--measure", "12", f"--backend={backend}"]) == 0
    speed = json.loads(capsys.readouterr().out)
    assert (speed["tokens"], speed["ran_by"]) == (12, "engine" if backend == "auto" else "transformers")
    assert speed["tokens_per_second"] > 1 and speed["threads"] >= 1


def test_measuring_refuses_what_does_not_fit_and_prompts_beside_it(export, capsys):
    assert main(["generate", str(export), "--measure", "9999"]) == 2
    assert re.search(r"must fit into \d+ positions, got 10023\. Use at most \d+ tokens", capsys.readouterr().err)
    for words in (["--measure", "4", "Once"], ["--measure", "0"], []):
        assert main(["generate", str(export), *words]) == 2
        assert "needs prompts, or --measure with a number above 0" in capsys.readouterr().err
