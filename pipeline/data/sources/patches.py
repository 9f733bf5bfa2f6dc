"""Source: the built-in dataset, patches of photographs that scikit-image, scikit-learn and matplotlib contain."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from methods.parts.errors import ConfigError, require
from pipeline.data.image_dataset import ImageDataset, fingerprint
from pipeline.data.philox import PATCH, TILE, permutation, uniforms

SKIMAGE = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png color.png grass.png gravel.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg"
)
FILES = [("skimage", "data", name) for name in SKIMAGE.split()]
FILES += [("sklearn", "datasets/images", name) for name in ("china.jpg", "flower.jpg")]
FILES += [("matplotlib", "mpl-data/sample_data", "grace_hopper.jpg")]
CLASS_NAMES = [Path(name).stem for _, _, name in FILES]
SPLITS = ("train", "held-out", "test")


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """The options after the colon of `patches:`."""

    pixels: int = 32  # side of a patch
    per_photo: int = 320  # training patches of each photograph; held-out and test have a fifth
    seed: int = 0  # chooses tiles and patches
    split: str = "train"  # train (with the held-out patches) or test

    def __post_init__(self) -> None:
        require(8 <= self.pixels <= 128, "data.path=patches:pixels", self.pixels, "use 8 to 128")
        require(self.per_photo >= 1, "data.path=patches:per_photo", self.per_photo, "use 1 or more")
        require(self.seed >= 0, "data.path=patches:seed", self.seed, "use 0 or more")
        require(self.split in ("train", "test"), "data.path=patches:split", self.split, "use train or test")

    @property
    def fifth(self) -> int:
        return max(1, self.per_photo // 5)


def parse(path: str) -> PatchOptions:
    """Parse `patches:pixels=32,per_photo=320`.

    Raises:
        ConfigError: an unknown option, or an invalid value.
    """
    known = {f.name: f.type for f in fields(PatchOptions)}
    values: dict[str, int | str] = {}
    for item in filter(None, path.partition(":")[2].split(",")):
        name, _, text = (part.strip() for part in item.partition("="))
        if name not in known:
            raise ConfigError(f"data.path={path}: unknown option {name}; known options are {', '.join(known)}")
        if name != "split" and not text.isdecimal():
            raise ConfigError(f"data.path={path}: {name} must be a whole number; use e.g. {name}={getattr(PatchOptions, name)}")
        values[name] = text if name == "split" else int(text)
    return PatchOptions(**values)  # type: ignore[arg-type]


def open_patches(path: str) -> ImageDataset:
    """Open the built-in set; patches are cut when they are read."""
    options = parse(path)
    test = options.split == "test"
    images_per_photo = options.fifth if test else options.per_photo + options.fifth
    count = images_per_photo * len(FILES)
    chosen = f"pixels={options.pixels},per_photo={options.per_photo},seed={options.seed}"
    return PatchDataset(
        labels=np.repeat(np.arange(len(FILES)), images_per_photo),
        class_names=CLASS_NAMES,
        fingerprint=fingerprint([f"patches:{chosen},split={options.split}"], CLASS_NAMES),
        spans=np.stack([np.arange(count), np.ones(count, np.int64)], axis=1),
        test_path=None if test else f"patches:{chosen},split=test",
        options=options,
        images_per_photo=images_per_photo,
    )


@dataclass(kw_only=True)
class PatchDataset(ImageDataset):
    """Patches by photograph; in the train split, each photograph's training patches come before its held-out ones."""

    options: PatchOptions
    images_per_photo: int  # patches of one photograph

    def path(self, id: int) -> str:
        return f"patches/{self.options.split}/{CLASS_NAMES[id // self.images_per_photo]}#{id % self.images_per_photo}"

    def held_out_ids(self, fraction: float) -> np.ndarray:
        """Return the patches of the held-out tiles, for any fraction but 0."""
        if self.options.split == "test" or fraction <= 0:
            return super().held_out_ids(fraction)
        ids = np.arange(len(self))
        return ids[ids % self.images_per_photo >= self.options.per_photo]

    def _read(self, ids: Sequence[int] | np.ndarray) -> Iterator[tuple[bytes, str | None]]:
        options = self.options
        header = f"P6\n{options.pixels} {options.pixels}\n255\n".encode()
        draws = uniforms(options.seed, int(options.split == "test"), np.asarray(ids), PATCH, 4)
        for i, (pick, extent, down, right) in zip(ids, draws, strict=True):
            photo_index, place = divmod(int(i), self.images_per_photo)
            split = 2 if options.split == "test" else int(place >= options.per_photo)
            photo = load_photo(photo_index)
            tile, corners = tiles(photo_index, options.pixels, options.seed)
            top, left = corners[split][int(pick * len(corners[split]))]
            side = tile * (0.45 + 0.45 * extent)  # 36 to 72 of 80 pixels
            top, left = top + down * (tile - side), left + right * (tile - side)
            box = (left, top, left + side, top + side)
            patch = photo.resize((options.pixels, options.pixels), Image.Resampling.BILINEAR, box=box)
            yield header + patch.tobytes(), None


@cache
def load_photo(index: int) -> Image.Image:
    """Return one photograph as an RGB Pillow image, cached for the life of the process.

    Raises:
        ConfigError: the package that contains it is not installed.
    """
    package, folder, name = FILES[index]
    found = importlib.util.find_spec(package)  # finds the folder without importing the package
    path = Path(next(iter(found.submodule_search_locations or [])), folder, name) if found else None
    if path is None or not path.exists():
        raise ConfigError(f"data.path=patches: {name} of {package} is missing; install scikit-image, scikit-learn and matplotlib")
    with Image.open(path) as image:
        return image.convert("RGB")


@lru_cache(maxsize=256)
def tiles(index: int, pixels: int, seed: int) -> tuple[int, list[list[tuple[int, int]]]]:
    """Return the side of a photograph's tiles, pixels, and the (top, left) corners of train, held-out and test.

    Tiles never overlap, so no pixel is shared between splits. A small photograph gets smaller tiles.
    """
    width, height = load_photo(index).size
    tile = round(2.5 * pixels)
    while (width // tile) * (height // tile) < 5:
        tile -= 1
    corners = [(r * tile, c * tile) for r in range(height // tile) for c in range(width // tile)]
    order = permutation(seed, 0, len(corners), TILE, first=index)
    fifth = max(1, round(len(corners) / 5))
    dealt = [order[2 * fifth :], order[:fifth], order[fifth : 2 * fifth]]
    return tile, [[corners[i] for i in part] for part in dealt]
