"""Continuous batching: a sequence gets the tokens it would get alone, and its end touches no other."""

from __future__ import annotations

import threading

import pytest
import torch
from test_engine import needs_library, packed_model

from qat.errors import UserError
from qat.serve.batching import Batch, Draining, Event, QueueFull, Sequence, Service, run_to_end
from qat.serve.engine import Engine
from qat.serve.load import serve
from qat.serve.runner import LayerRunner, open_runner
from qat.serve.sampling import Sampling

VOCABULARY = 300


class Counter:
    """A runner whose next token is the last one plus 1; token 250 gives NaN, 251 makes the kernels fail."""

    positions, slots, vocabulary = 600, 2, VOCABULARY

    def __init__(self):
        self.calls: list[list[int]] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def forward(self, ids, slot, position, scored):
        assert self.may_run.wait(60)
        self.calls.append(slot.tolist())
        if 251 in ids.tolist():
            raise RuntimeError("kernel said no")
        logits = torch.zeros(scored.numel(), VOCABULARY)
        for row, place in enumerate(scored.tolist()):
            token = int(ids[place])
            logits[row, (token + 1) % VOCABULARY] = torch.nan if token == 250 else 9.0
        return logits

    def top(self, ids, slot, position, scored, k):
        logits = self.forward(ids, slot, position, scored)
        values, tokens = logits.where(logits.isfinite().all(-1, keepdim=True), -torch.inf).topk(k)
        return values, tokens.where(values.isfinite(), -1)


def sequence(tokenizer, prompt, **options) -> tuple[Sequence, list[Event]]:
    heard: list[Event] = []
    return Sequence(prompt, Sampling(**options), tokenizer, heard.append), heard


def prompts(*lengths: int) -> list[list[int]]:
    return [
        torch.randint(3, 290, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in lengths
    ]


OPTIONS = [
    {},
    {"temperature": 3.0, "seed": 5},
    {"repetition_penalty": 1.5},
    {"temperature": 2.0, "top_p": 0.9, "seed": 1},
]
FEW = [{"temperature": 3.0, "top_k": 20, "seed": 5}, {}, {"temperature": 2.0, "top_k": 40, "top_p": 0.8, "seed": 1}]


@needs_library
def test_tokens_in_a_batch_are_those_alone(tiny_model_dir, tiny_tokenizer):
    packed = packed_model(tiny_model_dir, "w4a16_g32")

    def answers(asked, slots: int) -> list[list[int]]:
        made = [sequence(tiny_tokenizer, ids, max_tokens=12, **options)[0] for ids, options in asked]
        run_to_end(Engine(packed, 256, slots), made, ends=set())
        return [one.answer for one in made]

    # 140 tokens are two pieces of a prompt; with two slots the last ones join while others decode
    asked = list(zip(prompts(5, 140, 3, 60), OPTIONS, strict=True))
    alone = [answers([one], 1)[0] for one in asked]
    assert answers(asked, 4) == answers(asked, 2) == alone
    assert all(len(answer) == 12 for answer in alone)
    # those that need few candidates, without and with one that needs all logits
    few = list(zip(prompts(7, 20, 33), FEW, strict=True))
    alone = [answers([one], 1)[0] for one in few]
    assert answers(few, 3) == alone == answers([*few, asked[2]], 4)[:3]
    assert len({tuple(answer) for answer in alone}) == 3


def test_end_token_ends_one_sequence_and_frees_its_slot(tiny_tokenizer):
    made = [sequence(tiny_tokenizer, [start], max_tokens=10) for start in (10, 50, 90)]
    run_to_end(Counter(), [one for one, _ in made], ends={14})
    assert [one.answer for one, _ in made] == [[11, 12, 13, 14], list(range(51, 61)), list(range(91, 101))]
    assert [one.finish for one, _ in made] == ["stop", "length", "length"]


def test_text_of_events_is_the_answer_without_its_end_token(tiny_tokenizer):
    one, heard = sequence(tiny_tokenizer, [40], max_tokens=50)
    run_to_end(Counter(), [one], ends={60})
    assert "".join(event.text for event in heard) == tiny_tokenizer.decode(range(41, 60))
    assert [event.token for event in heard] == list(range(41, 61))


def test_stop_string_is_found_across_tokens_and_not_passed_on(tiny_tokenizer):
    text = tiny_tokenizer.decode(range(41, 60))
    one, heard = sequence(tiny_tokenizer, [40], max_tokens=50, stop=(text[4:8],))
    run_to_end(Counter(), [one], ends=set())
    assert "".join(event.text for event in heard) == text[:4]
    assert one.finish == "stop" and len(one.answer) == 8


@pytest.mark.parametrize("options", [{}, {"temperature": 1e-3, "seed": 0}])
def test_sequence_whose_logits_are_nan_fails_alone(tiny_tokenizer, options):
    bad, heard = sequence(tiny_tokenizer, [247], max_tokens=20, **options)
    good, _ = sequence(tiny_tokenizer, [10], max_tokens=20, **options)
    run_to_end(Counter(), [bad, good], ends=set())
    assert bad.finish == "error" and "not finite" in heard[-1].error and bad.answer == [248, 249, 250]
    assert good.answer == list(range(11, 31))


def test_long_prompt_lets_others_decode_between_its_pieces(tiny_tokenizer):
    runner = Counter()
    batch = Batch(runner, ends=set())
    short, _ = sequence(tiny_tokenizer, [10], max_tokens=50)
    long, _ = sequence(tiny_tokenizer, [7] * 500, max_tokens=5)
    batch.add(short)
    batch.step()
    batch.add(long)
    for _ in range(4):
        batch.step()
    assert len(short.answer) == 5 and long.answer == [8]
    assert all(call.count(0) == 1 and call.count(1) <= 128 for call in runner.calls[1:])


def test_cancelled_sequence_leaves_at_the_next_step(tiny_tokenizer):
    batch = Batch(Counter(), ends=set())
    one, heard = sequence(tiny_tokenizer, [10], max_tokens=50)
    batch.add(one)
    batch.step()
    one.is_cancelled = True
    batch.step()
    assert batch.free == 2 and one.answer == [11] and heard[-1].finish == "cancelled"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: must have at least one token"),
        ([300], "tokens must be from 0 to 299, got 300"),
        ([-1], "tokens must be from 0 to 299, got -1"),
        ([5] * 599, "must fit into 600 tokens, got a prompt of 599 and an answer of up to 2"),
    ],
)
def test_prompt_that_cannot_be_run_is_refused_before_any_work(tiny_tokenizer, prompt, message):
    runner = Counter()
    with pytest.raises(UserError, match=message):
        run_to_end(runner, [sequence(tiny_tokenizer, prompt, max_tokens=2)[0]], set())
    assert not runner.calls


