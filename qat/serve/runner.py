"""What runs the tokens of a batch: the decode engine, or transformers on packed layers with the engine's methods.

A `Runner` has `positions`, `slots`, `vocabulary`, `forward` and `top`; see `engine.Engine`.
Letters: M rows of a call, S scored rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.formats.packed_model import PackedModel
from qat.progress import say
from qat.serve import engine
from qat.serve.load import serve
from qat.serve.sampling import largest


class LayerRunner:
    """Any causal LM of transformers on packed layers, a cache for each slot; sequences run one after another.

    Args:
        backend: the kernel of the packed layers, see `kernels.dispatch`.
    """

    def __init__(self, packed: PackedModel, positions: int, slots: int, backend: str = "auto"):
        self._model = serve(packed, torch.bfloat16, backend)
        config = self._model.config.get_text_config()
        self.positions = min(positions, getattr(config, "max_position_embeddings", None) or positions)
        self.slots, self.vocabulary = slots, config.vocab_size
        self._caches: dict[int, Any] = {}

    @torch.no_grad()
    def forward(self, ids: Tensor, slot: Tensor, position: Tensor, scored: Tensor) -> Tensor:
        """Run rows [M] of token ids at their slots and positions; logits [S, V] float32 of the rows `scored` [S].

        Rows of one sequence must come in order of position and go on where its cache ends; position 0 begins a new one.
        """
        logits = torch.full((scored.numel(), self.vocabulary), torch.nan)
        for one in slot.unique().tolist():
            rows = (slot == one).nonzero().flatten()
            wanted = torch.isin(scored, rows).nonzero().flatten()
            places = torch.searchsorted(rows, scored[wanted])
            # a model always scores something: the last row where nothing is asked for
            keep = places if places.numel() else torch.tensor([rows.numel() - 1])
            found = self._run(one, ids[rows], int(position[rows[0]]), keep)
            if places.numel():
                logits[wanted] = found
        return logits

    def _run(self, slot: int, ids: Tensor, start: int, keep: Tensor) -> Tensor:
        """Logits [len(keep), V] of the next rows of one sequence."""
        cache = self._caches.pop(slot, None) if start else None
        with torch.autocast("cpu", torch.bfloat16):
            mask = torch.ones(1, start + ids.numel(), dtype=torch.long)
            out = self._model(
                ids[None], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=keep
            )
        self._caches[slot] = out.past_key_values
        return out.logits[0].float()

    def top(self, ids: Tensor, slot: Tensor, position: Tensor, scored: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `forward`, but the k largest logits and their tokens, [S, k] each, best first; -infinity and -1 for a row
        whose logits are NaN."""
        logits = self.forward(ids, slot, position, scored)
        is_good = torch.isfinite(logits).all(-1, keepdim=True)
        tokens = torch.empty(scored.numel(), k, dtype=torch.long)
        for row, numbers in zip(tokens, logits.nan_to_num().numpy(), strict=True):
            places = largest(numbers, k)
            row.copy_(torch.from_numpy(places[np.argsort(-numbers[places], kind="stable")]))
        return torch.where(is_good, logits.gather(-1, tokens), -torch.inf), torch.where(is_good, tokens, -1)


def open_runner(packed: PackedModel, positions: int, slots: int, backend: str = "auto") -> Any:
    """The decode engine when backend is auto and it can run the model; else transformers, and a line that says why."""
    reason = engine.refuses(packed) if backend == "auto" else f"backend {backend} was asked for"
    if reason is None:
        return engine.Engine(packed, positions, slots)
    say(f"decode engine: not used ({reason}); transformers runs the model on packed layers")
    return LayerRunner(packed, positions, slots, backend)
