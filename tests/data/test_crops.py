"""Views: torchvision's law of boxes, the same pixels whatever the batch, and pixels equal to torch's own resize."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from methods.parts.views import CropGroup
from pipeline.data.crop_task import make_crops
from pipeline.data.crops import COLUMN, COLUMNS, cut_crops, draw_views, shrink_factor, shrunk
from pipeline.data.decode import ORIENTATION, large_size
from pipeline.data.image_dataset import Sample
from pipeline.data.sources.patches import CLASS_NAMES, load_photo

VIEWS = {
    "global": CropGroup(count=2, size=32, scale=(0.3, 1.0)),
    "unused": CropGroup(count=0, size=48),
    "local": CropGroup(count=3, size=16, scale=(0.05, 0.3), interpolation="bicubic"),
}


def draw(count: int = 6000, height: int = 60, width: int = 80, **changes: object) -> dict[str, np.ndarray]:
    group = CropGroup(**({"count": 1, "size": 32} | changes))
    table = draw_views(0, 0, np.arange(count), np.full(count, height), np.full(count, width), {"g": group})["g"][:, 0]
    return {name: table[:, place] for name, place in COLUMN.items()}


def pictures(count: int, *shape: int) -> list[np.ndarray]:
    random = np.random.default_rng(7)
    smooth = [random.integers(0, 256, (*(-(-s // 4) for s in shape), 3), np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(count)]
    return [image[: shape[0], : shape[1]].copy() for image in smooth]


def test_boxes_follow_torchvision() -> None:
    from torchvision.transforms import v2

    mine = draw(scale=(0.2, 1.0))
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(32, scale=(0.2, 1.0)), torch.zeros(3, 60, 80)
    theirs = [crop.make_params([image]) for _ in range(6000)]
    for name in ("top", "left", "height", "width"):
        expected = np.array([params[name] for params in theirs])
        levels = np.linspace(0.05, 0.95, 10)
        assert np.abs(np.quantile(mine[name], levels) - np.quantile(expected, levels)).max() <= 2
        assert abs((mine[name] == 0).mean() - (expected == 0).mean()) < 0.03
    assert (mine["top"] + mine["height"] <= 60).all() and (mine["left"] + mine["width"] <= 80).all()


@pytest.mark.parametrize("height, width, box", [(10, 100, (10, 13, 0, 43)), (100, 10, (13, 10, 43, 0)), (1, 1, (1, 1, 0, 0))])
def test_fallback_is_the_central_box(height: int, width: int, box: tuple[int, ...]) -> None:
    mine = draw(50, height, width, scale=(1.0, 1.0))
    for name, value in zip(("height", "width", "top", "left"), box, strict=True):
        assert (mine[name] == value).all()


def test_frequencies_and_ranges() -> None:
    mine = draw(flip=0.3, jitter=(0.4, 0.2, 2.0, 0.1), jitter_probability=0.7, grayscale=0.2, blur=0.6, blur_sigma=(0.5, 1.5), solarize=0.1)
    for name, probability in {"flip": 0.3, "jitter": 0.7, "grayscale": 0.2, "blur_sigma": 0.6, "solarize": 0.1}.items():
        assert abs((mine[name] > 0).mean() - probability) < 0.025, name
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.8, 1.2), ("saturation", 0, 3), ("hue", -0.1, 0.1)):
        assert low <= mine[name].min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < mine[name].max() <= high + 1e-6
    sigma = mine["blur_sigma"][mine["blur_sigma"] > 0]
    assert 0.5 <= sigma.min() < 0.51 and 1.49 < sigma.max() <= 1.5
    assert np.abs(np.bincount(mine["order"].astype(int), minlength=24) / 6000 * 24 - 1).max() < 0.25
    drawn = np.stack([mine[name] for name in COLUMNS[4:]])
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 0.05


def test_a_view_depends_on_its_key_only() -> None:
    ids = np.array([3, 11, 2**33])
    sizes = np.array([40, 50, 60])
    together = draw_views(1, 2, ids, sizes, sizes, VIEWS)
    alone = draw_views(1, 2, ids[1:2], sizes[1:2], sizes[1:2], VIEWS)
    for name in ("global", "local"):
        assert (together[name][1:2] == alone[name]).all()
    assert "unused" not in together
    for seed, epoch in ((2, 2), (1, 3)):
        assert (draw_views(seed, epoch, ids, sizes, sizes, VIEWS)["global"] != together["global"])[..., :4].any()
    assert (together["global"][:, 0] != together["global"][:, 1]).any()


def expected_crop(image: np.ndarray, row: np.ndarray, group: CropGroup) -> np.ndarray:
    """Torch's antialiased resize in float64, columns then rows, rounded to 8 bits after each as its uint8 kernel does."""
    top, left, height, width, flip = row[:5].astype(int)
    crop = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None].double()
    for size in ((height, group.size), (group.size, group.size)):
        crop = interpolate(crop, size, mode=group.interpolation, antialias=True).add(0.5).floor().clamp(0, 255)
    crop = crop[0].permute(1, 2, 0).numpy()
    return crop[:, ::-1] if flip else crop


