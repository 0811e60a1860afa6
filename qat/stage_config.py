"""The schema of the groups `phases` and `stages`; the others, and what a schema is, are in `config.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

BLOCK_WINDOWS = 128


@dataclass
class PhaseConfig:
    """One change of what the fake quantizers do."""

    at: int = 0
    """First optimizer step of the phase."""
    do: str = "???"
    """observe, fake_quantize, freeze_scales or bits."""
    bits: int | None = None
    """With do=bits: weights whose scheme is narrower train at this width from here on."""


@dataclass
class PhasesConfig:
    """The group `phases`, of every end_to_end stage."""

    schedule: list[PhaseConfig] = field(default_factory=lambda: [PhaseConfig(0, "fake_quantize")])
    """What happens from which step on; the state at a step is the sum of all entries up to it."""


@dataclass
class StageConfig:
    """One training; what it leaves out is that of the run."""

    kind: str = "end_to_end"
    """blockwise (each decoder block against the float one), end_to_end, or scales (and norms, the integers held)."""
    steps: int | None = None
    """Optimizer steps, of every block when blockwise; None takes trainer.max_steps."""
    lr: float | None = None
    """Peak learning rate of weights, norms and biases; None takes optim.lr."""
    scale_lr: float | None = None
    """Peak learning rate of scales and zero points; None takes optim.scale_lr."""
    windows: int | None = None
    """Blockwise: training windows, of all processes, that blocks learn from; None takes BLOCK_WINDOWS."""
    rank: int | None = None
    """End to end: hold the weights W and train W + (alpha / rank) B A; None trains W."""
    alpha: float | None = None
    """Size of the product of that sum; None takes the rank."""


@dataclass
class StagesConfig:
    """The group `stages`."""

    schedule: list[StageConfig] = field(default_factory=lambda: [StageConfig()])
    """Trainings one after the other, each from the state the one before published."""


def length(stage: StageConfig, max_steps: int) -> int:
    """Optimizer steps of a stage, in a run of trainer.max_steps; of each block when blockwise."""
    return max_steps if stage.steps is None else stage.steps
