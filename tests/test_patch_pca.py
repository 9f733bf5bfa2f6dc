"""The picture of patches on features whose parts are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.figures.patch_pca import components, draw, patch_features

DRAW = np.random.default_rng(0)
PARTS = np.zeros((4, 12))  # features of the background, and of three parts of objects, which differ less from each other
PARTS[0, 0], PARTS[1:, 0], PARTS[1, 1], PARTS[2, 2], PARTS[3, 3] = -2, 2, 1, 1, 1


def planted(images: int = 3, side: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Features `(B, h, w, D)` and the part of each patch `(B, h, w)`: an object of two or three parts within a background."""
    parts = np.zeros((images, side, side), int)
    for image in parts:
        top, left = DRAW.integers(1, 4, 2)
        image[top : top + 5, left : left + 5] = 1
        image[top : top + 2, left : left + 5] = 2
        image[top + 3 : top + 5, left + 3 : left + 5] = 3
    return PARTS[parts] + 0.05 * DRAW.normal(size=(*parts.shape, 12)), parts


def test_objects_are_the_foreground_and_their_parts_have_the_same_colours_in_all_images() -> None:
    features, parts = planted()
    colours = components(features)
    black = ~colours.any(axis=-1)
    assert (black == (parts == 0)).mean() > 0.95, "but for the darkest of the foreground"
    # of two components: three parts have no third, which shows noise
    means = [[colours[i][parts[i] == part].mean(axis=0)[:2] for part in (1, 2, 3)] for i in range(3)]
    between = np.abs(np.array(means[0])[:, None] - np.array(means[0])[None]).sum(-1)[np.triu_indices(3, 1)]
    assert between.min() > 0.5
    assert np.abs(np.array(means[0]) - np.array(means[1])).max() < 0.1 and np.abs(np.array(means[0]) - np.array(means[2])).max() < 0.1


def test_colours_do_not_depend_on_the_sign_or_the_place_of_features() -> None:
    features, _ = planted()
    colours = components(features)
    rotation = np.linalg.qr(DRAW.normal(size=(12, 12)))[0]
    inverted = components(features @ rotation)
    assert ((inverted.any(-1) == colours.any(-1)).mean()) > 0.95, "the same foreground in any basis"
    np.testing.assert_allclose(components(features + 3), colours, atol=1e-9)
    order = [2, 0, 1]
    np.testing.assert_allclose(components(features[order]), colours[order], atol=1e-9)


def test_the_same_features_give_the_same_file(tmp_path: Path) -> None:
    features, _ = planted()
    images = DRAW.integers(0, 256, (3, 40, 40, 3), np.uint8)
    one, other = (draw(images, {"trained": features}, tmp_path / f"{i}.png").read_bytes() for i in range(2))
    assert one == other


def test_zeros_at_the_borders_of_a_convolution_stay_outside() -> None:
    """A constant image has constant features, up to its borders."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1))

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    features = patch_features(Net(), torch.full((1, 3, 64, 64), 0.7)).detach()
    assert features.shape == (1, 16, 16, 4)
    torch.testing.assert_close(features, features[:, :1, :1].expand_as(features))