@pytest.mark.parametrize("shape", [(32, 32), (20, 64), (120, 90), (17, 300)])
def test_pixels_are_those_of_torch(shape: tuple[int, int]) -> None:
    images = pictures(12, *shape)
    tables = draw_views(0, 0, np.arange(12), np.full(12, shape[0]), np.full(12, shape[1]), VIEWS)
    cut = cut_crops(images, tables, VIEWS)
    for name, crops in cut.items():
        assert crops.shape == (12, VIEWS[name].count, VIEWS[name].size, VIEWS[name].size, 3) and crops.dtype == np.uint8
        for i, v in np.ndindex(*crops.shape[:2]):
            difference = np.abs(crops[i, v] - expected_crop(images[i], tables[name][i, v], VIEWS[name]))
            assert difference.max() <= 2 and difference.mean() < 0.05, (name, i, v)


def test_small_path_is_within_one_level_of_the_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(40, 32, 32)
    tables = draw_views(0, 0, np.arange(40), np.full(40, 32), np.full(40, 32), VIEWS)
    small = cut_crops(images, tables, VIEWS)
    monkeypatch.setattr("pipeline.data.crops.SMALL", 0)
    general = cut_crops(images, tables, VIEWS)
    for name in small:
        difference = np.abs(small[name].astype(int) - general[name])
        assert difference.max() <= 1 and difference.mean() < 0.05


def test_pixels_do_not_depend_on_the_batch() -> None:
    images = pictures(70, 32, 32) + pictures(3, 100, 80) + pictures(3, 20, 40)
    order = np.random.default_rng(0).permutation(len(images))
    sizes = [np.array([image.shape[axis] for image in images]) for axis in (0, 1)]
    tables = draw_views(0, 0, np.arange(len(images)), *sizes, VIEWS)
    whole = cut_crops(images, tables, VIEWS)
    shuffled = cut_crops([images[i] for i in order], {name: table[order] for name, table in tables.items()}, VIEWS)
    for name in whole:
        assert (shuffled[name] == whole[name][order]).all()
        for i in (0, 69, 71, 75):
            assert (cut_crops([images[i]], {n: t[[i]] for n, t in tables.items()}, VIEWS)[name][0] == whole[name][i]).all()


def test_read_only_images_are_left_alone() -> None:
    image = pictures(1, 90, 90)[0]
    image.flags.writeable = False
    tables = draw_views(0, 0, np.arange(1), np.array([90]), np.array([90]), VIEWS)
    before = image.copy()
    cut_crops([image], tables, VIEWS)
    assert (image == before).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(32, 32), (180, 240)])
