"""What is seen of a run while it trains: progress, metrics.jsonl lines, layer health, validation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from qat import ranks, signals
from qat.checkpoints import Checkpoint, Checkpoints
from qat.fake_quant import not_observing
from qat.memory import peak_memory_gib
from qat.metrics import Metrics
from qat.nn.quant import quantized_weights, weight_health
from qat.progress import say
from qat.train.module import CausalLMModule
from qat.train.sharding import tables_gathered
from qat.train.state import capture, restore

RISE, RISING_STEPS = 2.0, 3  # a loss that many times its first, so many steps in a row, is worth a word


class MetricsCallback(L.Callback):
    """Writes train, phase and layers lines, and moves the progress bar."""

    def __init__(self, metrics: Metrics, advance: Callable[[str], None], log_every: int, layer_stats_every: int):
        self.metrics, self.advance = metrics, advance
        self.log_every, self.layer_stats_every = log_every, layer_stats_every
        self.step_seconds: list[float] = []
        self._parts: list[dict[str, Tensor]] = []
        self.tokens = 0
        self._tokens, self._step, self._started, self._phase = 0, 0, time.perf_counter(), ""
        self._codes: dict[str, Tensor] = {}
        self._first_scale: dict[str, Tensor] = {}
        self._lr = 0.0
        self._first_loss: float | None = None
        self._above = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        signals.listen()  # Lightning has put its own handlers over ours

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint keeps of this callback: numbers, and tensors by name."""
        numbers = {"tokens": self.tokens, "step_seconds": self.step_seconds, "phase": self._phase, "step": self._step}
        numbers |= {"first_loss": self._first_loss, "above": self._above}
        tensors = {f"{name}.first": scale for name, scale in self._first_scale.items()}
        tensors |= {f"{name}.codes": codes for name, codes in self._codes.items()}
        return numbers, tensors

    def load_state(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The other way round."""
        self.tokens, self.step_seconds = numbers["tokens"], list(numbers["step_seconds"])
        self._phase, self._step = numbers["phase"], numbers["step"]
        self._first_loss, self._above = numbers.get("first_loss"), numbers.get("above", 0)
        for full, tensor in tensors.items():
            name, _, key = full.rpartition(".")
            (self._first_scale if key == "first" else self._codes)[name] = tensor

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self._parts:  # the first batch of a step; what other callbacks did before is not part of it
            self._started = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        # after the step, the schedule has already set the rate of the next one
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._parts.append({key: outputs[key].detach() for key in ("loss", "ce", "kl")})
        self._tokens += batch.numel() * trainer.world_size
        now, step = time.perf_counter(), trainer.global_step
        if step == self._step:
            return
        self.tokens += self._tokens
        seconds = now - self._started
        self.step_seconds.append(seconds)
        self._write_train_line(pl_module, step, seconds)
        if self.layer_stats_every and (step % self.layer_stats_every == 0 or step == 1) and pl_module.schedule:
            self.metrics.write("layers", step, layers=self._layer_lines(pl_module))
        self._parts, self._tokens, self._step = [], 0, step

    def _write_train_line(self, module: CausalLMModule, step: int, seconds: float) -> None:
        phase = module.phase.name if module.phase else "float"
        is_new = phase != self._phase
        if is_new:
            self.metrics.write("phase", step, phase=phase)
            self._phase = phase
        # Lightning divides the loss it returns by the accumulation count; our parts are per batch
        own = torch.stack([torch.stack([p[key].float() for p in self._parts]).mean() for key in ("ce", "kl")])
        mean = dict(zip(("ce", "kl"), ranks.reduced(own, "mean").tolist(), strict=True))
        weights = module.loss_weights
        loss = weights.ce * mean["ce"] + weights.kl * mean["kl"]
        if module.phase and module.phase.quantizing:
            self._watch(step, loss, is_new)
        rate = self._tokens / seconds
        self.advance(f"loss {loss:.4f}  {rate:.0f} tok/s  {phase}")
        if step % self.log_every == 0:
            norm = float(module.grad_norm)
            self.metrics.write(
                "train",
                step,
                phase=phase,
                loss=loss,
                kl=mean["kl"] if weights.kl else None,
                ce=mean["ce"] if weights.ce else None,
                lr=self._lr,
                grad_norm=norm,
                tokens_per_second=rate,
                memory_gib=peak_memory_gib(),
            )

    def _watch(self, step: int, loss: float, is_new: bool) -> None:
        """Say, once in a phase that quantizes, that its loss stays above twice what it began with."""
        if is_new:
            self._first_loss, self._above = loss, 0
        rose = self._first_loss is not None and loss > RISE * self._first_loss
        self._above = self._above + 1 if rose else 0
        if self._above == RISING_STEPS:
            fix = "Lower optim.lr, or delay fake quantization with phases=delayed."
            grew = f"the loss is {loss:.3g}, in the first step of this phase it was {self._first_loss:.3g}"
            say(f"warning: step {step} ({self._phase}): {grew}. {fix}")
            self._first_loss = None

    def _layer_lines(self, module: CausalLMModule) -> dict[str, dict[str, float | None]]:
        lines = {}
        for name, weight, fake_quant in quantized_weights(module.student):
            health = weight_health(weight, fake_quant)
            before, codes = self._codes.get(name), health["codes"]
            first = self._first_scale.setdefault(name, health["scale"])
            same_width = before is not None and before.shape == codes.shape
            flips = float((before != codes).float().mean()) if same_width else None
            drift = float((health["scale"] / first - 1).abs().mean())
            lines[name] = {
                "sqnr_db": health["sqnr_db"],
                "clip_share": health["clip_share"],
                "flip_rate": flips,
                "scale_drift": drift,
            }
            self._codes[name] = codes
        return lines


class ValidationCallback(L.Callback):
    """Held-out perplexity every `every` steps, with the model as it is in that phase."""

    def __init__(self, metrics: Metrics, score: Callable[[torch.nn.Module], float], every: int):
        self.metrics, self.score, self.every = metrics, score, every
        self._done = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._done = trainer.global_step
        # the start, which the end is compared with; FSDP2 deals out parameters in the first training pass, not before
        if self._done == 0 and self.metrics.before == 0 and pl_module.whole_student is None:
            pl_module.enter_phase()
            self._validate(pl_module, 0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._done or step % self.every:
            return
        self._done = step
        self._validate(pl_module, step)

    def _validate(self, pl_module: Any, step: int) -> None:
        pl_module.student.eval()
        with tables_gathered(pl_module.student_loss), not_observing(pl_module.student):
            perplexity = self.score(pl_module.student)
        self.metrics.write("validation", step, perplexity=perplexity)
        pl_module.student.train()


class CheckpointCallback(L.Callback):
    """Puts back the state that a run goes on from, saves every `every` steps, and hears requests to stop.

    Must stand last: what the other callbacks noted at a step belongs to its checkpoint. `per_step` windows, of all
    processes, are seen in a step.
    """

    def __init__(
        self, checkpoints: Checkpoints, every: int, watcher: MetricsCallback, found: Checkpoint | None, per_step: int
    ):
        self.checkpoints, self.every, self.watcher, self.found = checkpoints, every, watcher, found
        self._polled: int = found.facts["step"] if found else 0
        self._windows: int = found.facts["windows"] if found else 0
        self._per_step = per_step

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.found is not None:
            seen = restore(self.found, trainer, pl_module.student)
            self.watcher.load_state(self.found.facts["watcher"], seen)
            self.found = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._polled:
            return
        self._windows += self._per_step
        self._polled = step
        asked = signals.requested()
        if asked:
            say("asked to stop: saving, then leaving (Ctrl-C again leaves at once)")
            trainer.should_stop = True
        if asked or (self.every and step % self.every == 0):
            watched, seen = self.watcher.state()
            pieces, facts = capture(trainer, pl_module.student, seen)
            self.checkpoints.save(step, pieces, facts | {"watcher": watched, "windows": self._windows})