class Ear:
    """A listener that can be waited for."""

    def __init__(self):
        self.heard: list[Event] = []
        self.is_over = threading.Event()

    def __call__(self, event: Event) -> None:
        self.heard.append(event)
        if event.finish:
            self.is_over.set()

    def finish(self) -> str | None:
        assert self.is_over.wait(60)
        return self.heard[-1].finish


@pytest.fixture
def service(tiny_tokenizer):
    one = Service(Counter(), tiny_tokenizer, {200}, queue=1)
    yield one
    one.runner.may_run.set()
    one.close()


def test_service_refuses_what_its_queue_cannot_hold_and_goes_on(service):
    service.runner.may_run.clear()
    ears = [Ear() for _ in range(3)]
    for ear in ears:
        service.submit([10], Sampling(max_tokens=5), ear)
    with pytest.raises(QueueFull):
        service.submit([10], Sampling(max_tokens=5), Ear())
    service.runner.may_run.set()
    assert [ear.finish() for ear in ears] == ["length"] * 3
    after = Ear()
    service.submit([10], Sampling(max_tokens=5), after)
    assert after.finish() == "length"


def test_service_cancels_running_and_waiting_sequences(service):
    service.runner.may_run.clear()
    ears = [Ear() for _ in range(3)]
    made = [service.submit([10], Sampling(max_tokens=400), ear) for ear in ears]
    service.cancel(made[0])
    service.cancel(made[2])
    service.runner.may_run.set()
    assert [ear.finish() for ear in ears] == ["cancelled", "stop", "cancelled"]


def test_service_survives_kernels_that_fail_and_listeners_that_raise(service):
    failed, after = Ear(), Ear()
    service.submit([251], Sampling(max_tokens=5), failed)
    assert failed.finish() == "error" and failed.heard[-1].error == "RuntimeError: kernel said no"

    def deaf(event: Event) -> None:
        raise RuntimeError("gone")

    service.submit([10], Sampling(max_tokens=100), deaf)
    service.submit([10], Sampling(max_tokens=5), after)
    assert after.finish() == "length"


def test_drain_finishes_what_runs_and_refuses_the_rest(service):
    ear = Ear()
    service.submit([10], Sampling(max_tokens=100), ear)
    assert service.drain(60) and ear.finish() == "length" and len(ear.heard) == 100
    with pytest.raises(Draining):
        service.submit([10], Sampling(), Ear())
    assert not service.is_alive


def test_drain_cancels_what_takes_too_long(service):
    service.runner.may_run.clear()
    ear = Ear()
    service.submit([10], Sampling(max_tokens=100), ear)
    threading.Timer(0.2, service.runner.may_run.set).start()
    assert not service.drain(0)
    assert ear.finish() == "cancelled"


@pytest.mark.parametrize("family", ["tiny_gpt2_dir", "tiny_mixtral_dir", "tiny_model_dir"])
def test_layer_runner_decodes_in_pieces_and_slots_what_the_model_says_at_once(family, request):
    packed = packed_model(request.getfixturevalue(family), "w4a16_g32")
    runner = LayerRunner(packed, 64, 2, "reference")
    ids = torch.tensor(prompts(20, 9)[0] + prompts(20, 9)[1])
    slot, position = torch.tensor([0] * 20 + [1] * 9), torch.cat([torch.arange(20), torch.arange(9)])
    model = serve(packed, torch.bfloat16, "reference")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = [model(part[None]).logits[0, -1].float() for part in (ids[:20], ids[20:])]
    # the second sequence in one call with the end of the first
    runner.forward(ids[:12], slot[:12], position[:12], torch.tensor([], dtype=torch.long))
    found = runner.forward(ids[12:], slot[12:], position[12:], torch.tensor([16, 7]))
    for row, logits in zip(found, wanted[::-1], strict=True):
        # another split of the same sums in bfloat16
        torch.testing.assert_close(row, logits, rtol=0.05, atol=0.05 * float(logits.abs().max()))


def test_open_runner_says_why_the_engine_is_not_used(tiny_gpt2_dir, capsys, tiny_tokenizer):
    runner = open_runner(packed_model(tiny_gpt2_dir, "w4a16_g32"), 1000, 2)
    assert "decode engine: not used (model type gpt2 is not one of" in capsys.readouterr().err
    assert (runner.positions, runner.slots, runner.vocabulary) == (256, 2, VOCABULARY)
    together = [sequence(tiny_tokenizer, ids, max_tokens=6)[0] for ids in prompts(4, 30, 9)]
    run_to_end(runner, together, ends=set())
    for one in together:
        alone, _ = sequence(tiny_tokenizer, one.prompt, max_tokens=6)
        run_to_end(runner, [alone], ends=set())
        assert alone.answer == one.answer
