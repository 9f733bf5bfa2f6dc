"""Few kernel launches, whatever the recipe: colour on the device, and the optimizers that adapt layer by layer."""

from __future__ import annotations

import pytest
import torch

from benchmarks.launches import clipping, colour, launches, optimizer_step, paper_recipes, with_gradients
from methods.parts.backbones import BackboneConfig
from pipeline.recipes import load_recipe

LIMIT_COLOUR, LIMIT_OPTIMIZER = 300, 150


def test_launches_are_counted_and_views_are_not() -> None:
    x = torch.ones(4, 4)
    count = launches(lambda: torch.addcmul(x.view(16)[:4], x[0], x.T[1]).sqrt_())
    assert count == {"aten::addcmul": 1, "aten::sqrt_": 1}
    assert launches(lambda: torch._foreach_add([x, x], 1)) == {"aten::_foreach_add": 1}


def test_colour_of_every_paper_recipe() -> None:
    groups = {repr(load_recipe(name).views): name for name in paper_recipes()}
    counts = {name: colour(load_recipe(name), 12) for name in groups.values()}
    assert len(counts) > 5 and max(counts.values()) <= LIMIT_COLOUR, counts


@pytest.mark.parametrize("name", ["larc", "lars", "lars-classic"])
def test_optimizers_on_resnet50(name: str) -> None:
    params = with_gradients(BackboneConfig(name="resnet50"))
    assert 0 < optimizer_step(name, params) <= LIMIT_OPTIMIZER
    assert 0 < clipping(params) <= LIMIT_OPTIMIZER
