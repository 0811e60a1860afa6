"""The chunked loss equals the textbook one in value and gradients, and never holds the logits of a batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import BFLOAT16_LOSS, FLOAT32_LOSS
from torch.utils._python_dispatch import TorchDispatchMode

from qat.train.losses import LossWeights, Teacher, distillation_loss

# Letters: M scored tokens, H hidden size, V vocabulary.
M, H, V = 13, 8, 37
FLOAT32, BFLOAT16 = FLOAT32_LOSS, BFLOAT16_LOSS


def inputs(seed: int = 0, bias: bool = True):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, H, generator=g, requires_grad=True)
    head = torch.randn(V, H, generator=g, requires_grad=True)
    offset = torch.randn(V, generator=g, requires_grad=True) if bias else None
    labels = torch.randint(0, V, (M,), generator=g)
    near = [t.detach() + 0.3 * torch.randn(t.shape, generator=g) for t in (hidden, head)]
    return hidden, head, offset, labels, Teacher(near[0], near[1], offset.detach() * 0.9 if bias else None)


def textbook(hidden, head, bias, labels, teacher, weights):
    """The formula of the module, with all logits at once."""
    logits = F.linear(hidden, head, bias)
    ce = F.cross_entropy(logits, labels)
    t = weights.temperature
    theirs = F.linear(teacher.hidden, teacher.head, teacher.bias)
    kl = t**2 * F.kl_div(
        (logits / t).log_softmax(-1), (theirs / t).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    shares = (theirs / t).softmax(-1), (logits / t).softmax(-1)
    term = kl if weights.beta == 0 else t**2 * jensen_shannon(*shares, weights.beta)
    return weights.ce * ce + weights.kl * term, ce, term


def jensen_shannon(teacher, student, beta):
    middle = beta * teacher + (1 - beta) * student
    kl = [(p * (p / middle).log()).sum(-1).mean() for p in (teacher, student)]
    return beta * kl[0] + (1 - beta) * kl[1]


TERMS = {
    "kl": {"kl": 1.0, "ce": 0.0},
    "ce": {"kl": 0.0, "ce": 1.0},
    "both": {"kl": 0.3, "ce": 0.7},
    "temperature": {"kl": 0.5, "ce": 0.5, "temperature": 2.0},
    "cold": {"kl": 1.0, "ce": 0.0, "temperature": 0.5},
    "jsd": {"kl": 1.0, "ce": 0.0, "beta": 0.5},
    "jsd with text": {"kl": 0.5, "ce": 0.5, "temperature": 2.0, "beta": 0.1},
}


@pytest.mark.parametrize("chunk", [1, 7, M, 1000])
@pytest.mark.parametrize("terms", TERMS)
def test_loss_and_gradients_equal_the_textbook(terms, chunk):
    weights = LossWeights(**TERMS[terms], chunk=chunk)
    hidden, head, bias, labels, teacher = inputs()
    loss, ce, kl = distillation_loss(hidden, head, bias, labels, teacher if weights.kl else None, weights)
    # a factor as Lightning puts before backward when it accumulates
    (loss * 0.25).backward()
    ours = [hidden.grad, head.grad, bias.grad]
    hidden, head, bias, labels, teacher = inputs()
    wanted, wanted_ce, wanted_kl = textbook(hidden, head, bias, labels, teacher, weights)
    (wanted * 0.25).backward()
    torch.testing.assert_close(loss, wanted, **FLOAT32)
    torch.testing.assert_close(ce, wanted_ce if weights.ce else torch.tensor(0.0), **FLOAT32)
    torch.testing.assert_close(kl, wanted_kl if weights.kl else torch.tensor(0.0), **FLOAT32)
    for mine, theirs in zip(ours, [hidden.grad, head.grad, bias.grad], strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, **FLOAT32)


def test_loss_without_bias_and_with_a_fixed_head_gives_the_hidden_gradient_alone():
    weights = LossWeights(kl=1.0, ce=0.5, chunk=5)
    hidden, head, _, labels, teacher = inputs(bias=False)
    distillation_loss(hidden, head.detach(), None, labels, teacher, weights)[0].backward()
    ours = hidden.grad
    hidden, _, _, _, _ = inputs(bias=False)
    textbook(hidden, head, None, labels, teacher, weights)[0].backward()
    torch.testing.assert_close(ours, hidden.grad, **FLOAT32)


def test_kl_of_a_model_to_itself_is_zero_with_zero_gradients():
    hidden, head, bias, labels, _ = inputs()
    itself = Teacher(hidden.detach(), head.detach(), bias.detach())
    loss, _, _ = distillation_loss(hidden, head, bias, labels, itself, LossWeights(chunk=4))
    loss.backward()
    assert loss.abs() < 1e-6
    assert max(t.grad.abs().max() for t in (hidden, head, bias)) < 1e-6


def test_logged_means_carry_no_gradient():
    hidden, head, bias, labels, teacher = inputs()
    _, ce, kl = distillation_loss(hidden, head, bias, labels, teacher, LossWeights(kl=1.0, ce=1.0))
    assert not ce.requires_grad
    assert not kl.requires_grad


def test_loss_is_finite_and_right_for_extreme_logits():
    weights = LossWeights(kl=1.0, ce=1.0, chunk=5)
    hidden, head, bias, labels, teacher = inputs()
    hidden.data *= 300
    loss, _, _ = distillation_loss(hidden, head, bias, labels, teacher, weights)
    torch.testing.assert_close(loss, textbook(hidden, head, bias, labels, teacher, weights)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_under_bf16_autocast_is_close_and_keeps_gradient_dtypes(chunk):
    weights = LossWeights(kl=0.5, ce=0.5, chunk=chunk)
    hidden, head, bias, labels, teacher = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = distillation_loss(hidden, head, bias, labels, teacher, weights)
    loss.backward()
    ours = [hidden.grad, head.grad, bias.grad]
    assert {t.dtype for t in (loss, *ours)} == {torch.float32}
    hidden, head, bias, labels, teacher = inputs()
    wanted = textbook(hidden, head, bias, labels, teacher, weights)[0]
    wanted.backward()
    torch.testing.assert_close(loss, wanted, **BFLOAT16)
    for mine, theirs in zip(ours, [hidden.grad, head.grad, bias.grad], strict=True):
        torch.testing.assert_close(mine, theirs, **BFLOAT16)
    assert not torch.equal(ours[1], head.grad), "autocast must have had an effect for this test to say something"


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_has_the_size_of_all_logits(autocast):
    tokens, hidden_size, vocabulary, chunk = 512, 4, 256, 8
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    head = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    teacher = Teacher(torch.randn(tokens, hidden_size), torch.randn(vocabulary, hidden_size))
    with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _, _ = distillation_loss(hidden, head, None, labels, teacher, LossWeights(kl=1.0, ce=1.0, chunk=chunk))
        loss.backward()
    assert largest.elements == max(chunk * vocabulary, tokens * hidden_size)
    with Largest() as largest:
        textbook(hidden, head, None, labels, teacher, LossWeights())
    assert largest.elements == tokens * vocabulary, "the measure sees logits where there are some"
