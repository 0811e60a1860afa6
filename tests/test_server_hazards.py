"""The server with clients that send too slowly or do not read, and with a second signal."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest
from test_server import ENDLESS, GREEDY, Running, export


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory, tiny_model_dir, tiny_tokenizer) -> Path:
    """The tiny model with room for long answers, which the engine gives in seconds."""
    folder = export(tmp_path_factory.mktemp("long") / "model", tiny_model_dir, tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return folder


def test_second_signal_stops_at_once(long_folder):
    # through transformers an answer takes long enough to be caught running
    server = Running(long_folder, "--backend=reference", "--slots=1", "--drain-seconds=3000", "--positions=8192")
    stream = server.client.completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    while httpx.get(f"{server.url}/health").status_code == 200:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGINT)
    with pytest.raises((openai.APIError, httpx.TransportError)):
        list(stream)
    assert server.process.wait(60) == 0
    assert any("SIGINT: stopping now" in line for line in server.log)


def half_request(server: Running, body: bytes, length: int) -> socket.socket:
    """A connection that has sent the beginning of a body, and reads with a small buffer."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.settimeout(60)
    one.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    one.sendall(head.encode() + body)
    return one


def read_all(one: socket.socket) -> str:
    with one:
        return b"".join(iter(lambda: one.recv(2**16), b"")).decode()


@pytest.fixture(scope="module")
def server(long_folder):
    one = Running(long_folder, "--slots=2", "--positions=8192", "--body-seconds=0.5")
    yield one
    assert one.stop() == 0, "".join(one.log)


def test_body_that_comes_too_slowly_is_given_up(server):
    answer = read_all(half_request(server, b'{"prompt": ', 100))
    assert answer.startswith("HTTP/1.1 408 ") and "must come within 0.5 s, got a part of it" in answer
    assert server.metric("qat_requests_total", path="/v1/completions", status="408") == 1
    assert server.client.completions.create(**GREEDY).choices[0].text


def resident_megabytes(process: subprocess.Popen) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def test_stream_that_nobody_reads_holds_no_slot_and_no_memory_beyond_its_answer(server):
    asked = json.dumps(GREEDY | {"max_tokens": 2000, "stream": True}).encode()
    server.client.completions.create(**GREEDY)
    before, ended = resident_megabytes(server.process), server.metric("qat_answers_total")
    readers = [half_request(server, asked, len(asked)) for _ in range(6)]
    wanted = server.client.completions.create(**GREEDY).choices[0].text
    assert wanted
    # all six end, though none was read: their slots are free for others
    server.wait_for("qat_answers_total", ended + 7)
    assert server.metric("qat_active_slots") == server.metric("qat_queue_length") == 0
    assert server.client.completions.create(**GREEDY).choices[0].text == wanted
    assert resident_megabytes(server.process) - before < 100
    # what was held back arrives whole; the others leave without a word
    texts = [json.loads(line[6:])["choices"][0] for line in read_all(readers[0]).splitlines() if line[:7] == "data: {"]
    assert texts[-1]["finish_reason"] == "length" and "".join(text["text"] for text in texts).startswith(wanted)
    for reader in readers[1:]:
        reader.close()


def test_folder_that_is_swapped_while_it_is_served_changes_nothing(server, long_folder):
    before = server.client.completions.create(**GREEDY).choices[0].text
    aside = long_folder.with_name("aside")
    long_folder.rename(aside)
    long_folder.mkdir()
    (long_folder / "config.json").write_text("{}")
    try:
        assert server.client.completions.create(**GREEDY).choices[0].text == before != ""
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        (long_folder / "config.json").unlink()
        long_folder.rmdir()
        aside.rename(long_folder)


def test_connections_that_never_end_their_headers_leave_others_alone(server):
    silent = []
    for _ in range(40):
        one = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: he")
        silent.append(one)
    assert server.client.completions.create(**GREEDY).choices[0].text
    assert server.metric("qat_active_slots") == server.metric("qat_queue_length") == 0
    for one in silent:
        one.close()
