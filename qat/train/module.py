"""The Lightning module: one training step, two parameter groups, a cosine.

The same module trains the quantized model and the float control; the control has no fake quantizers and no phases.
Losses are in `losses.py`, phases in `phases.py`, the loop around it in `fit.py`.

Letters: B windows, T tokens per window, M = B (T - 1) scored tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from qat.errors import UserError, problem
from qat.fake_quant import FakeQuantize, whole
from qat.models import hidden_and_head
from qat.nn.quant import QuantLinear
from qat.progress import say
from qat.train.losses import LossWeights, Teacher, distillation_loss
from qat.train.low_rank import LowRank
from qat.train.phases import PhaseEntry, PhaseState, apply_phase, state_at
from qat.train.sharding import empty_copy, shard


@dataclass(frozen=True)
class OptimOptions:
    """Learning rates (peak), decay, Adam's betas, and the shape of the schedule over `steps` optimizer steps."""

    lr: float
    scale_lr: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_fraction: float
    final_lr_fraction: float
    grad_clip: float
    steps: int
    kind: str = "adamw"


def choose_trained(model: nn.Module, what: str) -> None:
    """Let gradients flow to what of a model trains, norms and biases always.

    Args:
        what: `all`; `scales`, the integers held, those that the estimator does not learn too; `low_rank`, what
            `low_rank.attach` added, in place of the matrices.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(what == "all" or parameter.dim() < 2)
    for module in model.modules():
        if isinstance(module, LowRank):
            module.requires_grad_(True)
        if isinstance(module, FakeQuantize):
            for shift in module.parameters(recurse=False):
                shift.requires_grad_(what == "scales" or module.estimator.learns_scale)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], options: OptimOptions) -> list[dict[str, Any]]:
    """Of what trains: matrices, vectors (no decay) and learned scales (own rate, no decay), for an optimizer."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        is_scale = name.endswith(("scale_shift", "zero_shift"))
        (scales if is_scale else matrices if parameter.dim() >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "lr": options.lr, "weight_decay": options.weight_decay},
        {"params": vectors, "lr": options.lr, "weight_decay": 0.0},
        {"params": scales, "lr": options.scale_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], options: OptimOptions) -> torch.optim.Optimizer:
    """AdamW, or Adafactor (arXiv:1804.04235) whose rates mean what AdamW's do.

    Adafactor multiplies the rate by max(eps2, size of the parameter); eps2 = 1 keeps it as it is given, also for scale
    shifts, which begin at 0. eps1 keeps rows without a gradient, as of an embedding, from dividing by 0.
    """
    if options.kind == "adafactor":
        return torch.optim.Adafactor(groups, eps=(1e-15, 1.0))
    return torch.optim.AdamW(groups, betas=options.betas, eps=1e-8, fused=True)


