"""One decoder block at a time: its weights, scales and norm gains against what the float block says.

    y = block_float(x_float),   loss = |block(x) - y|^2 / mean |y|^2,   x from the quantized blocks before it

The float block sees the float stream, the trained one the stream of the blocks already done, so it also learns to undo
their error. Two streams [n, T, H] are all the activations there are: each block's outputs take the place of its inputs.
Every process holds every `world`-th window and gradients are averaged, so all end with the same weights. An eighth of
the windows is held out; a block keeps the weights that did best on them, those it began with included.
A checkpoint stands between two blocks. The streams are computed again from it, which costs forward passes only.
Source: Block-AP of EfficientQAT (arXiv:2407.11062, sec. 3.2).

Letters: n windows, B of them in a batch, T tokens of a window, H hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat import ranks, signals
from qat.checkpoints import Checkpoints
from qat.data import window_order
from qat.errors import UserError, problem
from qat.fake_quant import FakeQuantize
from qat.metrics import Metrics
from qat.models import hidden_and_head
from qat.progress import bar, say
from qat.train.fit import FitResult
from qat.train.module import OptimOptions, choose_trained, lr_factor, make_optimizer, parameter_groups
from qat.train.sharding import decoder_blocks
from qat.train.state import model_pieces, own_pieces, restore_model

HELD_OUT = 8  # one window in so many
LOOKS = 8  # at the held-out windows, in the course of a block
SAME = 1e-3  # largest squared error, as a share of the power, of blocks called alone: some models round between them


@dataclass(frozen=True)
class BlockOptions:
    """Where and on how much to train; `windows` counts those of all processes, `batch_size` those of one."""

    accelerator: str = "cpu"
    precision: str = "bf16"
    batch_size: int = 2
    windows: int = 128
    checkpoint_every: int = 0
    max_skipped_steps: int = 5
    seed: int = 0


def fit_blocks(
    student: nn.Module,
    floating: nn.Module,
    windows: Tensor,
    optim: OptimOptions,
    options: BlockOptions,
    metrics: Metrics,
    checkpoints: Checkpoints | None = None,
    title: str = "blocks",
) -> FitResult:
    """Train every decoder block of `student` for `optim.steps` steps on the first of windows [n, T].

    Args:
        floating: the model as it was before quantization, of the same structure.
        checkpoints: where to save between blocks, and to go on from; None neither saves nor resumes.

    Raises:
        UserError: too few windows, or a gradient that is not finite too often.
        signals.Stopped: the run was asked to stop; with `checkpoints`, the blocks done are saved.
    """
    floating.eval()
    student.eval()  # as it is served: dropout would be noise against a target without it
    choose_trained(student, "all")
    count = len(decoder_blocks(student))
    mine = _own_windows(windows, options)
    found, skipped = checkpoints.newest() if checkpoints else (None, [])
    for line in skipped:
        say(f"warning: {line}")
    done, seconds = 0, []
    if found is not None:
        restore_model(found, student)
        done, seconds = found.facts["step"], list(found.facts["step_seconds"])
    metrics.truncate(done * optim.steps)
    run = _Run(optim, options, metrics, _device(options), count)
    saved = done
    with _on(student, run.device), _on(floating, run.device):
        streams, (own, targets) = _prepare(student, floating, mine, run)
    with bar(title, count * optim.steps, done * optim.steps) as advance:
        for block, target in zip(own, targets, strict=True):
            with _on(block.module, run.device), _on(target.module, run.device):
                target.advance(streams.floating)
                asked = block.place >= done and _train_block(block, streams, seconds, advance)
                if not asked:
                    block.advance(streams.quantized)
            at = block.place if asked else block.place + 1
            due = options.checkpoint_every and (at - saved) * optim.steps >= options.checkpoint_every
            if checkpoints is not None and (asked or (due and done < at < len(own))):
                _save(checkpoints, at, student, seconds)
                saved = at
            if asked:
                signals.poll()
    # a token counts once, whatever the number of blocks it went through
    tokens = optim.steps * options.batch_size * windows.shape[1] * ranks.world()
    return FitResult(student.eval(), len(own) * optim.steps, tokens, seconds)


@dataclass(frozen=True)
class _Run:
    optim: OptimOptions
    options: BlockOptions
    metrics: Metrics
    device: torch.device
    blocks: int

    def autocast(self) -> Any:
        """bf16 matmuls on float32 weights, as everywhere in training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")


