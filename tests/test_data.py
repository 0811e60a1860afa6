"""Text to windows: what is read, how it is split and packed, and what is refused, naming the place."""

from __future__ import annotations

import json

import pytest
import torch

from qat.config import DataConfig
from qat.data import GRAM, load_windows, overlap, pack, window_order
from qat.errors import UserError

BLOCK = 32


def config(path, **changes) -> DataConfig:
    fields = {"path": str(path), "block_size": BLOCK, "eval_tokens": 2 * (BLOCK - 1), **changes}
    return DataConfig(**fields)


def write_rows(folder, rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def stream_text(windows, tokenizer) -> str:
    return tokenizer.decode(windows.flatten().tolist())


def test_text_file_gives_a_document_per_paragraph_and_about_fifty_windows(tiny_text, tiny_tokenizer):
    windows = load_windows(config(tiny_text), tiny_tokenizer)
    assert windows.train.dtype == torch.int64 and windows.train.shape[1] == BLOCK
    assert (windows.train_documents, windows.eval_documents) == (36, 4)
    assert 40 <= len(windows.train) <= 60
    assert all("runs of 13 tokens" in line for line in windows.warnings)  # few letters a token: they recur


def test_windows_are_the_documents_in_order_joined_by_eos(tiny_text, tiny_tokenizer):
    windows = load_windows(config(tiny_text), tiny_tokenizer)
    paragraphs = tiny_text.read_text().strip().split("\n\n")
    wanted = tiny_tokenizer.eos_token.join(paragraphs[:36])
    text = stream_text(windows.train, tiny_tokenizer)
    assert wanted.startswith(text)
    ids = tiny_tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert windows.train.flatten().tolist() == ids[: len(ids) // BLOCK * BLOCK]


def test_held_out_text_is_the_last_documents_and_none_of_training(tiny_text, tiny_tokenizer):
    windows = load_windows(config(tiny_text, eval_tokens=10**6), tiny_tokenizer)
    assert stream_text(windows.evaluation, tiny_tokenizer).startswith("Story 36.")
    assert "Story 36." not in stream_text(windows.train, tiny_tokenizer)


@pytest.mark.parametrize(("eval_tokens", "count"), [(1, 1), (31, 1), (32, 2), (62, 2), (63, 3)])
def test_eval_tokens_counts_scored_tokens_rounded_up_to_windows(tiny_text, tiny_tokenizer, eval_tokens, count):
    windows = load_windows(config(tiny_text, eval_tokens=eval_tokens), tiny_tokenizer)
    assert windows.evaluation.shape == (count, BLOCK)
    assert windows.eval_tokens == count * (BLOCK - 1) >= eval_tokens


@pytest.mark.parametrize(("join", "text"), [("newline", "\n"), ("none", ""), ("eos", "<|im_end|>")])
def test_join_stands_between_documents(tmp_path, tiny_tokenizer, join, text):
    file = write_rows(tmp_path, [{"text": "ab"}] * 30 + [{"text": "cd"}] * 60)
    windows = load_windows(config(file, kind="jsonl", join=join, eval_fraction=0.67, block_size=8), tiny_tokenizer)
    assert stream_text(windows.train, tiny_tokenizer).startswith(f"ab{text}ab{text}ab")


def test_eval_path_leaves_all_of_path_for_training(tiny_text, tiny_jsonl, tmp_path, tiny_tokenizer):
    other = tmp_path / "other.txt"
    other.write_text("Quite another tale of the sea, told twice over and never the same way. " * 3)
    windows = load_windows(config(tiny_text, eval_path=str(other)), tiny_tokenizer)
    assert (windows.train_documents, windows.eval_documents) == (40, 1)
    assert stream_text(windows.evaluation, tiny_tokenizer).startswith("Quite another tale")


def test_warning_counts_held_out_documents_that_are_also_trained_on(tiny_text, tiny_tokenizer):
    windows = load_windows(config(tiny_text, eval_path=str(tiny_text)), tiny_tokenizer)
    assert windows.overlap == 1.0
    assert windows.warnings == (
        "40 of 40 held-out documents also stand in the training text, word for word",
        "100.0% of the held-out runs of 13 tokens also stand in the training text",
    )


def test_overlap_finds_copied_runs_wherever_they_stand_in_a_window():
    generator = torch.Generator().manual_seed(0)
    train, evaluation = (torch.randint(0, 500, (n, BLOCK), generator=generator) for n in (40, 4))
    assert overlap(train, evaluation) == 0.0
    evaluation[1, 3:19] = train[-1, 11:27]  # 16 tokens hold 4 runs of 13
    assert overlap(train, evaluation) == 4 / (4 * (BLOCK - GRAM + 1))
    assert overlap(train, train[7:8]) == 1.0
    short = torch.arange(16).view(2, 8)  # windows shorter than a run are compared whole
    assert overlap(short, short[1:]) == 1.0 and overlap(short[:1], short[1:]) == 0.0


def test_warning_counts_blank_rows(tmp_path, tiny_tokenizer):
    file = write_rows(tmp_path, [{"text": " \n"}, *({"text": f"line {n} of some length"} for n in range(60)), ""])
    windows = load_windows(config(file, kind="jsonl"), tiny_tokenizer)
    assert windows.train_documents + windows.eval_documents == 60
    assert windows.warnings[0] == "1 blank documents left out"


def test_text_paragraphs_keep_their_indentation_and_lose_only_the_blank_lines(tmp_path, tiny_tokenizer):
    file = tmp_path / "poem.txt"
    file.write_text("\n\n" + "  first\n  line\n \n\n    second\n\n" * 30)
    windows = load_windows(config(file), tiny_tokenizer)
    assert stream_text(windows.train, tiny_tokenizer).startswith("  first\n  line<|im_end|>    second<|im_end|>  first")
    assert windows.train_documents + windows.eval_documents == 60


def test_folder_of_text_is_read_sorted_and_recursively_with_other_suffixes_left_out(tmp_path, tiny_tokenizer):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("second " * 40)
    (tmp_path / "a.py").write_text("first\n\n" * 40)
    (tmp_path / "c.txt").write_text("third " * 40)
    (tmp_path / "skip.bin").write_bytes(b"\xff\xfe")
    windows = load_windows(config(tmp_path, eval_fraction=0.34), tiny_tokenizer)
    text = stream_text(windows.train, tiny_tokenizer)
    assert text.startswith("first\n\nfirst") and "second" in text and "third" not in text
    assert windows.train_documents == 2


def test_text_with_windows_line_ends_and_byte_order_mark_equals_the_plain_one(tmp_path, tiny_text, tiny_tokenizer):
    file = tmp_path / "dos.txt"
    file.write_bytes(b"\xef\xbb\xbf" + tiny_text.read_bytes().replace(b"\n", b"\r\n"))
    ours, plain = (load_windows(config(path), tiny_tokenizer) for path in (file, tiny_text))
    assert torch.equal(ours.train, plain.train)


def test_jsonl_equals_text_of_the_same_documents(tiny_jsonl, tiny_text, tiny_tokenizer):
    lines = load_windows(config(tiny_jsonl, kind="jsonl"), tiny_tokenizer)
    text = load_windows(config(tiny_text), tiny_tokenizer)
    assert torch.equal(lines.train, text.train) and torch.equal(lines.evaluation, text.evaluation)


def test_jsonl_keeps_line_separator_characters_inside_strings(tmp_path, tiny_tokenizer):
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": "one\u2028two " * 20}, ensure_ascii=False)] * 2
    file.write_text("\n".join(rows), encoding="utf-8")
    windows = load_windows(config(file, kind="jsonl"), tiny_tokenizer)
    assert "one\u2028two" in stream_text(windows.train, tiny_tokenizer)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{not json", r"rows.jsonl:2: must be one JSON object, got .*line 1 column 2"),
        ("[1]", r"rows.jsonl:2: must be one JSON object, got list"),
        ({"body": "x", "id": 3}, r"rows.jsonl:2: must have the column 'text'.* Set data.column to one of: body, id"),
    ],
)
def test_jsonl_names_the_line_when_a_row_is_wrong(tmp_path, tiny_tokenizer, line, match):
    file = write_rows(tmp_path, [{"text": "a"}, line])
    with pytest.raises(UserError, match=match):
        load_windows(config(file, kind="jsonl"), tiny_tokenizer)


def test_jsonl_reports_several_wrong_types_at_once_and_counts_the_rest(tmp_path, tiny_tokenizer):
    file = write_rows(tmp_path, [{"text": n} for n in range(8)])
    with pytest.raises(UserError, match="'text' must be text, got int 0") as caught:
        load_windows(config(file, kind="jsonl"), tiny_tokenizer)
    places = [line.split(": ")[0].rpartition(":")[2] for line in caught.value.problems[:5]]
    assert places == ["1", "2", "3", "4", "5"]
    assert caught.value.problems[-1] == "... and 3 more like these"


def test_chat_renders_the_template_without_adding_special_tokens(tiny_jsonl, tiny_tokenizer):
    windows = load_windows(config(tiny_jsonl, kind="jsonl", column="messages", chat=True, join="none"), tiny_tokenizer)
    text = stream_text(windows.train, tiny_tokenizer)
    assert text.startswith("<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\nStory 0.")


def test_chat_refuses_a_tokenizer_without_template(tiny_jsonl, tiny_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"data.chat: needs a tokenizer with a chat template"):
        load_windows(config(tiny_jsonl, kind="jsonl", column="messages", chat=True), tokenizer)


def test_chat_names_the_line_when_a_row_is_no_conversation(tmp_path, tiny_tokenizer):
    file = write_rows(tmp_path, [{"text": [{"role": "user", "content": "hi"}]}, {"text": [{"from": "user"}]}])
    with pytest.raises(UserError, match=r"rows.jsonl:2: 'text' must be \[.*role.*, got list"):
        load_windows(config(file, kind="jsonl", chat=True), tiny_tokenizer)


def test_conversations_without_chat_say_which_option_is_missing(tiny_jsonl, tiny_tokenizer):
    with pytest.raises(UserError, match=r"stories.jsonl:1: 'messages' must be text, got list.*data.chat=true"):
        load_windows(config(tiny_jsonl, kind="jsonl", column="messages"), tiny_tokenizer)


@pytest.fixture
def saved_dataset(tmp_path, tiny_jsonl, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.loads(line) for line in tiny_jsonl.read_text().splitlines()]
    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": whole, "tail": whole.select(range(10))}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_folder_reads_a_saved_dataset_as_the_same_windows(saved_dataset, tiny_jsonl, tiny_tokenizer):
    saved = load_windows(config(saved_dataset, kind="folder"), tiny_tokenizer)
    lines = load_windows(config(tiny_jsonl, kind="jsonl"), tiny_tokenizer)
    assert torch.equal(saved.train, lines.train) and torch.equal(saved.evaluation, lines.evaluation)
    assert load_windows(config(saved_dataset, kind="folder", split="tail"), tiny_tokenizer).train_documents == 9


def test_folder_refuses_an_unknown_split_or_column_listing_those_there(saved_dataset, tiny_tokenizer):
    with pytest.raises(UserError, match=r"must have the split tial, got .*tail.* Did you mean 'tail'"):
        load_windows(config(saved_dataset, kind="folder", split="tial"), tiny_tokenizer)
    with pytest.raises(UserError, match=r"must have the column 'body'.*one of: text, messages"):
        load_windows(config(saved_dataset, kind="folder", column="body"), tiny_tokenizer)


@pytest.mark.parametrize("suffix", ["parquet", "json", "csv"])
def test_folder_reads_local_data_files(tmp_path, saved_dataset, tiny_jsonl, tiny_tokenizer, suffix):
    import datasets

    folder = tmp_path / suffix
    folder.mkdir()
    rows = datasets.load_from_disk(saved_dataset)["train"].remove_columns("messages")
    getattr(rows, f"to_{suffix}")(folder / f"rows.{suffix}")
    files = load_windows(config(folder, kind="folder"), tiny_tokenizer)
    assert torch.equal(files.train, load_windows(config(tiny_jsonl, kind="jsonl"), tiny_tokenizer).train)


def test_folder_without_data_files_is_refused_with_the_librarys_reason(tmp_path, tiny_tokenizer):
    with pytest.raises(UserError, match=r"must be readable as data.kind=folder, got \w+: .+"):
        load_windows(config(tmp_path, kind="folder"), tiny_tokenizer)


def test_hub_name_is_refused_with_a_way_out_when_offline(tiny_tokenizer):
    with pytest.raises(UserError, match=r"must be readable as data.kind=hub.* a connection or a filled cache"):
        load_windows(config("nobody/no-such-set", kind="hub"), tiny_tokenizer)


def test_bytes_that_are_not_utf8_are_refused_at_their_offset_unless_told_otherwise(tmp_path, tiny_text, tiny_tokenizer):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9\n\n" + tiny_text.read_bytes())
    with pytest.raises(UserError, match=r"latin.txt:byte 3: must be UTF-8, got byte 0xe9"):
        load_windows(config(file), tiny_tokenizer)
    replaced = load_windows(config(file, encoding_errors="replace"), tiny_tokenizer)
    assert stream_text(replaced.train, tiny_tokenizer).startswith("caf\ufffd<|im_end|>Story 0.")
    ignored = load_windows(config(file, encoding_errors="ignore"), tiny_tokenizer)
    assert stream_text(ignored.train, tiny_tokenizer).startswith("caf<|im_end|>Story 0.")


def test_blank_text_is_refused(tmp_path, tiny_tokenizer):
    file = tmp_path / "blank.txt"
    file.write_text("  \n\n \n")
    with pytest.raises(UserError, match=r"blank.txt: must hold text, got \d documents, all blank"):
        load_windows(config(file), tiny_tokenizer)


def test_text_shorter_than_a_window_is_refused_with_counts(tmp_path, tiny_text, tiny_tokenizer):
    file = tmp_path / "short.txt"
    file.write_text("one\n\ntwo\n\nthree")
    with pytest.raises(UserError, match=r"training text must fill one window of 32 tokens, got less, from 2 documents"):
        load_windows(config(file, eval_fraction=0.3), tiny_tokenizer)
    with pytest.raises(UserError, match=r"short.txt: held-out text must fill one window"):
        load_windows(config(tiny_text, eval_path=str(file)), tiny_tokenizer)


def test_one_document_cannot_be_split(tmp_path, tiny_tokenizer):
    file = tmp_path / "one.txt"
    file.write_text("one " * 500)
    with pytest.raises(UserError, match=r"documents to train on and to hold out, got 1 with"):
        load_windows(config(file), tiny_tokenizer)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "txt"}, "data.kind.*Did you mean 'text'"),
        ({"join": "eso"}, "data.join.*Did you mean 'eos'"),
        ({"block_size": 1}, "data.block_size"),
        ({"eval_tokens": 0}, "data.eval_tokens"),
        ({"eval_fraction": 1.0}, "data.eval_fraction"),
        ({"chat": True}, "data.chat: needs a kind"),
        ({"encoding_errors": "surrogateescape"}, "data.encoding_errors"),
        ({"path": "no/such/file.txt"}, "no/such/file.txt: must exist"),
    ],
)
def test_load_windows_refuses_values_outside_their_range(tiny_text, tiny_tokenizer, changes, match):
    with pytest.raises(UserError, match=match):
        load_windows(config(**{"path": tiny_text, **changes}), tiny_tokenizer)


