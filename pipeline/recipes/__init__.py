"""Recipes: named starting points. One file per method; a recipe is a function that returns a full `RunConfig`.

Recipes are found by reading the files of this folder, so listing them imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.discovery import Entry, discover, import_entry
from pipeline.shell import program

if TYPE_CHECKING:
    from pipeline.config import RunConfig

_functions: dict[str, Callable[[], RunConfig]] = {}


def recipe(name: str) -> Callable[[Callable[[], RunConfig]], Callable[[], RunConfig]]:
    """Decorator: make a function known as a recipe."""

    def add(function: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
        _functions[name] = function
        return function

    return add


def entries() -> list[Entry]:
    """Every recipe, without importing the files that hold them."""
    return discover(Path(__file__).parent, __name__, "recipe")


def load_recipe(name: str) -> RunConfig:
    """The config of a recipe.

    Raises:
        ConfigError: no recipe of that name; the message gives the nearest.
    """
    import_entry(entries(), name, "recipe", f"{program()} recipes")
    return replace(_functions[name](), recipe=name)
