"""Decoding of images. The served model includes this file, so it must not import Ray."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb
PPM_HEADER = re.compile(rb"P6\s(\d{1,5})\s(\d{1,5})\s255\s")
LARGE_PIXELS = 4_000_000  # JPEGs with more pixels may be decoded at a fraction of their size (benchmarks/views.py)
ORIENTATION = 0x0112  # of EXIF; 5 and above turn an image by a right angle
SMALL = 64  # pixels; images up to this side are not enlarged before the centre crop

# Between half of the limit and the limit Pillow warns on stderr for every image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(ValueError):
    """An image that cannot be decoded; the message is a short reason."""


def large_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width, after EXIF orientation, of a JPEG of more than `LARGE_PIXELS`; None for every other image."""
    try:
        if data[:2] != b"\xff\xd8":
            return None
        width, height, bits, components = _jpeg_frame(data)
        if not LARGE_PIXELS < width * height <= MAX_PIXELS or bits != 8 or components not in (1, 3):
            return None
        turned = Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1) >= 5
        return (width, height) if turned else (height, width)
    except Exception:  # `decode` raises the reason
        return None


def decode(data: bytes, shrink: int = 1) -> np.ndarray:
    """Decode one image to RGB.

    EXIF orientation is applied, the first frame of an animation is taken, 16-bit values are scaled to 8 bits,
    transparency is composited on white.

    Args:
        data: an encoded image of any format that Pillow reads.
        shrink: 2, 4 or 8 divides height and width of a JPEG that has a `large_size`, rounded up. Only the low frequencies of its blocks
            are used, which is a low-pass filter.

    Returns:
        `(H, W, 3)` uint8; may be read-only.

    Raises:
        BadImage: empty, truncated or corrupt data, or more than 178 million pixels by its header.
    """
    if not data:
        raise BadImage("empty file")
    try:
        if data[:2] == b"P6" and (header := PPM_HEADER.match(data)):
            return _ppm(data, header)
        if shrink > 1:
            image = Image.open(io.BytesIO(data))
            image.draft("RGB", (-(-image.width // shrink), -(-image.height // shrink)))
            return _pillow(image)
        if data[:2] == b"\xff\xd8":
            return _jpeg(data)
        # PNG too goes through Pillow: torchvision's decode_png crashes the process on some damaged files
        return _pillow(Image.open(io.BytesIO(data)))
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels") from None
    except UnidentifiedImageError:
        raise BadImage("not an image that Pillow can read") from None
    except MemoryError:
        raise BadImage("does not fit in memory") from None
    except Exception as error:  # decoders of damaged files raise almost anything: SyntaxError, struct.error, EOFError ...
        raise BadImage(_short(error)) from None


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\w+, \S+\.cpp:\d+, ", "", lines[0])[:120]  # without torchvision's own file name


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is more than {MAX_PIXELS // 10**6} million pixels")
    if width < 1 or height < 1:
        raise BadImage("no pixels")


def _ppm(data: bytes, header: re.Match[bytes]) -> np.ndarray:
    width, height = int(header[1]), int(header[2])
    _check_size(width, height)
    if len(data) - header.end() < width * height * 3:
        raise BadImage("truncated")
    return np.frombuffer(data, np.uint8, width * height * 3, header.end()).reshape(height, width, 3)


def _jpeg(data: bytes) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_jpeg

    width, height, bits, components = _jpeg_frame(data)
    _check_size(width, height)
    if bits != 8 or components not in (1, 3):  # CMYK and YCCK: Pillow knows Adobe's inversion
        return _pillow(Image.open(io.BytesIO(data)))
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy, because torch warns of read-only buffers
    pixels: np.ndarray = decode_jpeg(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True).permute(1, 2, 0).numpy()
    return pixels


def _jpeg_frame(data: bytes) -> tuple[int, int, int, int]:
    """Return width, height, bits and components from the frame header, in less time than Pillow takes."""
    place = 2
    while place + 10 <= len(data):
        marker = data[place + 1]
        if data[place] != 0xFF:
            break
        if marker == 0xFF:  # padding
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
            return width, height, data[place + 4], data[place + 9]
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    raise BadImage("damaged JPEG header")


def _pillow(image: Image.Image) -> np.ndarray:
    _check_size(*image.size)
    image.load()  # the first frame; raises if truncated
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(image))
    else:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Return 16-bit, 32-bit or floating-point gray as `(H, W)` uint8: 16 bits scaled by their full range, others by their maximum."""
    orientation = ImageOps.exif_transpose(image)
    values = np.nan_to_num(np.asarray(orientation, dtype=np.float64), posinf=0, neginf=0)
    largest = values.max(initial=0)
    if image.mode.startswith("I;16") or 255 < largest <= 65535:
        values /= 257
    elif largest > 65535:
        values *= 255 / largest
    elif image.mode == "F" and largest <= 1:
        values *= 255
    levels: np.ndarray = np.rint(values.clip(0, 255)).astype(np.uint8)
    return levels


def evaluation_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Return the centre crop of an image at evaluation size.

    The short side is resized (antialiased, bilinear) to `size` up to 64 pixels and to `size * 256 / 224` above.

    Args:
        image: `(H, W, 3)` uint8.

    Returns:
        `(size, size, 3)` uint8.
    """
    height, width = image.shape[:2]
    short = size if size <= SMALL else round(size * 256 / 224)
    if max(height, width) > 4 * min(height, width):  # the far ends of a very long image never reach the crop
        reach = 2 * min(height, width)
        top, left = max(0, height // 2 - reach), max(0, width // 2 - reach)
        image = np.ascontiguousarray(image[top : height - top, left : width - left])
        height, width = image.shape[:2]
    if min(height, width) != short:
        scale = short / min(height, width)
        height, width = max(short, round(height * scale)), max(short, round(width * scale))
        pixels = torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)[None]
        pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
        image = pixels[0].permute(1, 2, 0).numpy()
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]
