"""Text from a packed model: greedy decoding is the argmax of the logits, alone or in a padded batch."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import same_process, tiny_run

from qat import pipeline
from qat.cli.main import main
from qat.errors import UserError
from qat.serve.generate import answer, load_for_generation

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


@torch.no_grad()
def argmax_loop(model, tokenizer, prompt: str, count: int) -> str:
    """Greedy decoding without a cache: the whole sequence again for every token."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if int(ids[0, -1]) == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_greedy_answer_is_the_argmax_at_every_step(export):
    model, tokenizer = load_for_generation(export)
    answers = answer(model, tokenizer, PROMPTS[:1], 16)
    assert answers == [argmax_loop(model, tokenizer, PROMPTS[0], 16)]
    assert len(set(answers[0].split())) > 2


def test_padded_batch_answers_as_single_prompts(export):
    model, tokenizer = load_for_generation(export)
    together = answer(model, tokenizer, PROMPTS, 12)
    assert together == [answer(model, tokenizer, [prompt], 12)[0] for prompt in PROMPTS]
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


def test_answer_has_at_most_the_tokens_asked_for(export):
    model, tokenizer = load_for_generation(export)
    long = answer(model, tokenizer, PROMPTS[:1], 8)[0]
    short = answer(model, tokenizer, PROMPTS[:1], 2)[0]
    assert long.startswith(short)
    assert len(short) < len(long)


def test_every_backend_gives_the_same_answer_or_is_refused(export):
    answers = {}
    for backend in ("as_trained", "dense", "reference"):
        try:
            model, tokenizer = load_for_generation(export, backend)
        except UserError as error:
            # int8 inputs are multiplied as integers only
            assert "kernel for w8a8_matmul" in str(error)
            continue
        answers[backend] = answer(model, tokenizer, PROMPTS, 8)
    assert {"as_trained", "reference"} <= set(answers)
    assert all(given == answers["as_trained"] for given in answers.values())


def test_unknown_backend_is_refused_with_those_there_are(export):
    with pytest.raises(UserError, match=r"backend must be one of \[.*'reference'\], got refrence. Did you mean"):
        load_for_generation(export, "refrence")


def test_tokenizer_without_template_completes_the_plain_prompt(export):
    model, tokenizer = load_for_generation(export)
    with_template = answer(model, tokenizer, ["The miller"], 6)
    tokenizer.chat_template = None
    ids = tokenizer("The miller", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = answer(model, tokenizer, ["The miller"], 6)
    assert plain == [tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()]
    assert plain != with_template


@pytest.mark.parametrize("wrong", ["--max-new-tokens=0", "--temperature=-1"])
def test_impossible_lengths_and_temperatures_are_refused(export, wrong, capsys):
    assert main(["generate", str(export), "hi", wrong]) == 2
    assert "must be at least 1 and temperature at least 0" in capsys.readouterr().err
