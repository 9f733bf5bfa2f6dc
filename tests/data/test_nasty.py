"""Sixty nasty files among good ones, from folder to batch: every good one arrives, every bad one is listed with its reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from methods.parts.views import CropGroup
from pipeline.config import DataConfig
from pipeline.data.loader import TrainLoader
from pipeline.data.sources.base import open_source

VIEWS = {"global": CropGroup(count=1, size=16)}
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(b"\0" * 100)) + part(b"IEND", b"")


def good_files() -> dict[str, bytes]:
    """What looks strange and is an image."""
    gray, deep = PICTURE.convert("L"), Image.fromarray(PIXELS[..., 0].astype(np.uint16) << 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "one-pixel.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "thin.png": encoded(Image.new("RGB", (1, 5000), "red"), "PNG"),
        "flat.jpg": encoded(Image.new("RGB", (5000, 1), "red"), "JPEG"),
        "really-a-png.jpg": encoded(PICTURE, "PNG"),
        "really-a-jpeg.png": encoded(PICTURE, "JPEG"),
        "really-a-gif.webp": encoded(PICTURE, "GIF"),
        "animated.gif": encoded(PICTURE, "GIF", save_all=True, append_images=[gray.convert("RGB")]),
        "animated.webp": encoded(PICTURE, "WEBP", save_all=True, append_images=[gray.convert("RGB")]),
        "deep.png": encoded(deep, "PNG"),
        "deep.tiff": encoded(deep, "TIFF"),
        "float.tif": encoded(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"),
        "cmyk.jpg": encoded(PICTURE.convert("CMYK"), "JPEG"),
        "cmyk.tiff": encoded(PICTURE.convert("CMYK"), "TIFF"),
        "palette.png": encoded(PICTURE.convert("P"), "PNG"),
        "palette-clear.png": encoded(PICTURE.convert("P"), "PNG", transparency=3),
        "bits.png": encoded(PICTURE.convert("1"), "PNG"),
        "gray.jpg": encoded(gray, "JPEG"),
        "gray-alpha.png": encoded(PICTURE.convert("LA"), "PNG"),
        "alpha.webp": encoded(PICTURE.convert("RGBA"), "WEBP"),
        "turned.jpg": encoded(PICTURE, "JPEG", exif=exif),
        "progressive.jpg": encoded(PICTURE, "JPEG", progressive=True),
        "trailing.jpg": encoded(PICTURE, "JPEG") + b"more bytes" * 100,
        "UPPER.JPEG": encoded(PICTURE, "JPEG"),
        "spaces and ünïcode.png": encoded(PICTURE, "PNG"),
        "plain.bmp": encoded(PICTURE, "BMP"),
        "plain.ppm": encoded(PICTURE, "PPM"),
    }
    return files


def bad_files() -> dict[str, bytes]:
    """What has an image's name and is none."""
    files = {
        "zero.jpg": b"",
        "zero.png": b"",
        "text.jpg": b"this is a text file\n" * 20,
        "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
        "noise.webp": np.random.default_rng(1).bytes(3000),
        "huge.png": png_header(30_000, 30_000),
        "wide.png": png_header(2**31 - 1, 1),
        "empty.png": png_header(0, 0),
        "huge.ppm": b"P6 30000 30000 255\n" + bytes(1000),
        "zeros.jpg": bytes(4096),
    }
    for kind, name in (("JPEG", "cut{:02}.jpg"), ("PNG", "cut{:02}.png"), ("GIF", "cut{:02}.gif"), ("WEBP", "cut{:02}.webp")):
        whole = encoded(PICTURE, kind)
        for i, part in enumerate((0.02, 0.1, 0.25, 0.4, 0.6, 0.8)):
            files[name.format(i)] = whole[: max(4, int(part * len(whole)))]
    return files


def test_every_good_image_arrives_and_every_bad_one_is_listed(ray_local: None, tmp_path: Path) -> None:
    good, bad = good_files(), bad_files()
    assert len(good) + len(bad) == 60
    plain = {f"plain-{i:02}.jpg": encoded(Image.fromarray(np.roll(PIXELS, i, 0)), "JPEG") for i in range(36)}
    for name, data in (good | bad | plain).items():
        (tmp_path / name).write_bytes(data)
    dataset = open_source(DataConfig(path=str(tmp_path)))
    count = len(good) + len(bad) + len(plain)
    assert len(dataset) == count == 96
    sampler = dataset.make_sampler(seed=0, held_out=0.0, global_batch=24, num_shards=2, images_per_task=24, steps_per_epoch=0)
    batches = list(TrainLoader(dataset, sampler, VIEWS, 0, sampler.steps_per_epoch).batches(tasks=2))
    names = [Path(dataset.path(i)).name for i in range(count)]
    listed = {Path(slot.path).name: slot.reason for batch in batches for slot in batch.bad}
    assert set(listed) == set(bad) and all(0 < len(reason) < 200 and "\n" not in reason for reason in listed.values())
    shown = {names[int(i)] for batch in batches for i in batch.ids}
    assert shown == set(good) | set(plain), "and no slot is empty"
