"""Cross entropy and distillation from hidden states, a chunk of tokens at a time.

    loss = (ce * CE(labels, student) + kl * T^2 * D(teacher, student)) averaged over the scored tokens

D is forward KL(teacher || student), or with 0 < beta < 1 the generalized Jensen-Shannon divergence
beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student (GKD, arXiv:2306.13649).

The vocabulary is large (49k for SmolLM2, 128k for Llama 3): whole-batch float32 logits of student and teacher would be
the largest tensors of the step. Here logits exist for `chunk` tokens at a time, and their gradient, which has a closed
form (softmax minus target), is turned into gradients of the hidden states and of the head on the spot, so nothing is
kept for backward or computed twice.
Source: forward KL from the model's own float weights as in LLM-QAT (arXiv:2305.17888).

Letters: M scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weights of the two terms, the temperature of the second, the tokens per chunk, and beta of the second (0: KL)."""

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0
    chunk: int = 256
    beta: float = 0.0


@dataclass(frozen=True)
class Teacher:
    """What the float model says: hidden states [M, H] and head weight [V, H]; no gradients."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None = None


def distillation_loss(
    hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor, teacher: Teacher | None, weights: LossWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a batch, with gradients to `hidden` [M, H], `head` [V, H] and `bias` [V].

    Args:
        labels: [M] next tokens; every row is scored.
        teacher: None when weights.kl is 0.
    Returns:
        loss, and the plain means of CE and T^2 D for the log (no gradient; 0 where the term is off).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        # cast once, not once per chunk
        head = head.to(torch.get_autocast_dtype(hidden.device.type))
    return _ChunkedLoss.apply(hidden, head, bias, labels, teacher, weights)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, labels, teacher, weights):
        count = hidden.shape[0]
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        ce_sum = kl_sum = torch.zeros((), device=hidden.device)
        dtype = head.dtype
        for start in range(0, count, weights.chunk):
            rows = slice(start, start + weights.chunk)
            h = hidden[rows].to(dtype)
            logits = torch.nn.functional.linear(h, head, bias).float()
            teacher_logits = None if teacher is None else _teacher_logits(teacher, rows)
            d_logits, ce, kl = _chunk_gradient(logits, labels[rows], teacher_logits, weights)
            ce_sum, kl_sum = ce_sum + ce, kl_sum + kl
            d_logits = d_logits.div_(count)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(dtype)
            d_hidden[rows] = d_logits @ head
            if d_head is not None:
                d_head += d_logits.t() @ h
        ctx.save_for_backward(d_hidden, d_head, d_bias)
        ctx.dtypes = (head.dtype, None if bias is None else bias.dtype)
        ce_mean, kl_mean = ce_sum / count, kl_sum / count
        loss = weights.ce * ce_mean + weights.kl * kl_mean
        ctx.mark_non_differentiable(ce_mean, kl_mean)
        return loss, ce_mean, kl_mean

    @staticmethod
    def backward(ctx, grad, _ce, _kl):
        d_hidden, d_head, d_bias = ctx.saved_tensors
        head_dtype, bias_dtype = ctx.dtypes
        d_head = None if d_head is None else (d_head * grad).to(head_dtype)
        d_bias = None if d_bias is None else (d_bias * grad).to(bias_dtype)
        return d_hidden * grad, d_head, d_bias, None, None, None


def _teacher_logits(teacher: Teacher, rows: slice) -> Tensor:
    hidden = teacher.hidden[rows].to(teacher.head.dtype)
    return torch.nn.functional.linear(hidden, teacher.head, teacher.bias).float()


def _chunk_gradient(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, weights: LossWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the chunk's summed loss by its logits [m, V] float32, and the summed CE and T^2 D."""
    zero = torch.zeros((), device=logits.device)
    gradient, ce, kl = None, zero, zero
    if weights.ce > 0 or teacher_logits is None:
        log_p = logits.log_softmax(-1)
        ce = -log_p.gather(-1, labels[:, None]).sum()
        gradient = log_p.exp_()
        gradient.scatter_add_(-1, labels[:, None], torch.full_like(labels[:, None], -1, dtype=gradient.dtype))
        gradient.mul_(weights.ce)
    if teacher_logits is not None and weights.kl > 0:
        temperature = weights.temperature
        log_t = (teacher_logits / temperature).log_softmax(-1)
        log_s = (logits / temperature).log_softmax(-1)
        d_kl, kl = _jensen_shannon(log_t, log_s, weights.beta) if weights.beta else _forward_kl(log_t, log_s)
        d_kl.mul_(weights.kl * temperature)
        kl = kl * temperature**2
        gradient = d_kl if gradient is None else gradient.add_(d_kl)
    assert gradient is not None
    return gradient, ce, kl


def _forward_kl(log_t: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the summed KL by the student's logits [m, V], and that sum; the arguments are overwritten."""
    p_t = log_t.exp()
    kl = (p_t * log_t.sub_(log_s)).sum()
    return log_s.exp_().sub_(p_t), kl


def _jensen_shannon(log_t: Tensor, log_s: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Gradient of the summed divergence by the student's logits [m, V], and that sum.

    With s the student's probabilities and g = (1 - beta) log(s / m), the gradient is s (g - sum of s g).
    """
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
    p_t, p_s = log_t.exp(), log_s.exp()
    g = (log_s - log_m).mul_(1 - beta)
    mean = (p_s * g).sum(-1, keepdim=True)
    term = (p_t * (log_t - log_m)).sum() * beta + mean.sum()
    return p_s.mul_(g.sub_(mean)), term
