"""The names of every method's state: a checkpoint of an earlier version must load."""

from __future__ import annotations

import hashlib

import pytest

from tests.test_methods import SMALL, built

# small recipe -> how many tensors lie outside the backbones, whose names are timm's, and a hash of their names in order.
# A change of either makes older checkpoints unreadable
NAMES = {
    "barlow-twins-small": (13, "96e658c3dee5"),
    "byol-small": (24, "75a36a4adbca"),
    "coke-small": (39, "c13fda3f09f4"),
    "deepcluster-v2-small": (11, "dd74d85d935b"),
    "dino-small": (36, "28a327d4d2d6"),
    "dinov2-small": (53, "eeb6592a9833"),
    "ibot-small": (53, "eeb6592a9833"),
    "mae-small": (19, "da9f12048120"),
    "moco-v1-small": (9, "e1b3a9c515c0"),
    "moco-v2-small": (13, "459c1120e1e2"),
    "moco-v3-small": (42, "86e51eeb6e2d"),
    "msn-small": (33, "1ba59e4d19df"),
    "nnclr-small": (36, "649363134a86"),
    "simclr-small": (11, "c43d3b55ac93"),
    "simclr-v2-small": (39, "aa196d31b9a7"),
    "simsiam-small": (24, "6b4713e8b4e9"),
    "swav-photos-small": (12, "b563f30e8b9a"),
    "swav-small": (12, "b563f30e8b9a"),
    "vicreg-small": (15, "fd9d317629a1"),
}


def test_every_method_is_pinned() -> None:
    assert set(NAMES) == {recipe for recipe in SMALL if "-cifar10-" not in recipe}


@pytest.mark.parametrize("recipe", NAMES)
def test_names_of_the_state_stay(recipe: str) -> None:
    names = [name for name in built(recipe)[0].state_dict() if "backbone." not in name]
    assert (len(names), hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]) == NAMES[recipe], names