@dataclass
class _Streams:
    """What flows between the blocks, on the CPU [n, T, H], the first `held_out` windows held out."""

    quantized: Tensor
    floating: Tensor
    held_out: int


@dataclass(frozen=True)
class _Block:
    """A block with what its model gives it besides hidden states, for a batch of B windows without padding."""

    place: int
    module: nn.Module
    rest: tuple[Any, ...]
    named: dict[str, Any]
    run: _Run

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [B, T, H] for x [B, T, H], float32."""
        with self.run.autocast():
            out = self.module(x.to(self.run.device), *self.rest, **self.named)
        return (out[0] if isinstance(out, tuple) else out).float()

    @torch.no_grad()
    def advance(self, stream: Tensor) -> None:
        """A stream [n, T, H] becomes what the block makes of it."""
        for part in stream.split(self.run.options.batch_size):
            part.copy_(self(part))


def _train_block(block: _Block, streams: _Streams, seconds: list[float], advance: Callable[[str], None]) -> bool:
    """Train a block; its times are added to `seconds`. Whether it was asked to stop: then it is as it began."""
    run, place = block.run, block.place
    optim, size = run.optim, run.options.batch_size
    named = [(name, parameter) for name, parameter in block.module.named_parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameter_groups(named, optim), optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, optim))
    power = float(ranks.reduced(streams.floating.square().mean().to(run.device), "mean"))
    first = best = _held_out_error(block, streams, power)
    begun = kept = _values(named)
    best_step, bad = 0, 0
    batches = _batches(len(streams.quantized) - streams.held_out, size, run.options.seed + place)
    times: list[float] = []
    for step in range(1, optim.steps + 1):
        started = time.perf_counter()
        rows = next(batches) + streams.held_out
        error = block(streams.quantized[rows]) - streams.floating[rows].to(run.device)
        loss = error.square().mean() / power
        loss.backward()
        norm = _average_and_clip([parameter for _, parameter in named], optim.grad_clip)
        if math.isfinite(norm):
            optimizer.step()
            bad = 0
        else:
            bad += 1
            _warn_or_end(place, step, bad, run.options.max_skipped_steps)
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step == optim.steps or step % max(1, optim.steps // LOOKS) == 0:
            now = _held_out_error(block, streams, power)
            if now < best:
                best, best_step, kept = now, step, _values(named)
        times.append(time.perf_counter() - started)
        advance(f"block {place + 1}/{run.blocks}  error {float(loss.detach()):.5f}")
        if signals.requested():
            say("asked to stop: saving the blocks that are done, then leaving (Ctrl-C again leaves at once)")
            _put_back(block.module, named, begun)
            return True
    _put_back(block.module, named, kept)
    seconds += times
    run.metrics.write(
        "block", (place + 1) * optim.steps, block=place, error_before=first, error_after=best,
        best_step=best_step, seconds=sum(times),
    )  # fmt: skip
    return False


def _warn_or_end(place: int, step: int, bad: int, allowed: int) -> None:
    where = f"block {place}, step {step}"
    if bad > allowed:
        fix = "Lower lr of the blockwise stage; the blocks before are kept."
        got = f"NaN or infinity for the {bad}. time in a row"
        raise UserError(problem(where, "loss and gradient must be finite", got, fix), before_work=False)
    say(f"warning: {where}: loss or gradient is not finite; the step is skipped")


def _average_and_clip(parameters: list[nn.Parameter], limit: float) -> float:
    """Gradients averaged over the processes and clipped; returns their norm, the same on all."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    if ranks.is_connected():
        flat = ranks.reduced(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        parts = flat.split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view(parameter.shape)
    return float(torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf))


@torch.no_grad()
def _held_out_error(block: _Block, streams: _Streams, power: float) -> float:
    """Mean squared error over the held-out windows of all processes, as a share of the target's power."""
    size = block.run.options.batch_size
    total = torch.zeros((), dtype=torch.float64, device=block.run.device)
    held_out = (stream[: streams.held_out].split(size) for stream in (streams.quantized, streams.floating))
    for x, wanted in zip(*held_out, strict=True):
        total += (block(x) - wanted.to(total.device)).square().mean(dtype=torch.float64) * size
    return float(ranks.reduced(total / streams.held_out, "mean")) / power


def _values(named: list[tuple[str, nn.Parameter]]) -> list[Tensor]:
    return [parameter.detach().clone() for _, parameter in named]