def test_pixels_are_those_of_pillow(shape: tuple[int, int], interpolation: str) -> None:
    """Both round to 8 bits after each of two passes; Pillow's weights have 22 bits, torch's fast kernel's 16, so a few pixels are 2 apart.

    Columns first, as torch does: Pillow 13 takes whichever order is cheaper, and at edges that overshoot, bicubic clips
    differently then.
    """
    views = {"g": CropGroup(count=4, size=24 if shape[0] == 32 else 96, scale=(0.1, 1.0), interpolation=interpolation)}
    size, resampling = views["g"].size, getattr(Image.Resampling, interpolation.upper())
    images = pictures(16, *shape)
    tables = draw_views(0, 0, np.arange(16), np.full(16, shape[0]), np.full(16, shape[1]), views)
    cut = cut_crops(images, tables, views)["g"]
    differences = []
    for i, v in np.ndindex(*cut.shape[:2]):
        top, left, height, width, flip = tables["g"][i, v, :5].astype(int).tolist()
        box = Image.fromarray(images[i][top : top + height, left : left + width])
        want = np.asarray(box.resize((size, height), resampling).resize((size, size), resampling))
        differences.append(np.abs(cut[i, v].astype(int) - (want[:, ::-1] if flip else want)))
    assert np.max(differences) <= 2 and np.mean(differences) < 0.1 and np.mean(np.array(differences) > 1) < 1e-3


# ---------------------------------------------------------------------------- large images


def test_no_box_is_shrunk_below_twice_its_view() -> None:
    count, views = 300, {"global": CropGroup(size=224, scale=(0.2, 1.0)), "local": CropGroup(size=96, scale=(0.05, 0.2))}
    heights, widths = np.full(count, 3000), np.full(count, 2001)
    tables = draw_views(0, 0, np.arange(count), heights, widths, views)
    factors = np.array([shrink_factor({name: table[[i]] for name, table in tables.items()}, views) for i in range(count)])
    assert set(factors) == {2, 4}
    small_heights, small_widths = -(-heights // factors), -(-widths // factors)
    for name, table in tables.items():
        boxes = shrunk(table, factors, small_heights, small_widths)
        top, left, height, width = np.moveaxis(boxes[..., :4], -1, 0)
        assert (np.minimum(height, width)[factors > 1] >= 2 * views[name].size - 1).all()
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + height <= small_heights[:, None]).all() and (left + width <= small_widths[:, None]).all()
        assert np.abs(boxes[..., :4] * factors[:, None, None] - table[..., :4]).max() <= 8
        larger = np.minimum(*np.moveaxis(table[..., 2:4], -1, 0)).min(1) / views[name].size
        assert (larger[factors > 1] >= 2 * factors[factors > 1]).all()


@pytest.mark.parametrize("size", [32, 700])
def test_a_task_of_nothing_but_damaged_large_photographs_is_black(size: int) -> None:
    """Their headers are whole: the boxes must lie in the pixel that stands for them, shrunk or not."""
    file = io.BytesIO()
    load_photo(0).resize((2400, 1800)).save(file, "JPEG")
    rows = [Sample(i, file.getvalue()[:3000], -1, "") for i in range(2)]
    columns = make_crops(rows, 0, {"global": CropGroup(size=size, scale=(0.3, 1.0))}, 0, 1)
    assert not columns["crops/global"].any() and all(columns["reason"])


@pytest.mark.parametrize("orientation", [1, 6])
def test_views_of_a_large_photograph_are_those_of_the_whole_one(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    load_photo(CLASS_NAMES.index("coffee")).resize((2400, 1800), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92, exif=exif)
    row = Sample(5, file.getvalue(), -1, "")
    assert large_size(row.image) == ((1800, 2400) if orientation == 1 else (2400, 1800))
    views = {"global": CropGroup(size=64, scale=(0.3, 1.0)), "local": CropGroup(size=32, scale=(0.1, 0.3))}
    small = make_crops([row], 0, views, 0, 1)
    monkeypatch.setattr("pipeline.data.decode.LARGE_PIXELS", 10**9)
    whole = make_crops([row], 0, views, 0, 1)
    for name in views:
        assert (small[f"table/{name}"] == whole[f"table/{name}"]).all()
        difference = np.abs(small[f"crops/{name}"].astype(int) - whole[f"crops/{name}"])
        assert difference.mean() < 1.5 and not (difference == 0).all()
