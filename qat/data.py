"""Text to windows of token ids, for training, calibration and perplexity.

Protocol, the same for every number this project reports: windows have `block_size` tokens and do not overlap; the
first token of a window is not scored; no BOS or other special token is added to a document. Documents are joined in
order by the end token, a newline or nothing, and the stream is cut into windows; what is left at its end is dropped.
Held-out documents are packed apart from the training ones, so no token is in both.

    text     a file: a document per paragraph (blank lines between); a folder: a document per .txt, .md, .py file
    jsonl    a document per line, an object whose `column` is the text
    hub      a data set of the datasets library, by name       folder    one saved by it, or parquet/json/csv files
    chat     (with all but text) `column` holds messages {role, content}, rendered by the tokenizer's chat template

Batches and their placement on devices are in `train/`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qat.config import DataConfig
from qat.errors import UserError, nearest, problem
from qat.paths import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("text", "jsonl", "hub", "folder")
JOINS = ("eos", "newline", "none")
TEXT_SUFFIXES = (".txt", ".md", ".py")
MESSAGE_FORM = '[{"role": "user", "content": "..."}, ...]'
DOCUMENTS_PER_CALL = 1000
PROBLEMS_SHOWN = 5
GRAM = 13  # tokens; shorter runs recur in any prose
OVERLAP_WARNED = 0.01


class Entry(NamedTuple):
    """One document as read: where it stands, for messages, and its text (or messages, before `rendered`)."""

    place: str
    content: Any


@dataclass(frozen=True, eq=False)
class TextWindows:
    """Token ids, int64: `train` [n, block] and `evaluation` [m, block].

    `eval_tokens` counts the scored ones, m * (block - 1). `overlap` is told by the function of that name,
    `warnings` are lines the user must see.
    """

    train: Tensor
    evaluation: Tensor
    train_documents: int
    eval_documents: int
    eval_tokens: int
    overlap: float
    warnings: tuple[str, ...]


def load_windows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TextWindows:
    """Read, split, tokenize and pack the text of `config`.

    Raises:
        UserError: text that cannot be read (naming file and line, row or byte), or too little of it for one window of
            either part.
    """
    _check(config)
    texts, blank = documents(config, tokenizer, config.path)
    if config.eval_path is None:
        texts, held_out = split(texts, config)
    else:
        held_out, more = documents(config, tokenizer, config.eval_path)
        blank += more
    separator = _separator(config, tokenizer)
    # Rounded up to whole windows, of which the first token is not scored.
    eval_windows = -(-config.eval_tokens // (config.block_size - 1))
    train = pack(tokenized(texts, tokenizer), separator, config.block_size, None)
    evaluation = pack(tokenized(held_out, tokenizer), separator, config.block_size, eval_windows)
    for name, windows, part in (("training", train, texts), ("held-out", evaluation, held_out)):
        if len(windows) == 0:
            where = config.eval_path if name == "held-out" and config.eval_path else config.path
            got = f"less, from {len(part)} documents with {sum(map(len, part))} characters"
            fix = "Give more text, a smaller data.block_size, or another data.eval_fraction."
            wanted = f"{name} text must fill one window of {config.block_size} tokens"
            raise UserError(problem(str(where), wanted, got, fix))
    share = overlap(train, evaluation)
    warnings = tuple(_warnings(texts, held_out, blank, share))
    scored = len(evaluation) * (config.block_size - 1)
    return TextWindows(train, evaluation, len(texts), len(held_out), scored, share, warnings)


def overlap(train: Tensor, evaluation: Tensor) -> float:
    """Share of the runs of GRAM tokens inside evaluation windows [m, block] that some training window [n, block] holds.

    Compared by 64-bit hashes, 4096 training windows at a time.
    """

    def hashes(windows: Tensor) -> Tensor:
        length = min(GRAM, windows.shape[1])
        total = torch.zeros_like(windows[:, length - 1 :])
        for i in range(length):
            total = total * 6364136223846793005 + windows[:, i : i + total.shape[1]] + 1
        return total.flatten()

    held_out = hashes(evaluation)
    seen = torch.zeros_like(held_out, dtype=torch.bool)
    for part in train.split(4096):
        seen |= torch.isin(held_out, hashes(part))
    return float(seen.double().mean())


def window_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count), int64 [count]: a pure function of its arguments, so that a resumed run agrees."""
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(count, generator=generator)


