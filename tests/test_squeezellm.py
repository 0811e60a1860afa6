"""qat/ptq/squeezellm.py: tables of values of each row's own, weighted by what the loss minds, beside a sparse part."""

from __future__ import annotations

import pytest
import torch

from qat import grid
from qat.ptq import squeezellm


def sample(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [6, 80] with heavy tails and an importance for each value."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 80, generator=generator) ** 3
    return weight, torch.rand(6, 80, generator=generator) ** 4


def test_nearest_takes_the_closest_entry_and_the_lower_of_two():
    table = torch.tensor([[-2.0, 0.0, 1.0, 5.0]])
    x = torch.tensor([[-9.0, -1.0, -0.9, 0.5, 0.6, 3.0, 3.1, 9.0]])
    codes = grid.nearest(x, table)
    assert codes.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    assert grid.look_up(codes, table).tolist() == [[-2, -2, 0, 0, 1, 1, 5, 5]]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_cluster_is_a_fixed_point_and_beats_evenly_spaced_tables(bits):
    weight, importance = sample()
    table = squeezellm.cluster(weight, importance, 1 << bits)
    assert torch.equal(table, table.sort(-1).values)

    def loss(entries: torch.Tensor) -> torch.Tensor:
        return (importance * (grid.look_up(grid.nearest(weight, entries), entries) - weight).square()).sum(-1)

    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    even = low + (high - low) * torch.linspace(0, 1, 1 << bits)
    assert (loss(table) < loss(even)).all()
    codes = grid.nearest(weight, table).long()
    mass = torch.zeros_like(table).scatter_add_(1, codes, importance)
    mean = torch.zeros_like(table).scatter_add_(1, codes, importance * weight) / mass
    assert torch.allclose(mean[mass > 0], table[mass > 0], atol=1e-3)


def test_quantize_keeps_outliers_and_counts_every_byte():
    weight, importance = sample()
    weight[2, 7] = 100.0
    found = squeezellm.quantize(weight, importance, 3, 0.05)
    assert len(found.values) == 24
    back = found.dequantize()
    assert back[2, 7] == 100.0
    assert torch.equal(back[found.rows(), found.columns.long()], found.values.float())
    inside = torch.ones_like(weight, dtype=torch.bool)
    inside[found.rows(), found.columns.long()] = False
    entries = grid.look_up(found.codes(), found.table)
    assert torch.equal(back[inside], entries[inside])
    assert found.bytes == 6 * 30 + 6 * 8 * 2 + 24 * 4 + 7 * 4
    assert (back - weight).square().mean() < 0.1 * weight.clamp(-8, 8).square().mean()


def test_row_that_the_loss_does_not_mind_is_clustered_evenly_weighted():
    weight, importance = sample()
    importance[3] = 0
    found = squeezellm.quantize(weight, importance, 4, 0.0)
    uniform = squeezellm.quantize(weight, torch.ones_like(weight), 4, 0.0)
    assert torch.equal(found.table[3], uniform.table[3])


def test_fisher_is_the_sum_of_squared_gradients(tiny_model_dir):
    from quant_models import float_model

    model, windows = float_model(tiny_model_dir), torch.arange(40).view(2, 20)
    name = "model.layers.1.mlp.up_proj"
    found = squeezellm.fisher(model, windows, [name])[name]
    wanted = torch.zeros_like(found)
    for window in windows:
        loss = model(input_ids=window[None], labels=window[None]).loss
        wanted += torch.autograd.grad(loss, model.get_submodule(name).weight)[0].square()
    torch.testing.assert_close(found, wanted)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
