"""Multi-crop, engine by engine: images per second of one core from encoded bytes, as ratios to the original transform.

The anchors run in the same process, in turn with ours, on the same images: the original SwAV transform (our composition
of torchvision's and Pillow's parts, in the order of its paper's code), torchvision v2 on tensors, and lightly, kornia and
albumentations where `pip install -e ".[bench]"` has put them. The floor is the fastest decoder with one resize.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn.functional import interpolate
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from methods.parts.views import CropGroup, ViewsConfig
from pipeline.data import augment
from pipeline.data import decode as decoding
from pipeline.data.crop_task import augment_columns, make_crops
from pipeline.data.crops import COLUMNS, cut_crops, draw_views
from pipeline.data.decode import decode
from pipeline.data.image_dataset import Sample
from pipeline.data.sources.patches import FILES, load_photo, open_patches

MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
LARGE = {"global": CropGroup(count=2, size=224, scale=(0.14, 1.0)), "local": CropGroup(count=6, size=96, scale=(0.05, 0.14))}
SMALL = {"global": CropGroup(count=2, size=32, scale=(0.2, 1.0)), "local": CropGroup(count=4, size=16, scale=(0.1, 0.3))}
Engine = Callable[[list[bytes]], object]


# ---------------------------------------------------------------------------- images


def photographs(folder: Path | None, count: int) -> list[bytes]:
    """JPEGs of 500 x 375 pixels, quality 90, of the built-in photographs or of a folder's."""
    found = [Image.open(p).convert("RGB") for p in sorted(folder.rglob("*.jp*g"))[:count]] if folder else map(load_photo, range(len(FILES)))
    made = []
    for photo in found:
        scale = max(500 / photo.width, 375 / photo.height)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS).crop((0, 0, 500, 375))
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return [made[i % len(made)] for i in range(count)]


def thumbnails(count: int) -> list[bytes]:
    """JPEGs of 32 x 32 pixels."""
    source, made = open_patches("patches"), []
    for row in source.read(np.linspace(0, len(source) - 1, count).astype(int)):
        file = io.BytesIO()
        Image.open(io.BytesIO(row.image)).save(file, "JPEG", quality=95)
        made.append(file.getvalue())
    return made


# ---------------------------------------------------------------------------- ours


def cut(views: ViewsConfig) -> Engine:
    """uint8 views and tables, ready to travel."""

    def engine(images: list[bytes]) -> object:
        return make_crops([Sample(i, image, -1, "") for i, image in enumerate(images)], 0, views, 0, len(images))

    return engine


def complete(views: ViewsConfig) -> Engine:
    """Float views: the same, finished on the CPU."""
    begin = cut(views)

    def engine(images: list[bytes]) -> object:
        columns: Any = begin(images)
        augment_columns(columns, views, (MEAN, STD))
        return columns

    return engine


def floor(size: int) -> Iterator[tuple[str, Engine]]:
    """The least that any engine must do: decode, and one resize."""

    def by_torch(images: list[bytes]) -> object:
        out = []
        for image in images:
            pixels = decode_jpeg(torch.frombuffer(bytearray(image), dtype=torch.uint8), ImageReadMode.RGB)[None]
            out.append(interpolate(pixels, (size, size), mode="bilinear", antialias=True))
        return out

    def by_pillow(images: list[bytes]) -> object:
        return [np.asarray(Image.open(io.BytesIO(i)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)) for i in images]

    yield "torchvision decode, torch resize", by_torch
    yield "Pillow decode and resize", by_pillow
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(1)

    def by_opencv(images: list[bytes]) -> object:
        return [cv2.resize(cv2.imdecode(np.frombuffer(i, np.uint8), cv2.IMREAD_COLOR), (size, size)) for i in images]

    yield "OpenCV decode and resize (no antialiasing)", by_opencv


# ---------------------------------------------------------------------------- anchors