@torch.no_grad()
def _put_back(block: nn.Module, named: list[tuple[str, nn.Parameter]], values: list[Tensor]) -> None:
    for (_, parameter), value in zip(named, values, strict=True):
        parameter.copy_(value)
    for module in block.modules():
        if isinstance(module, FakeQuantize):
            module.state_changed()


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of full batches, int64 [size], without end; a pure function of the seed."""
    epoch = 0
    while True:
        order = window_order(count, seed, epoch)
        yield from order[: count - count % size].split(size)
        epoch += 1


def _own_windows(windows: Tensor, options: BlockOptions) -> Tensor:
    """This process's share [n, T] of the first windows: whole batches, the held-out ones first."""
    batch, world = options.batch_size, ranks.world()
    count = min(options.windows, len(windows)) // (world * batch) * batch
    if count < 2 * batch:
        fix = "Give the blockwise stage more windows, or lower trainer.batch_size."
        wanted = f"needs {2 * world * batch} windows, two batches for every process"
        raise UserError(problem("stages", wanted, min(options.windows, len(windows)), fix))
    return windows[ranks.rank() :: world][:count]


def _held_out(count: int, batch: int) -> int:
    """One window in HELD_OUT, in whole batches and at least one."""
    return max(batch, count // HELD_OUT // batch * batch)


def _device(options: BlockOptions) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if options.accelerator == "gpu" else torch.device("cpu")


@contextmanager
def _on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """While it works, a module stands on the device; parameters stay the same objects."""
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")


class _Seen(Exception):
    """What was to be seen of a forward pass has been seen."""


@torch.no_grad()
def _prepare(
    student: nn.Module, floating: nn.Module, windows: Tensor, run: _Run
) -> tuple[_Streams, list[list[_Block]]]:
    """What the first block gets of windows [n, T] in both models, and the blocks of both, ready to be called."""
    batches = windows.split(run.options.batch_size)
    blocks = [_blocks(model, batches[0], run) for model in (student, floating)]
    quantized, plain = (torch.cat([_into_first(model, ids, run) for ids in batches]) for model in (student, floating))
    _check_blocks(floating, blocks[1], batches[1], plain[len(batches[0]) : 2 * len(batches[0])])
    return _Streams(quantized, plain, _held_out(len(windows), run.options.batch_size)), blocks


def _blocks(model: nn.Module, ids: Tensor, run: _Run) -> list[_Block]:
    """The blocks with what they are given besides hidden states in a forward pass of ids [B, T]."""
    blocks: list[_Block] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = {key: value for key, value in named.items() if key != "hidden_states"}
        blocks.append(_Block(len(blocks), module, given[1:], named, run))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in decoder_blocks(model)]
    with run.autocast():
        hidden_and_head(model)[0](ids.to(run.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return blocks


def _check_blocks(floating: nn.Module, blocks: list[_Block], ids: Tensor, x: Tensor) -> None:
    """Refuse a model whose blocks, one after the other on x [B, T, H], do not make what it makes of ids."""
    seen: list[Any] = []
    hook = blocks[-1].module.register_forward_hook(lambda module, given, out: seen.append(out))
    run = blocks[0].run
    with run.autocast():
        hidden_and_head(floating)[0](ids.to(run.device), use_cache=False)
    hook.remove()
    wanted = (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).float()
    for block in blocks:
        x = block(x)
    error = float((x - wanted).square().mean() / wanted.square().mean())
    if not error < SAME:
        fix = "Drop the blockwise stage."
        wanted_of = f"blocks of {type(floating).__name__} must depend on hidden states and positions alone"
        raise UserError(
            problem("stages", wanted_of, f"another result alone (error {error:.2g})", fix), before_work=False
        )


def _into_first(model: nn.Module, ids: Tensor, run: _Run) -> Tensor:
    """Inputs [B, T, H] of the first block for ids [B, T], float32 on the CPU."""
    seen: list[Tensor] = []

    def stop(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(named["hidden_states"] if "hidden_states" in named else given[0])
        raise _Seen

    hook = decoder_blocks(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with run.autocast():
            hidden_and_head(model)[0](ids.to(run.device), use_cache=False)
    except _Seen:
        pass
    finally:
        hook.remove()
    return seen[0].float().cpu()


def _save(checkpoints: Checkpoints, blocks: int, student: nn.Module, seconds: list[float]) -> None:
    facts = {"step": blocks, "world": ranks.world(), "step_seconds": seconds}
    checkpoints.save(blocks, own_pieces(model_pieces(student)), facts)
