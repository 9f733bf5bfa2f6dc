"""Style and helpers of all pictures: the palette, a figure that is saved atomically, axes placed in inches."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.storage.place import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for common kinds of colour blindness
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GROUP_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
INK, GRAY, PALE = "#222222", "#767676", "#D9D9D9"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "white",
}


@contextmanager
def picture_at(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of width x height inches. It is saved atomically at `path` after the block, if there is no error."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it keeps global state and may open a display
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=150)
        FigureCanvasAgg(figure)
        yield figure
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, picture.getvalue())


def cell(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes without ticks; the arguments are inches from the top left corner of the figure."""
    full_width, full_height = figure.get_size_inches()
    axes = figure.add_axes((left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def write(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    full_width, full_height = figure.get_size_inches()
    figure.text(left / full_width, 1 - top / full_height, text, **style)


def show(axes: Axes, image: np.ndarray, inches: float) -> None:
    """Draw an image in its own pixel coordinates: small ones as crisp squares, large ones reduced before they are resampled."""
    from PIL import Image

    image = to_uint8(image)
    height, width = image.shape[:2]
    pixels = inches * 150
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    factor = int(max(height, width) / (2 * pixels))
    if factor > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    axes.imshow(image, extent=extent, interpolation="nearest" if max(height, width) < pixels / 2 else "antialiased", aspect="equal")


def to_uint8(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8:
        image = np.round(np.nan_to_num(image.astype(np.float32)).clip(0, 1) * 255).astype(np.uint8)
    return image


def frame(axes: Axes, colour: str, width: float) -> None:
    axes.spines[:].set(visible=True, color=colour, linewidth=width)


def note(axes: Axes, text: str, at: tuple[float, float], coordinates: Any, offset: tuple[float, float], **style: Any) -> None:
    """Write text at a position of the axes, plus `offset` points."""
    axes.annotate(text, at, xycoords=coordinates, xytext=offset, textcoords="offset points", annotation_clip=False, **style)
