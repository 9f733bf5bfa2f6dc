"""Small images and tars that several tests write."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def png(value: int, size: int = 8) -> bytes:
    """A PNG of one colour; different values give different bytes."""
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), (value % 256, value // 256, 7), np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> None:
    """A tar with these members in this order."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
