"""Float models in: Hugging Face folders, hub names and .gguf files, checked before anything is trained on them.

A folder holds config.json, safetensors weights and a tokenizer. A .gguf file is turned into such a folder once, in
`$QAT_CACHE` or ~/.cache/qat, under models/<stem>-<first 12 hex digits of its sha256>. Models come back in float32 and
eval mode. Only this file and `data.py` import transformers. Writing packed models is in `formats/`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat.config import ModelConfig
from qat.errors import UserError, problem
from qat.model_files import check_weight_files, refuse_adapter, warn_of_code_fields
from qat.paths import atomic_dir, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
# Config keys that change the logits after (or before) the output head, and the values with which they do not.
LOGIT_KEYS = {
    "final_logit_softcapping": (None, 0),
    "logit_softcapping": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "output_multiplier": (None, 1),
}
# Logits of the model's own forward against head(base(x)): the same float32 products, perhaps in another order.
HEAD_TOLERANCE = 1e-3


def local_source(config: ModelConfig) -> str:
    """The folder or hub name to load from; a .gguf file is converted the first time it is met.

    Raises:
        UserError: nothing has that name, or it is a file of another kind.
    """
    source = resolve(config.path)
    if isinstance(source, str):
        if not HUB_NAME.fullmatch(source) or source.startswith(".") or source.endswith(".gguf"):
            fix = "Give an existing folder, a .gguf file, package:NAME/FILE or a hub name such as owner/name."
            raise UserError(problem("model.path", "must exist", source, fix))
        return source
    if source.is_dir():
        return str(source)
    if source.suffix != ".gguf":
        raise UserError(problem("model.path", "must be a folder or a .gguf file", source, "Name its folder."))
    return str(_converted(source))


def _converted(file: Path) -> Path:
    """The cached folder of the .gguf `file`, converted now when it is not there."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(problem(str(file), "must be a GGUF file", "other content", "Download it again."))
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    cache = Path(os.environ.get("QAT_CACHE") or "~/.cache/qat").expanduser()
    final = cache / "models" / f"{file.stem}-{digest[:12]}"
    if final.is_dir():
        return final
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        fix = "Run: pip install 'qat[gguf]'"
        raise UserError(problem(str(file), "reading GGUF needs gguf and accelerate", f"no {' or '.join(missing)}", fix))
    print(f"converting {file.name} to {final} (once, about half a minute)", file=sys.stderr, flush=True)
    try:
        with atomic_dir(final, overwrite=False) as folder:
            _convert(file, folder)
    except UserError:
        # Another process may have published the same folder meanwhile.
        if not final.is_dir():
            raise
    return final


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _quiet_progress()
    with _explained(str(file)):
        # Without dequantize=True transformers 5 marks the model as quantized and refuses to save it.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    keys = gguf_keys(file)
    tokenizer.model_max_length = keys["context_length"] or model.config.max_position_embeddings
    fix_pre_tokenizer(tokenizer, keys["pre"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gguf_keys(file: Path) -> dict[str, Any]:
    """`pre` (name of the pre-tokenizer) and `context_length` of a GGUF file; None where the file does not say."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def value(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    architecture = value("general.architecture")
    return {"pre": value("tokenizer.ggml.pre"), "context_length": value(f"{architecture}.context_length")}


def fix_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, pre: str | None) -> None:
    """Restore in place what transformers drops from a GGUF tokenizer: smollm splits every digit off."""
    from tokenizers import pre_tokenizers

    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif pre not in (None, "default"):
        log.warning("the GGUF asks for pre-tokenizer '%s'; token ids are those of transformers' reading of it", pre)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token (eos when it has none of its own).

    Raises:
        UserError: there is none, or it has no vocabulary.
    """
    from transformers import AutoTokenizer

    source = local_source(config)
    fix = "Save the tokenizer into the model's folder: tokenizer.save_pretrained(folder)."
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise UserError(problem(source, "must hold a tokenizer", "none of " + ", ".join(TOKENIZER_FILES), fix))
    with _explained(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if len(tokenizer) == 0:
        raise UserError(problem(source, "the tokenizer must have tokens", "an empty vocabulary", fix))
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        log.warning("the tokenizer has no pad token: padding with its end token %s", tokenizer.eos_token)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, hf_config: PretrainedConfig) -> None:
    """Raises UserError when the tokenizer has ids that the model's embedding has no row for."""
    rows = hf_config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        fix = "Use the model's own tokenizer, or resize the embedding before quantizing."
        raise UserError(problem("tokenizer", f"ids must stay below the {rows} embedding rows", len(tokenizer), fix))


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The Hugging Face config of a float model.

    Raises:
        UserError: no config.json, an unknown or unreachable model, remote code, an adapter, or a model that is
            quantized already.
    """
    from transformers import AutoConfig

    source = local_source(config)
    folder = Path(source)
    refuse_adapter(folder)
    if folder.is_dir() and not (folder / "config.json").exists():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        fix = f"Point model.path at {ggufs[0]}." if ggufs else "Give a folder written by save_pretrained."
        raise UserError(problem("model.path", "must hold config.json", f"no {folder / 'config.json'}", fix))
    if folder.is_dir() and not config.trust_remote_code:
        warn_of_code_fields(folder / "config.json")
    with _explained(source):
        hf_config = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    quantized = getattr(hf_config, "quantization_config", None)
    if quantized is not None:
        fields = quantized if isinstance(quantized, dict) else vars(quantized)
        fix = "Start from the float model it was made from."
        got = f"quantization_config with quant_method={fields.get('quant_method')}"
        raise UserError(problem(source, "must be a float model", got, fix))
    return hf_config


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The float32 causal language model in eval mode, on the CPU, every weight read from safetensors and finite.

    Raises:
        UserError: anything `load_config` refuses; weights that are missing, unknown, misshapen, not finite, cut
            short, pickled or outside the folder; an output head that `hidden_and_head` cannot take apart.
    """
    from transformers import AutoModelForCausalLM

    hf_config = load_config(config)
    source = local_source(config)
    if Path(source).is_dir():
        check_weight_files(Path(source))
    _quiet_progress()
    with _explained(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=hf_config,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attention,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the mismatches come back as a list, refused below
        )
    model, info = loaded
    _check_loaded(source, info)
    _check_finite(source, model)
    model.eval()
    _check_head(model)
    return model


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """The model without weights, on the meta device, tied as the real one; needs config.json only."""
    from transformers import AutoModelForCausalLM

    hf_config = load_config(config)
    with _explained(config.path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attention,
            dtype=torch.float32,
        )
    return model.eval()


def meta_from_dict(hf_config: dict[str, Any]) -> PreTrainedModel:
    """The model described by the content of a config.json (our exports'), on the meta device, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in hf_config.items() if key not in ("model_type", "quantization_config", "qat")}
    with _explained("config.json"), torch.device("meta"):
        config = AutoConfig.for_model(hf_config["model_type"], **fields)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def hidden_and_head(model: Any) -> tuple[Any, Any]:
    """The part that ends in hidden states [B, T, K], and the output head: logits = head(base(ids).last_hidden_state).

    Raises:
        UserError: the model does something else with its logits.
    """
    head = model.get_output_embeddings()
    base = model.base_model
    fix = "Losses are taken from the head in pieces; use a model whose logits are the head's output."
    if head is None or base is model:
        wanted = "must have a base model and an output head"
        raise UserError(problem(type(model).__name__, wanted, "one module", fix))
    text = model.config.get_text_config()
    for key, harmless in LOGIT_KEYS.items():
        value = getattr(text, key, None)
        if value not in harmless:
            raise UserError(problem(type(model).__name__, "logits must be the head's output", f"{key}={value}", fix))
    return base, head


def is_tied(model: PreTrainedModel) -> bool:
    """Whether token table and output head are one Parameter."""
    head = model.get_output_embeddings()
    return head is not None and model.get_input_embeddings().weight is head.weight


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Four tokens through the model and through its two parts: some models scale logits under a key of their own."""
    base, head = hidden_and_head(model)
    ids = torch.arange(4)[None] % model.config.get_text_config().vocab_size
    whole = model(input_ids=ids, use_cache=False).logits
    parts = head(base(input_ids=ids, use_cache=False).last_hidden_state)
    gap = (whole - parts).abs().max().item() if whole.shape == parts.shape else float("inf")
    if not gap <= HEAD_TOLERANCE * max(whole.abs().max().item(), 1.0):
        fix = "Use a model whose logits are the head's output."
        raise UserError(problem(type(model).__name__, "logits must be head(hidden states)", f"a gap of {gap:.3g}", fix))


def _check_loaded(source: str, info: dict[str, Any]) -> None:
    problems = []
    missing = sorted(info["missing_keys"])
    if missing:
        got = f"{len(missing)} missing: {', '.join(missing[:10])}"
        problems.append(problem(source, "must hold every weight", got, "Check config.json against the weights."))
    mismatched = sorted(
        f"{name} {list(there)} instead of {list(wanted)}" for name, there, wanted in info["mismatched_keys"]
    )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        got = f"{len(unexpected)} more: {', '.join(unexpected[:10])}"
        problems.append(problem(source, "must hold no weights but the model's", got, "Check config.json."))
    if mismatched:
        got = f"{len(mismatched)} others: {', '.join(mismatched[:10])}"
        problems.append(problem(source, "weights must have the config's shapes", got, "Check config.json."))
    if info.get("error_msgs"):
        problems.append(problem(source, "must load without errors", info["error_msgs"][0], "Save the model again."))
    if problems:
        raise UserError(*problems)


def _check_finite(source: str, model: nn.Module) -> None:
    problems = []
    for name, tensor in model.named_parameters():
        finite = torch.isfinite(tensor)
        if not finite.all():
            at = (~finite).nonzero()[0].tolist()
            got = f"{tensor[tuple(at)].item()} at {at} ({int((~finite).sum())} in all)"
            problems.append(problem(f"{source}: {name}", "weights must be finite", got, "Use another checkpoint."))
    if problems:
        raise UserError(*problems[:10])


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what transformers raises about the user's model into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # the tokenizers library raises plain exceptions; others are no fault of the files
        if not isinstance(error, (OSError, ValueError, ImportError, KeyError)) and type(error) is not Exception:
            raise
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            wanted = "needs Python code that comes with the model"
            fix = "Read that code, for it can do anything you can; then set model.trust_remote_code=true."
            raise UserError(problem(source, wanted, "model.trust_remote_code=false", fix)) from error
        if isinstance(error, OSError) and not Path(source).exists():
            wanted = "must be a folder here or a model on the hub"
            fix = "Check the name and the connection (HF_HUB_OFFLINE unset), or give a folder you downloaded."
            raise UserError(problem(f"model.path={source}", wanted, text[:200], fix)) from error
        fix = "Check config.json and the installed transformers version."
        raise UserError(problem(source, "must load as a causal language model", text[:300], fix)) from error


def _quiet_progress() -> None:
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
