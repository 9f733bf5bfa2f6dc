"""Colour, blur and normalisation equal torchvision's float operations, sample by sample."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchvision.transforms.v2 import functional as F

from methods.parts.views import CropGroup
from pipeline.data.augment import ORDERS, augment_crops, augment_views, blur_radius
from pipeline.data.crops import COLUMN, draw_views
from pipeline.data.loader import Batch
from pipeline.data.normalise import normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRONG = dict(jitter=(0.8, 0.8, 0.8, 0.4), jitter_probability=0.8, grayscale=0.3, blur=0.5, solarize=0.3)


def crops(count: int, size: int) -> torch.Tensor:
    random = np.random.default_rng(3)
    pixels = random.integers(0, 256, (count, size, size, 3), np.uint8)
    pixels[0] = 90  # no colour: the hue is not defined
    pixels[1, ..., 1:] = 0  # one pure colour
    pixels[2] = np.where(pixels[2] > 128, 255, 0)
    return torch.from_numpy(pixels)


def table(count: int, group: CropGroup) -> np.ndarray:
    sizes = np.full(count, 50)
    return draw_views(0, 0, np.arange(count), sizes, sizes, {"g": group})["g"][:, 0]


def one_by_one(pixels: torch.Tensor, row: np.ndarray, group: CropGroup) -> torch.Tensor:
    """The same recipe through torchvision."""
    value = {name: float(row[place]) for name, place in COLUMN.items()}
    x = pixels.permute(2, 0, 1).float() / 255
    if group.grayscale_first and value["grayscale"]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if value["jitter"]:
        operations = [
            lambda x: F.adjust_brightness(x, value["brightness"]),
            lambda x: F.adjust_contrast(x, value["contrast"]),
            lambda x: F.adjust_saturation(x, value["saturation"]),
            lambda x: F.adjust_hue(x, value["hue"]),
        ]
        for operation in ORDERS[int(value["order"])]:
            x = operations[operation](x)
    if value["grayscale"] and not group.grayscale_first:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if value["blur_sigma"]:
        x = F.gaussian_blur(x, [2 * blur_radius(group) + 1] * 2, [value["blur_sigma"]] * 2)
    if value["solarize"]:
        x = F.solarize(x, group.solarize_threshold)
    return F.normalize(x, list(MEAN), list(STD))


@pytest.mark.parametrize("changes", [{}, {"grayscale_first": True, "grayscale": 0.6}, {"blur_taps": 9}])
@pytest.mark.parametrize("size", [16, 32, 100])
def test_equal_to_torchvision(size: int, changes: dict[str, Any]) -> None:
    group, count = CropGroup(size=size, **(STRONG | changes)), 64
    pixels, rows = crops(count, size), table(count, group)
    assert len(set(rows[:, COLUMN["order"]])) > 15
    finished = augment_crops(pixels, rows, group, MEAN, STD)
    for i in range(count):
        difference = (finished[i] - one_by_one(pixels[i], rows[i], group)).abs() * torch.tensor(STD)[:, None, None]
        if rows[i, COLUMN["solarize"]]:  # a pixel within rounding of the threshold may fall on either side
            difference = difference[difference < difference.max()] if (difference > 1e-5).sum() <= 3 else difference
        assert difference.max() < 1e-5, (i, rows[i])


@pytest.mark.parametrize("size", [32, 224])
def test_the_blur_is_a_gaussian(size: int) -> None:
    """Within 0.05 levels of the whole Gaussian, whose mirrored border is scipy's, for the smallest and the largest sigma."""
    plain = CropGroup(size=size, jitter=(0, 0, 0, 0), grayscale=0, blur=1.0)
    pixels = crops(6, size)
    rows = table(6, plain)
    rows[:, COLUMN["blur_sigma"]] = [0.1, 0.3, 0.7, 1.0, 1.5, 2.0]
    finished = augment_crops(pixels, rows, plain, (0, 0, 0), (1, 1, 1)).double() * 255
    for i, sigma in enumerate(rows[:, COLUMN["blur_sigma"]]):
        exact = gaussian_filter(pixels[i].numpy().astype(np.float64), (sigma, sigma, 0), mode="mirror", truncate=8.0)
        assert np.abs(finished[i].permute(1, 2, 0).numpy() - exact).max() < 0.05, sigma


