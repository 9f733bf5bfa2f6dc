"""Pictures of a run or a model, by name. A picture is a decorated function in this folder, found like a recipe.

Listing them imports no heavy library. `context.py` has their data; `*_charts.py` and other files draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from methods.parts.errors import ConfigError
from pipeline.discovery import Entry, discover, import_entry
from pipeline.shell import program

if TYPE_CHECKING:
    from pipeline.figures.context import FigureContext

Drawer = Callable[["FigureContext", Path], Path]


class NothingToDraw(ConfigError):
    """This run or model lacks the data of the picture."""


@dataclass(frozen=True)
class Picture:
    """One kind of picture; `draw(subject, path)` writes the PNG, or raises `NothingToDraw`."""

    name: str
    draw: Drawer
    every_run: bool  # drawn at the end of every run that has its data


_pictures: dict[str, Picture] = {}


def picture(name: str, *, every_run: bool = True) -> Callable[[Drawer], Drawer]:
    """Register a function as a picture (decorator)."""

    def add(draw: Drawer) -> Drawer:
        _pictures[name] = Picture(name, draw, every_run)
        return draw

    return add


def entries() -> list[Entry]:
    """Return every picture, without importing its file."""
    return discover(Path(__file__).parent, __package__, "picture")


def find(name: str) -> Picture:
    """Return the picture of a name.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest names.
    """
    import_entry(entries(), name, "figure", f"{program()} figure --help")
    return _pictures[name]


def draw_for_run(subject: FigureContext, folder: Path) -> list[Path]:
    """Draw the pictures of a finished run as `folder/NAME.png`, except those whose data it lacks."""
    drawn = []
    for entry in entries():
        found = find(entry.name)
        if found.every_run:
            try:
                drawn.append(found.draw(subject, folder / f"{entry.name}.png"))
            except NothingToDraw:
                continue
    return drawn
