"""Pictures of a run or a model, by name. A picture is a function of a file in this folder, found like recipes are.

Listing them imports nothing heavy. `context.py` has what they are drawn of; `charts.py` and its neighbours draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from methods.parts.errors import ConfigError
from pipeline.marked import Marked, import_marked, marked
from pipeline.shell import program

if TYPE_CHECKING:
    from pipeline.figures.context import FigureContext

Drawer = Callable[["FigureContext", Path], Path]


class NothingToDraw(ConfigError):
    """This run or model has not what the picture shows."""


@dataclass(frozen=True)
class Picture:
    """One kind of picture; `draw(subject, path)` writes the PNG, or raises `NothingToDraw`."""

    name: str
    draw: Drawer
    every_run: bool  # drawn at the end of every run that has what it shows


_pictures: dict[str, Picture] = {}


def picture(name: str, *, every_run: bool = True) -> Callable[[Drawer], Drawer]:
    """Decorator: make a function known as a picture."""

    def add(draw: Drawer) -> Drawer:
        _pictures[name] = Picture(name, draw, every_run)
        return draw

    return add


def entries() -> list[Marked]:
    """Every picture, without importing the files that hold them."""
    return marked(Path(__file__).parent, __package__, "picture")


def find(name: str) -> Picture:
    """The picture of a name.

    Raises:
        ConfigError: there is none; the message gives the nearest.
    """
    import_marked(entries(), name, "figure", f"{program()} figure --help")
    return _pictures[name]


def draw_for_run(subject: FigureContext, folder: Path) -> list[Path]:
    """The pictures that a finished run gets, as `folder/NAME.png`; those it has nothing for are left out."""
    drawn = []
    for entry in entries():
        found = find(entry.name)
        if found.every_run:
            try:
                drawn.append(found.draw(subject, folder / f"{entry.name}.png"))
            except NothingToDraw:
                continue
    return drawn
