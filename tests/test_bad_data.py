"""Text that is broken, binary, empty or hostile: named by file and place, before any work."""

from __future__ import annotations

import json

import pytest
from test_data import config, stream_text

from qat.data import load_windows
from qat.errors import UserError
from qat.serve.generate import encode_chat


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_nul_bytes_are_refused_at_their_place_unless_told_otherwise(tmp_path, tiny_text, tiny_tokenizer):
    file = tmp_path / "binary.txt"
    file.write_bytes("é\0 and more\n\n".encode() + tiny_text.read_bytes())
    with pytest.raises(UserError, match=r"binary.txt:byte 2: must be text, got a NUL byte.*encoding_errors=replace"):
        load_windows(config(file), tiny_tokenizer)
    for errors, wanted in (("replace", "é\ufffd and more"), ("ignore", "é and more")):
        windows = load_windows(config(file, encoding_errors=errors), tiny_tokenizer)
        assert stream_text(windows.train, tiny_tokenizer).startswith(wanted)


def test_utf16_text_is_refused(tmp_path, tiny_text, tiny_tokenizer):
    file = tmp_path / "wide.txt"
    for encoding, match in (("utf-16", "byte 0: must be UTF-8, got byte 0xff"), ("utf-16-le", "byte 1: must be text")):
        file.write_bytes(tiny_text.read_text().encode(encoding))
        with pytest.raises(UserError, match=match):
            load_windows(config(file), tiny_tokenizer)


def test_jsonl_cut_in_its_last_line_is_refused_there(tmp_path, tiny_jsonl, tiny_tokenizer):
    file = tmp_path / "cut.jsonl"
    file.write_bytes(tiny_jsonl.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut.jsonl:40: must be one JSON object, got "):
        load_windows(config(file, kind="jsonl"), tiny_tokenizer)


def test_column_of_mixed_types_is_refused_by_line(tmp_path, tiny_tokenizer):
    rows = [{"text": "words"}, {"text": 3}, {"text": None}, {"text": ["a"]}]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"mixed.jsonl:2: 'text' must be text, got int 3") as caught:
        load_windows(config(file, kind="jsonl"), tiny_tokenizer)
    assert [line.split(":")[1] for line in caught.value.problems] == ["2", "3", "4"]


def test_rows_of_a_data_set_that_hold_nothing_are_refused_by_row(tmp_path, tiny_tokenizer):
    import datasets

    datasets.Dataset.from_dict({"text": ["words", None, "more"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved row 1: 'text' must be text, got NoneType"):
        load_windows(config(tmp_path / "saved", kind="folder"), tiny_tokenizer)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_data_file_that_is_cut_or_empty_is_refused_with_its_folder(tmp_path, tiny_jsonl, tiny_tokenizer, suffix):
    import datasets

    rows = [json.loads(line)["text"] for line in tiny_jsonl.read_text().splitlines()]
    folder = tmp_path / "set"
    folder.mkdir()
    file = folder / f"rows.{suffix}"
    getattr(datasets.Dataset.from_dict({"text": rows}), f"to_{suffix}")(file)
    whole = file.read_bytes()
    # a csv cut between two lines is a shorter csv
    for content in [b""] if suffix == "csv" else [b"", whole[: len(whole) // 2]]:
        file.write_bytes(content)
        wanted = r"set: must (be readable as data.kind=folder|hold text|have the column)"
        with pytest.raises(UserError, match=wanted) as caught:
            load_windows(config(folder, kind="folder"), tiny_tokenizer)
        assert caught.value.before_work


def test_data_set_without_a_row_is_refused(tmp_path, tiny_tokenizer):
    import datasets

    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl: must hold text, got 0 documents"):
        load_windows(config(tmp_path / "empty.jsonl", kind="jsonl"), tiny_tokenizer)
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved: must (hold text|be readable as data.kind=folder), got "):
        load_windows(config(tmp_path / "saved", kind="folder"), tiny_tokenizer)


HOSTILE = {
    "reaches-for-python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "imports": "{% include '/etc/passwd' %}",
    "raises": "{{ raise_exception('not today') }}",
    "broken": "{% for message in messages %}",
    "divides": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_chat_template_is_an_error_and_runs_nothing(tiny_jsonl, tiny_model_dir, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = HOSTILE[name]
    with pytest.raises(UserError, match=r"stories.jsonl:1: the chat template must accept it, got \w+"):
        load_windows(config(tiny_jsonl, kind="jsonl", column="messages", chat=True), tokenizer)
    with pytest.raises(UserError, match=r"messages: must suit the model's chat template, got "):
        encode_chat(tokenizer, [{"role": "user", "content": "hi"}])
