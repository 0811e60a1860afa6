"""Perplexity, and how far a model's predictions are from the float model's, on held-out windows.

Protocol: windows do not overlap, the first token of a window is not scored, no BOS; see `qat/data.py`. All models of a
table are scored by this one function in the same arithmetic: logits of a chunk at a time through the model's own head,
log-softmax in float32.

Letters: B windows, T tokens per window, M scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.models import hidden_and_head
from qat.progress import track

CHUNK = 512


@dataclass(frozen=True)
class Score:
    """perplexity = exp(mean negative log-likelihood); the rest is against a reference model, `kl` in nats."""

    perplexity: float
    tokens: int
    kl: float | None = None
    top1: float | None = None
    max_difference: float | None = None
    reference_perplexity: float | None = None


@torch.no_grad()
def score(
    model: nn.Module,
    windows: Tensor,
    batch_size: int,
    precision: str,
    reference: nn.Module | None = None,
    title: str = "evaluate",
) -> Score:
    """Score windows [B, T] with `model`; with a `reference` also the reference itself, mean KL(reference || model),
    top-1 agreement and the largest difference of a logit."""
    model.eval()
    nll = reference_nll = kl = agree = largest = 0.0
    tokens = 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in track(windows.split(batch_size), title):
        batch = batch.to(device)
        labels = batch[:, 1:].reshape(-1)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            hidden = _hidden(model, batch)
            wanted = None if reference is None else _hidden(reference, batch)
            for start in range(0, labels.numel(), CHUNK):
                rows = slice(start, start + CHUNK)
                logits = _logits(model, hidden[rows])
                log_p = logits.log_softmax(-1)
                nll -= float(log_p.gather(-1, labels[rows, None]).double().sum())
                if wanted is not None and reference is not None:
                    their_logits = _logits(reference, wanted[rows])
                    log_t = their_logits.log_softmax(-1)
                    reference_nll -= float(log_t.gather(-1, labels[rows, None]).double().sum())
                    kl += float((log_t.exp() * (log_t - log_p)).double().sum())
                    agree += float((log_t.argmax(-1) == log_p.argmax(-1)).sum())
                    largest = max(largest, float((their_logits - logits).abs().max()))
        tokens += labels.numel()
    perplexity = math.exp(min(nll / tokens, 700.0))
    if reference is None:
        return Score(perplexity, tokens)
    theirs = math.exp(min(reference_nll / tokens, 700.0))
    return Score(perplexity, tokens, kl / tokens, agree / tokens, largest, theirs)


def _hidden(model: nn.Module, ids: Tensor) -> Tensor:
    base, _ = hidden_and_head(model)
    return base(ids).last_hidden_state[:, :-1].flatten(0, 1)


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    _, head = hidden_and_head(model)
    return head(hidden).float()


def recovery(packed: float, control: float, rtn_of_control: float) -> float | None:
    """1 - ln(packed / control) / ln(rtn_of_control / control): the share of the quantization loss won back.

    None when round-to-nearest loses less than 0.1 % of perplexity: there is nothing to win back but noise.
    """
    gap = math.log(rtn_of_control / control)
    return None if gap <= 1e-3 else 1 - math.log(packed / control) / gap