def test_join_eos_is_refused_when_the_tokenizer_has_no_end_token(tiny_text, tiny_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"data.join=eos: needs a tokenizer with an end token"):
        load_windows(config(tiny_text), tokenizer)


def test_pack_cuts_without_overlap_and_drops_the_rest():
    assert pack([[1, 2, 3], [4], [5, 6]], [0], 3, None).tolist() == [[1, 2, 3], [0, 4, 0]]
    assert pack([[1, 2, 3], [4], [5, 6]], [], 2, 2).tolist() == [[1, 2], [3, 4]]
    assert pack([], [0], 3, None).shape == (0, 3)


def test_pack_stops_reading_documents_once_the_limit_is_reached():
    def documents():
        yield [1, 2, 3, 4]
        raise AssertionError("the second document was asked for")

    assert pack(documents(), [], 2, 2).tolist() == [[1, 2], [3, 4]]


def test_window_order_is_a_permutation_that_depends_on_seed_and_epoch_only():
    torch.manual_seed(1)
    first = window_order(50, seed=3, epoch=2)
    torch.manual_seed(2)
    assert torch.equal(window_order(50, seed=3, epoch=2), first)
    assert sorted(first.tolist()) == list(range(50))
    others = [window_order(50, seed, epoch).tolist() for seed, epoch in ((2, 3), (3, 3), (4, 2), (3, 0))]
    assert all(other != first.tolist() for other in others)
