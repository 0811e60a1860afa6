"""Configuration files and values that no editor should make and some do: refused by file and line, or read rightly."""

from __future__ import annotations

import pytest

from qat.cli.compose import compose_run, from_yaml
from qat.errors import UserError

PATHS = ["model.path=m", "data.path=d"]
FILES = {
    "tab": (b"name: x\n\ttrainer: {max_steps: 3}\n", r"tab.yaml:2: must be YAML, got found character '\\t'"),
    "duplicate": (b"name: x\nseed: 1\nseed: 2\n", r"duplicate.yaml:3: must be YAML, got found duplicate key seed"),
    "duplicate-inside": (b"trainer:\n  max_steps: 1\n  max_steps: 2\n", r"inside.yaml:3: .*duplicate key max_steps"),
    "latin": (b"# caf\xe9\nname: x\n", r"latin.yaml:1: must be UTF-8, got byte 0xe9. Save it as UTF-8"),
    "latin-later": (b"seed: 1\nname: caf\xe9\n", r"latin-later.yaml:2: must be UTF-8"),
    "utf16": ("name: x\n".encode("utf-16"), r"utf16.yaml:1: must be UTF-8, got byte 0xff"),
    "nul": (b"name: x\0y\n", r"nul.yaml: must be YAML, got special characters are not allowed"),
    "bell": (b"name: x\x07\n", r"bell.yaml: must be YAML, got special characters are not allowed"),
    "empty": (b"", r"empty.yaml: must hold key: value lines, got nothing"),
    "comment": (b"# nothing here\n", r"comment.yaml: must hold key: value lines, got nothing"),
    "word": (b"hello\n", r"word.yaml: hello: must be a setting"),
    "number": (b"3\n", r"number.yaml: must be a readable YAML file, got .*int"),
    "deep": (b"name: " + b"[" * 3000 + b"\n", r"deep.yaml: must be YAML, got too many levels"),
    "object": (b"name: !!python/object/apply:os.system [true]\n", r"object.yaml:1: .*not determine a constructor"),
    "target": (b"_target_: os.system\n", r"target.yaml: _target_: must be a setting.*no object is built"),
    "cycle": (b"name: ${runs_dir}\nruns_dir: ${name}\n", r"name: must resolve, got 'Recursive interpolation"),
    "nowhere": (b"name: ${optim.rate}\n", r"name: must resolve, got 'Interpolation key 'optim.rate' not found'"),
    "unset": (b"trainer: null\n", r"unset.yaml: trainer: must be a group of settings, got 'None'"),
}


@pytest.mark.parametrize("name", FILES)
def test_recipe_file_is_refused_with_its_place(tmp_path, name):
    content, match = FILES[name]
    file = tmp_path / f"{name}.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        compose_run([*PATHS, f"recipe={file}"])
    assert caught.value.before_work and len(caught.value.problems) == 1


def test_byte_order_mark_of_a_file_is_no_part_of_it(tmp_path):
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbfname: mine\r\nseed: 3\r\n")
    run = compose_run([*PATHS, f"recipe={tmp_path / 'windows.yaml'}"])
    assert (run.name, run.seed) == ("mine", 3)


def test_empty_file_is_no_whole_run(tmp_path):
    (tmp_path / "resolved.yaml").write_text("")
    with pytest.raises(UserError, match=r"resolved.yaml: must hold key: value lines, got nothing"):
        from_yaml(tmp_path / "resolved.yaml")


VALUES = {
    "optim.lr=1e-4x": r"^optim.lr: must be a number, got '1e-4x'",
    "scheme.weight.bits=four": r"^scheme.weight.bits: must be a whole number, got 'four'",
    "scheme.weight.bits=1": r"^scheme.weight.bits: must be a whole number from 2 to 8, got 1",
    "scheme.weight.bits=99999999999999999999": r"^scheme.weight.bits: must be a whole number from 2 to 8",
    "trainer.max_steps=-5": r"^trainer.max_steps: must be at least 0, got -5",
    "optim.lr=0": r"^optim.lr: must be finite and above 0, got 0",
    "optim.lr=-1e-4": r"^optim.lr: must be finite and above 0, got -0.0001",
    "optim.lr=inf": r"^optim.lr: must be finite and above 0, got inf",
    "optim.lr=nan": r"^optim.lr: must be finite and above 0, got nan",
    "seed=99999999999": r"^seed: must be at most 2147483647, got 99999999999",
    "scheme.weight.group_size=0": r"^scheme.weight.group_size: .*needs a positive size, got 0",
    "scheme.weight.group_size=-1": r"^scheme.weight.group_size: .*needs a positive size, got -1",
    "model=???": r"^model: must be a file in conf/model, got '\?\?\?'. Known: ",
    "model.path=???": r"^model.path: must be given, got nothing. Add model.path=VALUE",
    "model.path=": r"^model.path: must be ",
    "data.path=' '": r"^data.path: must be a path or a name, got nothing",
    "name=${name}": r"^name: must resolve, got 'Recursive interpolation detected'",
    "name=..": r"^name: must be a plain folder name, got '\.\.'",
}


@pytest.mark.parametrize("word", VALUES)
def test_value_is_refused_with_what_is_allowed(word):
    with pytest.raises(UserError, match=VALUES[word]) as caught:
        compose_run(["scheme=w4a16_g32", *(path for path in PATHS if path.split("=")[0] not in word), word])
    assert caught.value.before_work


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_any_width_from_two_to_eight_is_a_scheme(bits):
    assert compose_run([*PATHS, "scheme=w4a16_g32", f"scheme.weight.bits={bits}"]).scheme.weight.bits == bits
