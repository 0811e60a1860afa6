"""Round to nearest: every group's grid holds all its values. Needs no text."""

from __future__ import annotations

from qat.ptq.blocks import Block
from qat.ptq.options import PtqOptions
from qat.ptq.ranges import from_extremes
from qat.scheme import QuantScheme

NEEDS_TEXT = False
MOVES_WEIGHTS = False


def refusal(block: Block, schemes: dict[str, QuantScheme]) -> str | None:
    """Why the method cannot quantize the block; None when it can. `schemes` are those of its targets, by name."""
    return None


def quantize_block(block: Block, options: PtqOptions) -> None:
    """Give every target of the block its grid."""
    for target in block.targets.values():
        target.put(qparams=from_extremes(target.weight(), target.spec))