def lr_factor(step: int, options: OptimOptions) -> float:
    """Share of the peak rate at a step: warm-up, then a cosine."""
    warmup = round(options.warmup_fraction * options.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, options.steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return options.final_lr_fraction + (1 - options.final_lr_fraction) * cosine


class StudentLoss(nn.Module):
    """The student and its loss in one forward pass, so that distributed wrappers see every use of its parameters.

    Letters: B windows, T tokens per window, M = B (T - 1) scored tokens.
    """

    def __init__(self, student: nn.Module, weights: LossWeights):
        super().__init__()
        self.student, self.weights = student, weights

    def forward(self, ids: Tensor, teacher: Teacher | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, CE and KL of windows [B, T]; the first token of a window is not scored."""
        base, head = hidden_and_head(self.student)
        labels = ids[:, 1:].reshape(-1)
        hidden = base(ids).last_hidden_state[:, :-1].flatten(0, 1)
        if isinstance(head, QuantLinear) and head.input_fake_quant is not None:
            hidden = head.input_fake_quant(hidden)
        weight = head.fake_weight() if isinstance(head, QuantLinear) else head.weight
        return distillation_loss(hidden, weight, head.bias, labels, teacher, self.weights)


class TeacherStates(nn.Module):
    """The float model up to what the loss takes of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Teacher:
        """Hidden states of the scored tokens of windows [B, T], and the head."""
        base, head = hidden_and_head(self.model)
        hidden = base(ids).last_hidden_state[:, :-1].flatten(0, 1)
        return Teacher(hidden, head.weight, head.bias)


class CausalLMModule(L.LightningModule):
    """Trains a Hugging Face causal LM with cross entropy and distillation from its own float weights.

    Args:
        student: the model, with Quant* layers, or float for the control.
        teacher: the float model in eval mode, or None when the loss has no KL term.
        schedule: phases; empty for the control.
        max_skipped: steps in a row that are skipped because their gradient is not finite, before the run ends.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: LossWeights,
        optim: OptimOptions,
        schedule: Sequence[PhaseEntry] = (),
        max_skipped: int = 0,
    ):
        super().__init__()
        self.student_loss = StudentLoss(student, loss)
        # outside the module tree: neither trained, nor saved, nor wrapped by a distributed strategy
        self._teacher = [TeacherStates(teacher)] if teacher is not None and loss.kl > 0 else []
        self.whole_student: list[nn.Module] | None = None
        self.loss_weights, self.optim_options, self.schedule = loss, optim, tuple(schedule)
        self.phase: PhaseState | None = None
        self.max_skipped, self.skipped = max_skipped, 0

    @property
    def student(self) -> nn.Module:
        """The model being trained."""
        return self.student_loss.student

    def configure_model(self) -> None:
        """Under FSDP2: student and teacher dealt out over the processes."""
        mesh = getattr(self, "device_mesh", None)
        if mesh is None or self.whole_student is not None:
            return
        mesh, device = mesh["data_parallel"], self.trainer.strategy.root_device
        self.whole_student = [self.student]  # a list: outside the module tree
        self.student_loss.student = empty_copy(self.student)
        shard(self.student_loss, self.student, mesh, device, self.whole_student[0])
        if self._teacher:
            whole = self._teacher[0]
            self._teacher = [TeacherStates(empty_copy(whole.model))]
            shard(self._teacher[0], self._teacher[0].model, mesh, device, whole.model)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.enter_phase()

    def enter_phase(self) -> None:
        """Bring the student into the phase of the step that comes next."""
        if not self.schedule:
            return
        state = state_at(self.global_step, self.schedule)
        if state != self.phase:
            apply_phase(self.student, state)
            self.phase = state

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        ids = batch
        loss, ce, kl = self.losses(ids)
        return {"loss": loss, "ce": ce, "kl": kl}

    def losses(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, CE and KL of windows [B, T]."""
        return self.student_loss(ids, self._teacher_says(ids) if self._teacher else None)

    @torch.no_grad()
    def _teacher_says(self, ids: Tensor) -> Teacher:
        return self._teacher[0].to(ids.device)(ids)

    def configure_optimizers(self) -> Any:
        """The optimizer over weights, vectors and learned scales (see `parameter_groups`); warm-up, then a cosine."""
        options = self.optim_options
        groups = parameter_groups(self.named_parameters(), options)
        optimizer = make_optimizer(groups, options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, options))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip the global norm, and keep it for the log; a step whose gradient is not finite is skipped.

        The norm is that of all processes, so they skip together; without gradients AdamW leaves everything as it is.
        """
        limit = self.optim_options.grad_clip or math.inf
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if torch.isfinite(self.grad_norm):
            self.skipped = 0
            return
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        where = f"step {self.global_step + 1}"
        if self.skipped > self.max_skipped:
            fix = "Lower optim.lr, or delay fake quantization with phases=delayed; checkpoints so far are kept."
            got = f"NaN or infinity for the {self.skipped}. time in a row"
            raise UserError(problem(where, "loss and gradient must be finite", got, fix), before_work=False)
        say(f"warning: {where}: loss or gradient is not finite; the step is skipped")
