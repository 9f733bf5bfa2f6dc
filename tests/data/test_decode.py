"""Every kind of image becomes (H, W, 3) uint8, or `BadImage` with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data.decode import BadImage, decode, evaluation_crop

GRADIENT = np.stack([*np.meshgrid(np.linspace(0, 255, 40), np.linspace(255, 0, 30)), np.full((30, 40), 90)], axis=2).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
def test_formats(kind: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    pixels = decode(encode(Image.fromarray(GRADIENT), kind, **options))
    assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - GRADIENT).max() <= {"JPEG": 12, "GIF": 40}.get(kind, 0)


def test_jpeg_equals_pillow() -> None:
    for image in (Image.fromarray(GRADIENT), Image.fromarray(GRADIENT[..., 0])):
        data = encode(image, "JPEG", quality=90)
        assert np.abs(decode(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(GRADIENT), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert decode(data).shape == expected.shape == (40, 30, 3)
    assert np.abs(decode(data).astype(int) - expected).max() <= 3


def test_gray_palette_alpha_cmyk_and_16_bits() -> None:
    image = Image.fromarray(GRADIENT)
    gray = decode(encode(image.convert("L"), "PNG"))
    assert (gray[..., 0] == gray[..., 2]).all() and gray.std() > 10
    assert np.abs(decode(encode(image.convert("P"), "PNG")).astype(int) - np.asarray(image.convert("P").convert("RGB"))).max() == 0
    clear = Image.fromarray(np.dstack([GRADIENT, np.zeros((30, 40), np.uint8)]))
    assert (decode(encode(clear, "PNG")) == 255).all()  # transparent is white
    half = decode(encode(Image.fromarray(np.dstack([GRADIENT, np.full((30, 40), 128, np.uint8)])), "PNG"))
    assert np.abs(half - (GRADIENT * (128 / 255) + 127)).max() < 2
    cmyk = encode(image.convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(cmyk).astype(int) - GRADIENT).mean() < 6
    deep = (np.arange(1200, dtype=np.uint16) * 54).reshape(30, 40)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encode(Image.fromarray(deep), kind))
        assert np.abs(pixels[..., 1] - deep / 257).max() <= 0.51
    floats = decode(encode(Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)), "TIFF"))
    assert floats.max() == 255 and floats.min() == 0


def test_palette_with_transparent_colour() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    assert (decode(encode(image, "PNG", transparency=1)) == 255).all()
    assert (decode(encode(image, "PNG", transparency=0)) == [200, 100, 50]).all()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert (decode(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)) == [255, 0, 0]).all()


def bomb_png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def bomb_jpeg() -> bytes:
    data = encode(Image.fromarray(GRADIENT), "JPEG")
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + data[frame + 9 :]


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"hello, this is a text", "not an image"),
        (encode(Image.fromarray(GRADIENT), "JPEG")[:500], "truncated|premature"),
        (encode(Image.fromarray(GRADIENT), "JPEG")[:3], "header"),
        (encode(Image.fromarray(GRADIENT), "PNG")[:-60], "truncated"),
        (encode(Image.fromarray(GRADIENT), "PPM")[:-60], "truncated"),
        (encode(Image.fromarray(GRADIENT), "TIFF")[:-2000], "."),
        (encode(Image.fromarray(GRADIENT), "WEBP")[:60], "."),
        (b"P6\n70000 70000\n255\n", "million pixels"),
        (bomb_png(40_000), "million pixels"),
        (bomb_jpeg(), "million pixels"),
        (b"\xff\xd8" + bytes(200), "header"),
    ],
)
def test_bad_images(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data)
    assert 0 < len(str(caught.value)) <= 160 and not set("\n/") & set(str(caught.value))


def test_random_damage_never_escapes() -> None:
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        data = np.frombuffer(encode(Image.fromarray(GRADIENT), kind), np.uint8)
        for _ in range(30):
            broken = data.copy()
            broken[random.integers(0, len(data), 8)] = random.integers(0, 256, 8)
            try:
                pixels = decode(broken.tobytes())
            except BadImage:
                continue
            assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8


@pytest.mark.parametrize("size, short", [(32, 32), (64, 64), (112, 128), (224, 256)])
def test_evaluation_crop(size: int, short: int) -> None:
    image = np.zeros((300, 500, 3), np.uint8)
    image[:, 250:] = 200
    crop = evaluation_crop(image, size)
    assert crop.shape == (size, size, 3)
    assert (crop[:, : size // 2 - 2] == 0).all() and (crop[:, size // 2 + 2 :] == 200).all()  # the centre stays in the centre
    scaled = np.asarray(Image.fromarray(np.tile(np.arange(300, dtype=np.float32)[:, None] * 0.8, 300).astype(np.uint8)).convert("RGB"))
    rows = evaluation_crop(scaled, size)[:, size // 2, 0].astype(float)
    slope = np.polyfit(np.arange(size), rows, 1)[0]
    assert abs(slope - 0.8 * 300 / short) < 0.03 * slope  # the short side became `short`


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 1, 3), (5, 20_000, 3), (20_000, 5, 3), (33, 32, 3)])
def test_evaluation_crop_of_odd_shapes(shape: tuple[int, ...]) -> None:
    assert evaluation_crop(np.full(shape, 7, np.uint8), 32).shape == (32, 32, 3)
    assert (evaluation_crop(np.full(shape, 7, np.uint8), 96) == 7).all()
