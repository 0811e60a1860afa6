"""The server as a process of its own, driven by the official client: answers, refusals, drain, metrics."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from conftest import save_model
from test_engine import packed_model

from qat.formats import FORMATS

NAME = "tiny"


def export(folder: Path, model: Path, tokenizer) -> Path:
    folder.mkdir()
    FORMATS["compressed_tensors"].write(packed_model(model, "w4a16_g32"), folder)
    tokenizer.save_pretrained(folder)
    return folder


class Running:
    """`qat serve` on a free port."""

    def __init__(self, folder: Path, *options: str):
        command = [sys.executable, "-m", "qat.cli.main", "serve", str(folder), "--port=0", f"--name={NAME}", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self.url = self._wait_for_url()
        # keeps the pipe empty
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        for _ in range(600):
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def _wait_for_url(self) -> str:
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"(http://[\d.]+:\d+)/v1", line):
                return found[1]
        raise AssertionError("".join(self.log))

    def post(self, path: str, **options) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=120, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over what its labels leave open."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        lines = [line for line in lines if re.match(rf"{name}[ {{]", line) and all(word in line for word in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def wait_for(self, name: str, value: float) -> None:
        for _ in range(1200):
            if self.metric(name) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} is {self.metric(name)}, not {value}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir, tiny_tokenizer) -> Path:
    return export(tmp_path_factory.mktemp("served") / "model", tiny_model_dir, tiny_tokenizer)


@pytest.fixture(scope="module")
def server(folder):
    one = Running(folder, "--slots=2", "--positions=256", "--max-body-mb=0.02")
    yield one
    assert one.stop() == 0, "".join(one.log)


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A model that the engine refuses, without an end token: its answers take long enough to be caught running."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=8192, bos_token_id=1, eos_token_id=1
    )
    folder = tmp_path_factory.mktemp("slow")
    return export(folder / "export", save_model(folder / "model", config, tiny_tokenizer), tiny_tokenizer)


LONG = {"model": NAME, "prompt": "The miller", "max_tokens": 400, "temperature": 0}
ENDLESS = LONG | {"max_tokens": 8000}
HELLO = [{"role": "user", "content": "Tell me a story."}]
CHAT = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0}
GREEDY = {"model": NAME, "prompt": "The miller", "max_tokens": 12, "temperature": 0}


def test_models_names_the_one_there_is(server):
    assert [model.id for model in server.client.models.list()] == [NAME]


def test_completion_streams_the_text_it_gives_at_once(server):
    whole = server.client.completions.create(**GREEDY)
    chunks = list(server.client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text != ""
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 12


def test_chat_streams_the_text_it_gives_at_once(server):
    whole = server.client.chat.completions.create(**CHAT)
    chunks = list(server.client.chat.completions.create(**CHAT, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" == whole.choices[0].message.role
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_is_a_completion_of_its_template(server, tiny_tokenizer):
    text = tiny_tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story."}]}]
    chat = server.client.chat.completions.create(**CHAT | {"messages": parts})
    plain = server.client.completions.create(**GREEDY | {"prompt": ids})
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.usage == plain.usage


def test_seed_repeats_an_answer_and_its_absence_does_not(server):
    def ask(**seed) -> str:
        return server.client.completions.create(**GREEDY | {"temperature": 1.5}, **seed).choices[0].text

    assert ask(seed=3) == ask(seed=3) != ask(seed=4)
    assert len({ask() for _ in range(4)}) > 1


def test_stop_ends_the_answer_before_its_text(server):
    whole = server.client.completions.create(**GREEDY).choices[0].text
    stop = whole[3:6]
    for stream in (False, True):
        answer = server.client.completions.create(**GREEDY, stop=["zzzz", stop], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole.partition(stop)[0]
        assert choices[-1].finish_reason == "stop"


def test_answers_at_the_same_time_are_those_one_after_another(server):
    asked = [
        GREEDY | {"prompt": "The fox sells " * length, "max_tokens": 30, "seed": length, "temperature": length % 2}
        for length in range(1, 9)
    ]

    def ask(request: dict) -> str:
        return server.client.completions.create(**request).choices[0].text

    alone = [ask(request) for request in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, asked)) == alone
    assert len(set(alone)) > 4


WRONG = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"3": 1}}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"stop": 3}, "stop"),
    ({"seed": 1.5}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"max_tokns": 5}, "max_tokns"),
]
WRONG_CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "hi", "tool_calls": []}]}, "messages[0]"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"max_completion_tokens": 3}, "max_tokens"),
]
WRONG_COMPLETION = [
    ({"echo": True}, "echo"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [300]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
]


@pytest.mark.parametrize(
    ("path", "request_body", "param"),
    [
        *(("/v1/chat/completions", CHAT | change, param) for change, param in WRONG + WRONG_CHAT),
        *(("/v1/completions", GREEDY | change, param) for change, param in WRONG + WRONG_COMPLETION),
    ],
)
def test_wrong_field_is_refused_by_name(server, path, request_body, param):
    answer = server.post(path, content=json.dumps(request_body))
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert "got" in error["message"]


def test_harmless_and_neutral_fields_are_accepted(server):
    neutral = {"user": "me", "n": 1, "presence_penalty": 0, "logit_bias": None}
    assert server.client.chat.completions.create(**CHAT, **neutral, tools=[], metadata={"a": "b"}).choices
    assert server.client.completions.create(**GREEDY, **neutral, echo=False, best_of=1).choices


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', b"[" * 15000, b'{"model": NaN}', b"1" * 9000]
)
def test_invalid_json_is_refused(server, body):
    answer = server.post("/v1/completions", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_that_is_too_large_is_refused(server, is_chunked):
    body = json.dumps(GREEDY | {"prompt": "x" * 30000}).encode()
    answer = server.post("/v1/completions", content=iter([body[:9000], body[9000:]]) if is_chunked else body)
    assert answer.status_code == 413 and "at most 20971 bytes" in answer.json()["error"]["message"]


def test_context_overflow_is_refused_with_its_numbers(server):
    with pytest.raises(openai.BadRequestError, match=r"got a prompt of \d+ and an answer of up to 250"):
        server.client.completions.create(**GREEDY | {"max_tokens": 250, "prompt": "a fox sees a lamp " * 9})
    with pytest.raises(openai.BadRequestError, match="fit into 256 tokens") as caught:
        messages = [{"role": "user", "content": "fox " * 400}]
        server.client.chat.completions.create(model=NAME, messages=messages)
    assert caught.value.code == "context_length_exceeded"


def test_other_model_path_and_method_are_not_found(server):
    with pytest.raises(openai.NotFoundError, match="model: must be tiny, got gpt-4"):
        server.client.chat.completions.create(**CHAT | {"model": "gpt-4"})
    assert server.post("/v1/embeddings").status_code == 404
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert server.post("/v1/completions", json={"prompt": "a"}).status_code == 400


def test_metrics_add_up(server):
    names = (
        "prompt_tokens_total",
        "answer_tokens_total",
        "first_token_seconds_count",
        "token_seconds_count",
    )
    before = [server.metric(f"qat_{name}") for name in names]
    requests = server.metric("qat_requests_total", path="/v1/completions", status="200")
    usages = [server.client.completions.create(**GREEDY | {"prompt": "fox " * n}).usage for n in (1, 5, 9)]
    server.post("/v1/completions", content=b"{")
    prompt, answer = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    gained = [server.metric(f"qat_{name}") - was for name, was in zip(names, before, strict=True)]
    assert gained == [prompt, answer, 3, answer - 3]
    assert server.metric("qat_requests_total", path="/v1/completions", status="200") == requests + 3
    assert server.metric("qat_requests_total", path="/v1/completions", status="400") >= 1
    assert (server.metric("qat_active_slots"), server.metric("qat_queue_length"), server.metric("qat_slots")) == (
        0,
        0,
        2,
    )


def test_client_that_leaves_frees_slot_and_queue(slow_folder):
    server = Running(slow_folder, "--slots=1", "--queue=1", "--positions=8192")
    with ThreadPoolExecutor(1) as pool:
        stream = server.client.completions.create(**ENDLESS, stream=True)
        next(iter(stream))
        # a second one that waits for the slot and gives up
        waiting = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=3)
        server.wait_for("qat_queue_length", 1)
        assert isinstance(waiting.exception(), httpx.ReadTimeout)
        stream.close()
        server.wait_for("qat_active_slots", 0)
        server.wait_for("qat_queue_length", 0)
        assert server.metric("qat_answers_total", finish="cancelled") == 2
    assert server.client.completions.create(**GREEDY).choices[0].text
    assert server.stop() == 0


def test_full_queue_is_429_and_sigterm_finishes_what_runs(slow_folder):
    server = Running(slow_folder, "--slots=1", "--queue=1")
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(lambda: server.client.completions.create(**LONG))]
        server.wait_for("qat_active_slots", 1)
        running.append(pool.submit(lambda: server.client.completions.create(**LONG)))
        server.wait_for("qat_queue_length", 1)
        refused = server.post("/v1/completions", json=GREEDY)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/health").status_code == 200:
            time.sleep(0.02)
        refused = server.post("/v1/completions", json=GREEDY)
        assert refused.status_code == 503 and refused.json()["error"]["type"] == "service_unavailable_error"
        answers = [one.result() for one in running]
    assert [one.usage.completion_tokens for one in answers] == [400, 400]
    assert server.process.wait(60) == 0
    assert any("SIGTERM: finishing what runs" in line for line in server.log)


def test_drain_cancels_answers_that_take_too_long(slow_folder):
    server = Running(slow_folder, "--slots=1", "--drain-seconds=0", "--positions=8192")
    stream = server.client.completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="got a shutdown"):
        list(stream)
    assert server.process.wait(60) == 0


def test_api_key_is_asked_for(folder):
    server = Running(folder, "--api-key=secret")
    with pytest.raises(openai.AuthenticationError, match="api key"):
        server.client.models.list()
    with pytest.raises(openai.AuthenticationError, match="api key"):
        server.client.completions.create(**GREEDY)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret")
    assert client.completions.create(**GREEDY).choices
    assert server.stop() == 0


def test_port_in_use_is_a_clear_error(qat, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, error = qat("serve", folder, f"--port={port}")
    assert code == 2 and f"127.0.0.1:{port}: must be an address that is free" in error


def test_impossible_sizes_are_refused_at_once(qat, folder):
    code, _, error = qat("serve", folder, "--slots=0", "--queue=-1", "--max-body-mb=nan")
    assert code == 2 and all(word in error for word in ("--slots: must", "--queue: must", "--max-body-mb: must"))


def test_server_is_for_this_machine_unless_it_asks_for_a_key(server, qat, folder):
    assert server.url.startswith("http://127.0.0.1:")
    for host in ("0.0.0.0", "::", "example.org"):
        code, _, error = qat("serve", folder, f"--host={host}", "--port=0")
        assert code == 2 and f"--api-key: must be given when other machines can ask, got --host {host}." in error
    one = Running(folder, "--host=0.0.0.0", "--api-key=secret")
    assert one.post("/v1/completions", json=GREEDY).status_code == 401
    assert one.stop() == 0


def test_missing_web_packages_are_named_with_their_extra(qat, folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "qat.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, error = qat("serve", folder)
    assert code == 2 and "no uvicorn. Install the extra: pip install 'qat[serve]'" in error
