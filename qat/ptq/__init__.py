"""Post-training quantization: the baselines that training is measured against, and starting points for it.

A method is a module with `quantize_block(block, options)`, which gives the training layers of one decoder block their
grids and perhaps other weights, `refusal(block, schemes)`, `NEEDS_TEXT` and `MOVES_WEIGHTS`. The order of work is in
`apply.py`, the streaming of blocks in `blocks.py`.
"""

from __future__ import annotations

from types import ModuleType

from qat.ptq import awq, gptq, rtn, rtn_mse

PTQ_METHODS: dict[str, ModuleType] = {
    "rtn": rtn,
    "rtn_mse": rtn_mse,
    "gptq": gptq,
    "awq": awq,
}