def test_no_augmentation_is_normalisation() -> None:
    plain = CropGroup(size=24, jitter=(0, 0, 0, 0), grayscale=0, blur=0, solarize=0)
    pixels = crops(5, 24)
    finished = augment_crops(pixels, table(5, plain), plain, MEAN, STD)
    expected = F.normalize(pixels.permute(0, 3, 1, 2).float() / 255, list(MEAN), list(STD))
    assert torch.allclose(finished, expected, atol=1e-6)
    assert torch.allclose(normalise(pixels, MEAN, STD, "cpu"), expected, atol=1e-6)
    assert normalise(pixels, MEAN, STD, "cpu", torch.bfloat16).dtype == torch.bfloat16


def test_a_crop_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    group = CropGroup(size=32, **STRONG)
    pixels, rows = crops(40, 32), table(40, group)
    whole = augment_crops(pixels, rows, group, MEAN, STD)
    monkeypatch.setattr("pipeline.data.augment.CHUNK_VALUES", 3 * 32 * 32 * 7)
    assert torch.allclose(whole, augment_crops(pixels, rows, group, MEAN, STD), atol=1e-5)
    assert torch.allclose(whole[7:8], augment_crops(pixels[7:8], rows[7:8], group, MEAN, STD), atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_views_are_view_major(channels_last: bool) -> None:
    views = {"global": CropGroup(count=2, size=24, **STRONG), "local": CropGroup(count=3, size=12, **STRONG)}
    sizes = np.full(5, 40)
    tables = draw_views(0, 0, np.arange(5), sizes, sizes, views)
    pixels = {name: torch.randint(0, 256, (5, g.count, g.size, g.size, 3), dtype=torch.uint8) for name, g in views.items()}
    batch = Batch(crops=pixels, tables=tables, ids=torch.arange(5), labels=torch.full((5,), -1), epoch=0, step=0, bad=[])
    before = {name: crop.clone() for name, crop in pixels.items()}
    finished = augment_views(batch, views, MEAN, STD, "cpu", channels_last=channels_last)
    assert [tuple(c.shape) for c in finished.crops] == [(5, 3, 24, 24)] * 2 + [(5, 3, 12, 12)] * 3
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(stack.is_contiguous(memory_format=layout) for stack in finished.stacks.values())
    for v in range(3):
        expected = augment_crops(pixels["local"][:, v], tables["local"][:, v], views["local"], MEAN, STD)
        assert torch.allclose(finished.crops[2 + v], expected, atol=1e-5)
    assert all((pixels[name] == before[name]).all() for name in pixels)
    assert finished.image_ids.tolist() == [0, 1, 2, 3, 4]


def test_groups_of_one_size_keep_their_own_settings() -> None:
    """Two groups of one size, worked on together, equal each by itself; so do they in one pass, as on a GPU."""
    other = CropGroup(count=1, size=24, **(STRONG | {"blur": 1.0, "blur_taps": 5, "grayscale_first": True, "solarize_threshold": 0.3}))
    views = {"first": CropGroup(count=2, size=24, **STRONG), "small": CropGroup(count=1, size=12, **STRONG), "other": other}
    sizes = np.full(9, 40)
    tables = draw_views(0, 0, np.arange(9), sizes, sizes, views)
    pixels = {name: torch.randint(0, 256, (9, g.count, g.size, g.size, 3), dtype=torch.uint8) for name, g in views.items()}
    batch = Batch(crops=pixels, tables=tables, ids=torch.arange(9), labels=torch.full((9,), -1), epoch=0, step=0, bad=[])
    finished = augment_views(batch, views, MEAN, STD, "cpu")
    assert list(finished.stacks) == ["first", "small", "other"]
    for name, group in views.items():
        for v, crops in enumerate(finished.stacks[name].chunk(group.count)):
            expected = augment_crops(pixels[name][:, v], tables[name][:, v], group, MEAN, STD)
            assert torch.allclose(crops, expected, atol=1e-5), name


def test_the_device_is_never_asked() -> None:
    """On meta any read of a value raises, and so does a tensor of another device."""
    views = {"global": CropGroup(count=2, size=24, **STRONG), "local": CropGroup(count=1, size=12, **(STRONG | {"grayscale_first": True}))}
    sizes = np.full(20, 40)
    tables = draw_views(0, 0, np.arange(20), sizes, sizes, views)
    pixels = {name: torch.zeros((20, g.count, g.size, g.size, 3), dtype=torch.uint8) for name, g in views.items()}
    batch = Batch(crops=pixels, tables=tables, ids=torch.arange(20), labels=torch.full((20,), -1), epoch=0, step=0, bad=[])
    finished = augment_views(batch, views, MEAN, STD, "meta")
    assert [tuple(stack.shape) for stack in finished.stacks.values()] == [(40, 3, 24, 24), (20, 3, 12, 12)]
    assert all(stack.is_meta and stack.is_contiguous(memory_format=torch.channels_last) for stack in finished.stacks.values())
