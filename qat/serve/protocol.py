"""Requests and answers of the OpenAI API, as far as they are served; plain data, no web framework.

A field that would change the answer and is not served is refused by name; a field set to what it means when absent is
accepted, and so is one that changes no answer.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from qat.errors import UserError, nearest
from qat.serve.generate import encode_chat, encode_text
from qat.serve.sampling import Sampling

COMPLETION_TOKENS = 16  # of /v1/completions when max_tokens is left out, as in OpenAI's reference
# request field -> field of Sampling
SAMPLING = {name: name for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_tokens")}
SAMPLING["max_completion_tokens"] = "max_tokens"
HARMLESS = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
# field -> the values that mean the same as leaving it out
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
NEUTRAL_COMPLETION = {"echo": (False,), "best_of": (1,), "suffix": ("",)}
NEUTRAL_CHAT = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
ROLES = ("system", "developer", "user", "assistant")


class RequestError(Exception):
    """A request that is answered with an error object: status, message, and the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {429: "rate_limit_error", 503: "service_unavailable_error", 401: "authentication_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A checked request: tokens of its prompt, options, and how it wants the answer."""

    prompt: list[int]
    sampling: Sampling
    is_chat: bool
    is_streamed: bool
    has_usage: bool


def parse(body: bytes, is_chat: bool, model: str, tokenizer: Any, positions: int) -> Request:
    """A request from its bytes.

    Raises:
        RequestError: 400 for anything wrong in it, 404 for another model.
    """
    fields = _fields(body)
    if not isinstance(fields.get("model"), str):
        raise RequestError(
            400, f"model: must name the served model, got {fields.get('model')!r}. Use {model}.", "model"
        )
    if fields["model"] != model:
        message = f"model: must be {model}, got {fields['model'][:100]}. See /v1/models."
        raise RequestError(404, message, "model", "model_not_found")
    own = {"model", "stream", "stream_options", "stop", *SAMPLING, "messages" if is_chat else "prompt"}
    if not is_chat:
        own.discard("max_completion_tokens")
    _check_unknown(fields, own, NEUTRAL | (NEUTRAL_CHAT if is_chat else NEUTRAL_COMPLETION))
    is_streamed = _boolean(fields, "stream")
    has_usage = _stream_options(fields, is_streamed)
    try:
        prompt = _chat(fields, tokenizer) if is_chat else _prompt(fields, tokenizer)
        return Request(prompt, _sampling(fields, is_chat, positions - len(prompt)), is_chat, is_streamed, has_usage)
    except UserError as error:
        param = error.problems[0].partition(":")[0]
        raise RequestError(400, str(error), param if param in {*own, "context"} else None) from None


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"body: must be JSON, got {type(error).__name__}: {error}. Send an object.") from None
    if not isinstance(fields, dict):
        raise RequestError(400, f"body: must be a JSON object, got {type(fields).__name__}. Send an object.")
    # null means the same as leaving a field out
    return {name: value for name, value in fields.items() if value is not None}


def _check_unknown(fields: dict[str, Any], own: set[str], neutral: dict[str, tuple[Any, ...]]) -> None:
    for name, value in fields.items():
        if name in own or name in HARMLESS:
            continue
        if name not in neutral:
            hint = nearest(name, sorted(own))
            raise RequestError(400, f"{name[:100]}: is not served, got {str(value)[:100]}. {hint}", name[:100])
        if value not in neutral[name]:
            allowed = " or ".join(json.dumps(one) for one in neutral[name])
            message = f"{name}: only {allowed} is served, got {str(value)[:100]}. Leave it out."
            raise RequestError(400, message, name, "unsupported_value")


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(400, f"{name}: must be true or false, got {str(value)[:100]}. Leave it out.", name)
    return value