class PillowBlur:
    """With probability 0.5, Pillow's Gaussian of radius U(0.1, 2)."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))) if random.random() < 0.5 else image


def original(views: ViewsConfig) -> Engine:
    """Every crop by itself: torchvision's Pillow transforms, then a float tensor."""
    transforms = [
        v1.Compose(
            [
                v1.RandomResizedCrop(group.size, scale=group.scale),
                v1.RandomHorizontalFlip(0.5),
                v1.RandomApply([v1.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
                v1.RandomGrayscale(0.2),
                PillowBlur(),
                v1.ToTensor(),
                v1.Normalize(MEAN, STD),
            ]
        )
        for group in views.values()
        for _ in range(group.count)
    ]

    def engine(images: list[bytes]) -> object:
        out = []
        for image in images:
            picture = Image.open(io.BytesIO(image)).convert("RGB")
            out.append([transform(picture) for transform in transforms])
        return out

    return engine


def torchvision_v2(views: ViewsConfig) -> Engine:
    """The same operations of `transforms.v2` on uint8 tensors."""
    transforms = [
        v2.Compose(
            [
                v2.RandomResizedCrop(group.size, scale=group.scale, antialias=True),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.5),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        for group in views.values()
        for _ in range(group.count)
    ]

    def engine(images: list[bytes]) -> object:
        out = []
        for image in images:
            picture = decode_jpeg(torch.frombuffer(bytearray(image), dtype=torch.uint8), ImageReadMode.RGB)
            out.append([transform(picture) for transform in transforms])
        return out

    return engine


def lightly(views: ViewsConfig) -> Engine:
    """lightly's SwaVTransform with the same sizes."""
    from lightly.transforms import SwaVTransform

    groups = list(views.values())
    transform = SwaVTransform(
        crop_sizes=tuple(g.size for g in groups),
        crop_counts=tuple(g.count for g in groups),
        crop_min_scales=tuple(g.scale[0] for g in groups),
        crop_max_scales=tuple(g.scale[1] for g in groups),
    )
    return lambda images: [transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]


def kornia(views: ViewsConfig) -> Engine:
    """kornia, batched: images of one size stacked, then every operation on the stack."""
    from kornia import augmentation as K

    transforms = [
        K.AugmentationSequential(
            K.RandomResizedCrop((group.size, group.size), scale=group.scale),
            K.RandomHorizontalFlip(),
            K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )
        for group in views.values()
        for _ in range(group.count)
    ]

    def engine(images: list[bytes]) -> object:
        tensors = [decode_jpeg(torch.frombuffer(bytearray(image), dtype=torch.uint8), ImageReadMode.RGB) for image in images]
        batch = torch.stack(tensors).float() / 255
        return [transform(batch) for transform in transforms]

    return engine


def albumentations(views: ViewsConfig) -> Engine:
    """albumentations on arrays that OpenCV has decoded."""
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)
    transforms = [
        A.Compose(
            [
                A.RandomResizedCrop(size=(group.size, group.size), scale=group.scale),
                A.HorizontalFlip(p=0.5),
                A.ColorJitter((0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2), p=0.8),
                A.ToGray(p=0.2),
                A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
                A.Normalize(MEAN, STD),
            ]
        )
        for group in views.values()
        for _ in range(group.count)
    ]

    def engine(images: list[bytes]) -> object:
        out = []
        for image in images:
            picture = cv2.cvtColor(cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            out.append([transform(image=picture)["image"].transpose(2, 0, 1) for transform in transforms])
        return out

    return engine


# ---------------------------------------------------------------------------- timing


def rates(engines: dict[str, Engine], images: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Images per second of CPU time, round by round, the engines in turn."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine(images[: min(8, len(images))])  # pays for imports and first allocations
    for _ in range(rounds):
        for name, engine in engines.items():
            begin = time.process_time()
            engine(images)
            found[name].append(len(images) / (time.process_time() - begin))
    return found


def stages(views: ViewsConfig, images: list[bytes], rounds: int) -> dict[str, float]:
    """Milliseconds per image of our stages, CPU time, least of all rounds."""
    spent: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.process_time()
        result = call()
        spent.setdefault(name, []).append(1000 * (time.process_time() - begin) / len(images))
        return result

    ids = np.arange(len(images))
    for _ in range(rounds):
        pictures = timed("decode", lambda: [decode(image) for image in images])
        heights, widths = (np.array([p.shape[axis] for p in pictures]) for axis in (0, 1))
        tables = timed("draw random numbers", lambda: draw_views(0, 0, ids, heights, widths, views))  # noqa: B023
        crops = timed("crop, resize, flip", lambda: cut_crops(pictures, tables, views))  # noqa: B023
        for step, change in photometric_steps().items():
            timed(step, lambda: change(crops, tables, views))  # noqa: B023
    return {name: min(times) for name, times in spent.items()}


def photometric_steps() -> dict[str, Callable[[Any, Any, ViewsConfig], None]]:
    """The device stage as a whole, and with single operations switched off; their cost is the difference."""

    def finish(**off: Any) -> Callable[[Any, Any, ViewsConfig], None]:
        def run(crops: Any, tables: Any, views: ViewsConfig) -> None:
            for name, group in views.items():
                table = tables[name].reshape(-1, len(COLUMNS)).copy()
                for column, value in off.items():
                    table[:, augment.COLUMN[column]] = value
                augment.augment_crops(torch.from_numpy(crops[name]).flatten(0, 1), table, group, MEAN, STD)

        return run

    none = {"jitter": 0, "grayscale": 0, "blur_sigma": 0, "solarize": 0}
    return {
        "finish: cast and normalise": finish(**none),
        "finish: with jitter": finish(**{k: v for k, v in none.items() if k != "jitter"}),
        "finish: with blur": finish(**{k: v for k, v in none.items() if k != "blur_sigma"}),
        "finish: everything": finish(),
    }


def twelve_megapixels(rounds: int) -> tuple[float, float]:
    """Milliseconds of one core for a photograph of 4000 x 3000 pixels: as it is done, and decoded whole."""
    images = []
    for index in (0, 4, 14, 17, 18):
        file = io.BytesIO()
        load_photo(index).resize((4000, 3000), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    threshold, found = decoding.LARGE_PIXELS, []
    for limit in (threshold, 10**9):
        decoding.LARGE_PIXELS = limit
        found.append(1000 / max(rates({"": cut(LARGE)}, images, rounds)[""]))
    decoding.LARGE_PIXELS = threshold
    return found[0], found[1]


def table(title: str, found: dict[str, list[float]], anchor: str) -> list[tuple[str, float, float]]:
    """Print medians and ratios to the anchor; the ratio is the median of the rounds' ratios."""
    print(f"\n{title}\n{'':44} {'images/s':>10} {'ratio':>7}")
    rows = []
    for name, values in found.items():
        ratio = float(np.median([v / a for v, a in zip(values, found[anchor], strict=True)]))
        rows.append((name, float(np.median(values)), ratio))
        print(f"{name:44} {rows[-1][1]:10.1f} {ratio:7.2f}")
    return rows


def chart(rows: list[tuple[str, float, float]], title: str, to: Path) -> None:
    """The ratios as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    names, ratios = [r[0] for r in rows][::-1], [r[2] for r in rows][::-1]
    bars = axes.barh(names, ratios, color=["#1f5fa8" if name.startswith("ours") else "#b8bfc7" for name in names])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(title=title, xlabel="images per second of one core, original transform = 1", xlim=(0, max(ratios) * 1.12))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=150)
    print(f"chart {to}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a folder of JPEGs in place of the built-in photographs")
    parser.add_argument("--quick", action="store_true", help="leave out the other libraries")
    parser.add_argument("--to", type=Path, default=Path("views-benchmark.png"), help="where the chart goes")
    options = parser.parse_args()
    torch.set_num_threads(1)

    images = photographs(options.data, options.images)
    engines = {
        "original transform": original(LARGE),
        "ours, uint8 views and tables": cut(LARGE),
        "ours, complete float views": complete(LARGE),
    }
    for name, engine in floor(224):
        engines[f"floor: {name}"] = engine
    if not options.quick:
        engines["torchvision v2 on tensors"] = torchvision_v2(LARGE)
        for library in (lightly, kornia, albumentations):
            try:
                engines[f"{library.__name__}"] = library(LARGE)
            except Exception as error:  # absent, or at odds with another package's version
                print(f"{library.__name__}: not measured ({type(error).__name__}: {error})")
    found = rates(engines, images, options.rounds)
    rows = table("2 x 224 + 6 x 96 from 500 x 375 JPEG, one core", found, "original transform")
    fastest = max((n for n in found if n.startswith("floor") and "no antialiasing" not in n), key=lambda n: float(np.median(found[n])))
    share = np.median([o / f for o, f in zip(found["ours, uint8 views and tables"], found[fastest], strict=True)])
    print(f"ours, uint8 views and tables, beside the floor ({fastest.removeprefix('floor: ')}): {share:.2f}")
    print("\nours, stage by stage, ms per image")
    for name, ms in stages(LARGE, images, options.rounds).items():
        print(f"  {name:42} {ms:6.2f}")
    chart(rows, "Multi-crop, 2 x 224 + 6 x 96 px", options.to)

    fraction, whole = twelve_megapixels(options.rounds)
    print(f"\n12 megapixels: {fraction:.0f} ms an image decoded at the fraction that its crops need, {whole:.0f} ms decoded whole")

    small = thumbnails(8 * options.images)
    engines = {
        "Pillow, image by image": original(SMALL),
        "ours, uint8 views and tables": cut(SMALL),
        "ours, complete float views": complete(SMALL),
    }
    table("2 x 32 + 4 x 16 from 32 x 32 JPEG, one core", rates(engines, small, options.rounds), "Pillow, image by image")
    print("\nours, stage by stage, ms per image")
    for name, ms in stages(SMALL, small, options.rounds).items():
        print(f"  {name:42} {ms:6.3f}")


if __name__ == "__main__":
    main()