def fingerprint(windows: TextWindows) -> str:
    """sha256 of all token ids, training and held out."""
    digest = hashlib.sha256()
    for part in (windows.train, windows.evaluation):
        digest.update(str(tuple(part.shape)).encode() + part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def documents(config: DataConfig, tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[list[str], int]:
    """The texts of the documents at `path`, in order, without blank ones, and how many were blank."""
    source = path if config.kind == "hub" else resolve(path)
    if isinstance(source, str) and config.kind != "hub":
        fix = "Check the path; relative paths start at the working directory."
        raise UserError(problem(f"data path {path}", "must exist", "no such file or folder", fix))
    if isinstance(source, Path) and config.kind in ("text", "jsonl"):
        entries = _text_entries(source, config) if config.kind == "text" else _jsonl_entries(source, config)
    else:
        entries = _dataset_entries(str(source), config)
    texts = rendered(entries, tokenizer, config.column) if config.chat else _plain(entries, config.column)
    kept = [text for text in texts if text.strip()]
    if not kept:
        got = f"{len(texts)} documents, all blank"
        raise UserError(problem(str(source), "must hold text", got, "Check data.path and data.column."))
    return kept, len(texts) - len(kept)


def split(texts: list[str], config: DataConfig) -> tuple[list[str], list[str]]:
    """Training and held-out documents: the last `eval_fraction` of them, at least one, is held out."""
    held_out = max(1, round(len(texts) * config.eval_fraction))
    if held_out >= len(texts):
        fix = "Give more documents, a smaller data.eval_fraction, or held-out text as data.eval_path."
        got = f"{len(texts)} with eval_fraction={config.eval_fraction}"
        raise UserError(problem(config.path, "needs documents to train on and to hold out", got, fix))
    return texts[:-held_out], texts[-held_out:]


def tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    """Token ids of each text, no special tokens added; a bar on the terminal while it lasts."""
    from rich.console import Console
    from rich.progress import track

    starts = range(0, len(texts), DOCUMENTS_PER_CALL)
    quiet = not sys.stderr.isatty()
    for start in track(starts, "tokenizing", console=Console(stderr=True), disable=quiet, transient=True):
        batch = list(texts[start : start + DOCUMENTS_PER_CALL])
        # verbose=False: documents longer than the model's context are fine, they are cut into windows.
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def pack(ids: Iterable[Sequence[int]], separator: Sequence[int], block: int, limit: int | None) -> Tensor:
    """Join documents with `separator` between them and cut: int64 [n, block], at most `limit` windows, rest dropped."""
    stream = array("q")
    for index, document in enumerate(ids):
        if index:
            stream.extend(separator)
        stream.extend(document)
        if limit is not None and len(stream) >= limit * block:
            break
    count = len(stream) // block if limit is None else min(limit, len(stream) // block)
    return torch.tensor(stream[: count * block], dtype=torch.int64).view(count, block)


def rendered(entries: Iterable[Entry], tokenizer: PreTrainedTokenizerBase, column: str) -> list[str]:
    """Conversations as the text that the tokenizer's chat template makes of them."""
    if not tokenizer.chat_template:
        fix = "Set data.chat=false, or use a model whose tokenizer has a template."
        raise UserError(problem("data.chat", "needs a tokenizer with a chat template", "none", fix))
    texts, problems = [], []
    for place, messages in entries:
        if not _is_conversation(messages):
            fix = "Check data.column, or set data.chat=false."
            problems.append(problem(place, f"'{column}' must be {MESSAGE_FORM}", _brief(messages), fix))
            continue
        try:
            texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
        except Exception as error:  # a template is the model's own program, and raises what it likes
            got = f"{type(error).__name__}: {error}"
            problems.append(problem(place, "the chat template must accept it", got, "Check the roles."))
    _raise_first(problems)
    return texts


def _plain(entries: Iterable[Entry], column: str) -> list[str]:
    texts, problems = [], []
    for place, content in entries:
        if isinstance(content, str):
            texts.append(content)
        else:
            fix = "Name a text column as data.column; conversations need data.chat=true."
            problems.append(problem(place, f"'{column}' must be text", _brief(content), fix))
    _raise_first(problems)
    return texts


def _text_entries(source: Path, config: DataConfig) -> list[Entry]:
    if source.is_file():
        text = _decoded(source, config.encoding_errors)
        return [Entry(str(source), part) for part in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n"))]
    files = [file for file in sorted(source.rglob("*")) if file.suffix in TEXT_SUFFIXES and file.is_file()]
    if not files:
        fix = "Point data.path at a text file or a folder of them; data sets need data.kind=folder."
        raise UserError(problem(str(source), f"must hold files ending in {TEXT_SUFFIXES}", "none", fix))
    return [Entry(str(file), _decoded(file, config.encoding_errors)) for file in files]


def _jsonl_entries(source: Path, config: DataConfig) -> list[Entry]:
    if source.is_dir():
        raise UserError(problem(str(source), "kind=jsonl reads one file", "a folder", "Set data.kind=folder."))
    entries, problems = [], []
    # Not splitlines(), which also cuts at characters that JSON allows inside a string.
    for number, line in enumerate(_decoded(source, config.encoding_errors).split("\n"), start=1):
        place = f"{source}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(problem(place, "must be one JSON object", str(error), "Repair the line."))
            continue
        if not isinstance(row, dict):
            problems.append(problem(place, "must be one JSON object", _brief(row), "Write one {...} a line."))
        elif config.column not in row:
            problems.append(_no_column(place, config.column, list(row)))
        else:
            entries.append(Entry(place, row[config.column]))
    _raise_first(problems)
    return entries


def _dataset_entries(source: str, config: DataConfig) -> list[Entry]:
    """Rows of a hub data set, of one saved by save_to_disk, or of data files in a folder."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder = Path(source)
    try:
        if config.kind == "folder" and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(source)
            if isinstance(found, datasets.DatasetDict):
                if config.split not in found:
                    hint = nearest(config.split, list(found))
                    raise UserError(problem(source, f"must have the split {config.split}", list(found), hint))
                found = found[config.split]
        else:
            found = datasets.load_dataset(source, config.subset, split=config.split)
    except UserError:
        raise
    except Exception as error:  # the library raises its own, pyarrow's, the hub's and plain ones
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        fix = "Check data.path, data.subset and data.split; a hub name needs a connection or a filled cache."
        raise UserError(problem(source, f"must be readable as data.kind={config.kind}", got, fix)) from error
    if config.column not in found.column_names:
        raise UserError(_no_column(source, config.column, found.column_names))
    return [Entry(f"{source} row {row}", content) for row, content in enumerate(found[config.column])]


def _decoded(file: Path, errors: str) -> str:
    """The file as text with \\n line ends, without a byte order mark."""
    try:
        text = file.read_bytes().decode("utf-8", errors)
    except UnicodeDecodeError as error:
        fix = "Convert the file, or set data.encoding_errors=replace or ignore."
        got = f"byte 0x{error.object[error.start]:02x}"
        raise UserError(problem(f"{file}:byte {error.start}", "must be UTF-8", got, fix)) from error
    except OSError as error:
        raise UserError(problem(str(file), "must be readable", str(error), "Check its rights.")) from error
    at = text.find("\0")
    if at >= 0 and errors == "strict":  # UTF-16, or no text at all
        fix = "Convert the file to UTF-8, or set data.encoding_errors=replace or ignore."
        raise UserError(problem(f"{file}:byte {len(text[:at].encode())}", "must be text", "a NUL byte", fix))
    text = text.replace("\0", "" if errors == "ignore" else "\ufffd")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _separator(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if config.join == "none":
        return []
    if config.join == "newline":
        return list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is None:
        fix = "Set data.join=newline or none."
        raise UserError(problem("data.join=eos", "needs a tokenizer with an end token", "none", fix))
    return [tokenizer.eos_token_id]


def _check(config: DataConfig) -> None:
    """What this file assumes of the config; the ranges are told once, here."""
    problems = []
    for name, value, known in (
        ("kind", config.kind, KINDS),
        ("join", config.join, JOINS),
        ("encoding_errors", config.encoding_errors, ("strict", "replace", "ignore")),
    ):
        if value not in known:
            problems.append(problem(f"data.{name}", f"must be one of {known}", value, nearest(value, known)))
    if config.block_size < 2:
        problems.append(problem("data.block_size", "must be at least 2 tokens", config.block_size, "Use 512."))
    if config.eval_tokens < 1:
        problems.append(problem("data.eval_tokens", "must be positive", config.eval_tokens, "Use 16384."))
    if config.eval_path is None and not 0 < config.eval_fraction < 1:
        fix = "Use 0.1, or give data.eval_path."
        problems.append(problem("data.eval_fraction", "must lie between 0 and 1", config.eval_fraction, fix))
    if config.chat and config.kind == "text":
        fix = "Set data.kind=jsonl, hub or folder."
        problems.append(problem("data.chat", "needs a kind with a column of messages", "kind=text", fix))
    if problems:
        raise UserError(*problems)


def _warnings(train: list[str], held_out: list[str], blank: int, share: float) -> Iterable[str]:
    if blank:
        yield f"{blank} blank documents left out"
    seen = set(train)
    both = sum(text in seen for text in held_out)
    if both:
        yield f"{both} of {len(held_out)} held-out documents also stand in the training text, word for word"
    if share > OVERLAP_WARNED:
        yield f"{share:.1%} of the held-out runs of {GRAM} tokens also stand in the training text"


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and "role" in message and "content" in message for message in messages)
    )


def _no_column(place: str, column: str, present: list[str]) -> str:
    fix = f"Set data.column to one of: {', '.join(islice(map(str, present), 20))}."
    return problem(place, f"must have the column '{column}'", "none of that name", fix)


def _brief(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) < 60 else shown[:57] + '...'}"


def _raise_first(problems: list[str]) -> None:
    if len(problems) > PROBLEMS_SHOWN:
        raise UserError(*problems[:PROBLEMS_SHOWN], f"... and {len(problems) - PROBLEMS_SHOWN} more like these")
    if problems:
        raise UserError(*problems)
