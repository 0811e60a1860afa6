"""KL(float || model with one unit of layers on a grid), for every unit and candidate scheme.

A unit is one layer, or with `share_inputs` the layers of a block that read the same tensor (q, k, v; gate, up). Its
weights are put on the candidate's grid by round-to-nearest with the range of least error (observers/mse.py), the inputs
too where the scheme quantizes them per token.

One float pass keeps what every decoder block gives. To measure a unit of block i, blocks before i answer with what was
kept, so a measurement costs the blocks from i on and the head: half a forward pass on average. Candidates share nothing
behind their block, and a few windows already fill a CPU, so they are not batched.

Every KL is one line of sensitivity.jsonl, under a first line that says what was measured; a measurement that was
stopped goes on behind the last whole line.

Letters: B windows, T tokens per window, N out_features, K in_features, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat import grid
from qat.errors import UserError, problem
from qat.insert import Site, survey
from qat.models import hidden_and_head
from qat.observers import OBSERVERS
from qat.paths import write_text_atomic
from qat.progress import bar
from qat.scheme import QuantPlan, QuantScheme, QuantSpec, indivisible

LINES = "sensitivity.jsonl"
ROWS = 256


@dataclass(frozen=True)
class Unit:
    """Layers that get one scheme: `sites` of block `block`."""

    sites: tuple[Site, ...]
    block: int

    @property
    def names(self) -> tuple[str, ...]:
        """Full module names, as plan rules match them."""
        return tuple(site.layer.name.removesuffix(".weight") for site in self.sites)

    @property
    def weights(self) -> int:
        """Values in all its layers."""
        return sum(site.layer.weights for site in self.sites)

    def bytes(self, scheme: QuantScheme) -> int:
        """As coverage counts: codes, scales and zero points."""
        return sum(scheme.weight.packed_bytes(site.layer.shape) for site in self.sites)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the model's stack of decoder blocks: its longest ModuleList that is not inside another.

    Raises:
        UserError: the model has none.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists if other != n)]
    if not outer:
        fix = "Sensitivity is measured on decoder-only transformers."
        raise UserError(problem(type(model).__name__, "must have a stack of decoder blocks", "none", fix))
    return max(outer, key=lambda item: len(item[1]))


def units(model: nn.Module, plan: QuantPlan, groups: list[set[str]] | None = None) -> list[Unit]:
    """The layers of the decoder blocks that no rule of `plan` decides, in the model's order.

    `groups` holds sets of module names that become one unit each (see `layers_that_share_inputs`). Works on meta.
    """
    stack, _ = decoder_blocks(model)
    group_of = {name: i for i, group in enumerate(groups or []) for name in group}
    found: dict[Any, list[Site]] = {}
    for site in survey(model, plan)[0]:
        name = site.layer.name.removesuffix(".weight")
        free = plan.scheme_for(name, False)[1] == "scheme" and site.layer.tied_to is None
        if free and name.startswith(f"{stack}.") and site.layer.kind != "embedding":
            found.setdefault(group_of.get(name, name), []).append(site)
    if not found:
        fix = "Drop rules from the plan that decide every layer."
        raise UserError(problem("sensitivity", "needs layers in the decoder blocks to choose for", "none", fix))
    block = len(stack.split("."))
    return [Unit(tuple(sites), int(sites[0].layer.name.split(".")[block])) for sites in found.values()]


def check_candidates(found: list[Unit], schemes: list[QuantScheme]) -> None:
    """Raise UserError for candidates that a layer cannot have, or whose inputs need calibration."""
    problems = []
    for scheme in schemes:
        layers = {site.layer.name: (site.layer.shape[-1], scheme.weight) for unit in found for site in unit.sites}
        problems += indivisible(layers)
        if scheme.input is not None and not scheme.input.dynamic:
            fix = "Measure the scheme with dynamic inputs, or with float inputs, instead."
            problems.append(problem(f"candidate {scheme.name}", "inputs must be dynamic or float", "static", fix))
    if problems:
        raise UserError(*problems)


@torch.no_grad()
def layers_that_share_inputs(model: nn.Module, plan: QuantPlan, ids: Tensor) -> list[set[str]]:
    """Names of layers that read one and the same tensor in a pass over ids [B, T]."""
    readers: dict[int, set[str]] = {}
    held, hooks = [], []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            held.append(args[0])  # alive, so that its id stays its own
            readers.setdefault(id(args[0]), set()).add(name)

        return hook

    for unit in units(model, plan):
        if unit.sites[0].layer.kind != "experts":
            hooks.append(unit.sites[0].module.register_forward_pre_hook(note(unit.names[0])))
    try:
        hidden_and_head(model)[0](input_ids=ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return [names for names in readers.values() if len(names) > 1]


class Sensitivity:
    """A float model, what its blocks gave for windows [B, T], and the log-probabilities of all tokens [B*T, V].

    In float32: bf16 moves the predictions of SmolLM2-135M by KL 1e-3, as much as a layer of 4 bits.
    Memory: 4 * B * T * (blocks * hidden + V) bytes.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, windows: Tensor):
        self.windows = windows
        self.base, self.head = hidden_and_head(model)
        self.blocks = decoder_blocks(model)[1]
        self.given: list[Any] = []
        hooks = [block.register_forward_hook(lambda _m, _a, out: self.given.append(out)) for block in self.blocks]
        try:
            hidden = self._hidden()
        finally:
            for handle in hooks:
                handle.remove()
        self.wanted = torch.cat([log_p for _, log_p in self._log_probabilities(hidden)])

    def _hidden(self) -> Tensor:
        return self.base(input_ids=self.windows, use_cache=False).last_hidden_state.flatten(0, 1)

    def _log_probabilities(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First row and log-softmax [<= ROWS, V] of pieces of hidden states [B*T, K]."""
        for start in range(0, hidden.shape[0], ROWS):
            yield start, self.head(hidden[start : start + ROWS]).log_softmax(-1)

    @torch.no_grad()
    def kl(self, unit: Unit, scheme: QuantScheme) -> float:
        """Mean KL(float || with `unit` in `scheme`) over all tokens, in nats; the model is left as it was."""
        with _answering(self.blocks, self.given, unit.block), _quantized(unit, scheme):
            hidden = self._hidden()
        total = 0.0
        for start, log_p in self._log_probabilities(hidden):
            log_t = self.wanted[start : start + len(log_p)]
            total += float((log_t.exp() * (log_t - log_p)).sum(dtype=torch.float64))
        return total / hidden.shape[0]


@contextmanager
def _answering(blocks: nn.ModuleList, given: list[Any], first: int) -> Iterator[None]:
    """Blocks before `first` compute nothing: each gives what block `first` is to read."""
    earlier: list[Any] = list(blocks)[:first]
    for block in earlier:
        block.forward = lambda *args, **kwargs: given[first - 1]
    try:
        yield
    finally:
        for block in earlier:
            del block.forward


@contextmanager
def _quantized(unit: Unit, scheme: QuantScheme) -> Iterator[None]:
    """The unit's weights on the grid of `scheme`, and its inputs where the scheme says so."""
    before = [(site.weight, site.weight.data) for site in unit.sites]
    hooks = []
    for site in unit.sites:
        site.weight.data = rounded(site.weight.data, scheme.weight, site.transposed)
        if scheme.input is not None and site.layer.kind != "experts":
            hooks.append(site.module.register_forward_pre_hook(_input_on_grid(scheme.input)))
    try:
        yield
    finally:
        for weight, data in before:
            weight.data = data
        for handle in hooks:
            handle.remove()


def _input_on_grid(spec: QuantSpec) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        qparams = grid.choose_qparams(*grid.min_max(args[0], spec), spec)
        return (grid.fake_quantize(args[0], qparams, spec, args[0].dtype), *args[1:])

    return hook


def rounded(weight: Tensor, spec: QuantSpec, transposed: bool = False) -> Tensor:
    """A weight [..., N, K] (stored [..., K, N] when `transposed`) by round-to-nearest in the range of least error."""
    seen = weight.transpose(-1, -2).contiguous() if transposed else weight
    observer = OBSERVERS["mse"](spec, spec.scale_shape(tuple(seen.shape))).to(seen.device)
    observer.observe(seen)
    y = grid.fake_quantize(seen, observer.qparams(spec), spec, seen.dtype)
    return y.transpose(-1, -2).contiguous() if transposed else y


def measure(
    sensitivity: Sensitivity, found: list[Unit], schemes: list[QuantScheme], facts: dict[str, Any], folder: Path
) -> dict[tuple[tuple[str, ...], str], float]:
    """(names of a unit, name of a scheme) -> KL, measured or read from `folder`, which gets a line for each.

    Raises:
        UserError: `folder` has a measurement of something else than `facts`.
    """
    known = resumed(folder / LINES, facts)
    todo = [(unit, scheme) for unit in found for scheme in schemes if (unit.names, scheme.name) not in known]
    total = len(found) * len(schemes)
    with (folder / LINES).open("a", encoding="utf-8") as file, bar("sensitivity", total, total - len(todo)) as advance:
        for unit, scheme in todo:
            known[unit.names, scheme.name] = kl = sensitivity.kl(unit, scheme)
            file.write(json.dumps({"layers": unit.names, "scheme": scheme.name, "kl": kl}) + "\n")
            file.flush()
            advance(f"{unit.names[0]} {scheme.name} {kl:.2e}")
    return known


def resumed(file: Path, facts: dict[str, Any]) -> dict[tuple[tuple[str, ...], str], float]:
    """What `file` holds of a measurement of `facts`; a line cut short is dropped. A new file gets its first line."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    if not lines:
        write_text_atomic(file, json.dumps(facts) + "\n")
        return {}
    try:
        before, *rows = (json.loads(line) for line in lines)
        known = {(tuple(row["layers"]), row["scheme"]): float(row["kl"]) for row in rows}
        changed = {key for key in before | facts if before.get(key) != facts.get(key)}
    except (ValueError, KeyError, TypeError, AttributeError):
        fix = "Delete it, or name another --out."
        raise UserError(problem(str(file), "must hold measurements, one JSON line each", "others", fix)) from None
    if changed:
        fix = "Name another --out, or delete the file to measure anew."
        given = f"another {', '.join(sorted(changed))}"
        raise UserError(problem(str(file), "must be of this measurement to go on with it", given, fix))
    write_text_atomic(file, "\n".join(lines) + "\n")
    return known