def _stream_options(fields: dict[str, Any], is_streamed: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    wrong = not isinstance(options, dict) or set(options) - {"include_usage"}
    if wrong or not isinstance(options.get("include_usage", False), bool):
        message = f"stream_options: must be {{include_usage: true or false}}, got {str(options)[:100]}. Leave it out."
        raise RequestError(400, message, "stream_options")
    if not is_streamed:
        raise RequestError(400, "stream_options: needs stream=true, got false. Leave it out.", "stream_options")
    return options.get("include_usage", False)


def _sampling(fields: dict[str, Any], is_chat: bool, room: int) -> Sampling:
    """Options of a request; a chat may fill the whole context, as in OpenAI's reference, and both draw at 1."""
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        message = "max_tokens: must not stand beside max_completion_tokens, got both. Drop max_tokens."
        raise RequestError(400, message, "max_tokens")
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": max(1, room) if is_chat else COMPLETION_TOKENS}
    options |= {target: fields[name] for name, target in SAMPLING.items() if name in fields}
    stop = fields.get("stop", [])
    if isinstance(stop, list):
        stop = tuple(stop)
    options["stop"] = (stop,) if isinstance(stop, str) else stop
    return Sampling(**options)


def _prompt(fields: dict[str, Any], tokenizer: Any) -> list[int]:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return prompt
    message = f"prompt: must be one text or one list of tokens, got {str(prompt)[:100]}. Send one request per prompt."
    raise RequestError(400, message, "prompt")


def _chat(fields: dict[str, Any], tokenizer: Any) -> list[int]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        given = str(messages)[:100]
        raise RequestError(400, f"messages: must be a list of messages, got {given}. Send at least one.", "messages")
    return encode_chat(tokenizer, [_message(message, i) for i, message in enumerate(messages)])


def _message(message: Any, number: int) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise RequestError(400, f"{where}: must be an object, got {str(message)[:100]}. See OpenAI's API.", where)
    held = {name: value for name, value in message.items() if value is not None and name != "name"}
    if set(held) != {"role", "content"}:
        given = ", ".join(sorted(held))[:100]
        raise RequestError(400, f"{where}: must have role and content, got {given}. Tools are not served.", where)
    if held["role"] not in ROLES:
        given = str(held["role"])[:100]
        raise RequestError(400, f"{where}.role: must be one of {', '.join(ROLES)}, got {given}. Change it.", where)
    role = "system" if held["role"] == "developer" else held["role"]
    return {"role": role, "content": _content(held["content"], where)}


def _content(content: Any, where: str) -> str:
    """The text of a message, given whole or in text parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        message = f"{where}.content: must be text or text parts, got {str(content)[:100]}. Images are not served."
        raise RequestError(400, message, where)
    return "".join(str(text) for text in texts)


class Reply:
    """The objects that answer one request, whole or in chunks."""

    def __init__(self, request: Request, model: str):
        self.request = request
        self._head = {
            "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def usage(self, tokens: int) -> dict[str, int]:
        """Token counts of prompt and answer."""
        count = len(self.request.prompt)
        return {"prompt_tokens": count, "completion_tokens": tokens, "total_tokens": count + tokens}

    def whole(self, text: str, finish: str, tokens: int) -> dict[str, Any]:
        """The answer in one piece."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if self.request.is_chat:
            choice["message"] = {"role": "assistant", "content": text}
            kind = "chat.completion"
        else:
            choice["text"], kind = text, "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": self.usage(tokens)}

    def chunk(self, text: str, finish: str | None = None, is_first: bool = False) -> dict[str, Any]:
        """A piece of a streamed answer."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if self.request.is_chat:
            role = {"role": "assistant"} if is_first else {}
            choice["delta"] = role | ({"content": text} if text or is_first else {})
        else:
            choice["text"] = text
        return self._chunk([choice], None)

    def last_chunk(self, tokens: int) -> dict[str, Any]:
        """The chunk with the token counts, behind all others."""
        return self._chunk([], self.usage(tokens))

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.request.is_chat else "text_completion"
        chunk = {**self._head, "object": kind, "choices": choices}
        return {**chunk, "usage": usage} if self.request.has_usage else chunk
