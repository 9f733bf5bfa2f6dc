"""Fields of settings: the limits and the search range of each stand beside its default, as metadata of the dataclass field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from methods.parts.errors import require


@dataclass(frozen=True)
class SearchRange:
    """A sensible range of a setting for a hyperparameter search: plain values, which `tuning/space.py` translates."""

    low: float | None = None
    high: float | None = None
    scale: Literal["log", "linear", "int", "choice"] = "log"
    choices: tuple[Any, ...] = ()
    reason: str = ""
    around: float | None = None  # instead of low and high: the setting's own value divided by this, and multiplied


def limited(default: Any, holds: Callable[[Any], bool], remedy: str, search: SearchRange | None = None) -> Any:
    """Return a field whose value must satisfy `holds`; where the default is None, None is a value too."""
    if default is None:
        holds, remedy = _or_none(holds), f"{remedy}, or leave it out"
    return dataclasses.field(default=default, metadata={"limit": (holds, remedy)} | ({"search": search} if search else {}))


def positive(default: float | None, search: SearchRange | None = None) -> Any:
    """Return a field for a number above 0."""
    return limited(default, lambda value: value > 0, f"use a positive number{_example(default)}", search)


def at_least(low: float, default: float | None, search: SearchRange | None = None) -> Any:
    """Return a field for a number of `low` or more."""
    return limited(default, lambda value: value >= low, f"use {low} or more{'' if default == low else _example(default)}", search)


def fraction(default: float, search: SearchRange | None = None) -> Any:
    """Return a field for a number in [0, 1]."""
    return limited(default, lambda value: 0 <= value <= 1, f"use a number from 0 to 1{_example(default)}", search)


def below_one(default: float, search: SearchRange | None = None) -> Any:
    """Return a field for a number in [0, 1)."""
    return limited(default, lambda value: 0 <= value < 1, f"use a fraction in [0, 1){_example(default)}", search)


def searchable(default: Any, search: SearchRange) -> Any:
    """Return a field with a search range and without limits."""
    return dataclasses.field(default=default, metadata={"search": search})


def check_limits(settings: Any, prefix: str = "") -> None:
    """Check every field of a dataclass value against its limits.

    Args:
        prefix: what stands before the keys in the message, e.g. `method.`.

    Raises:
        ConfigError: a value is beyond its limits.
    """
    for f in dataclasses.fields(settings):
        if "limit" in f.metadata:
            holds, remedy = f.metadata["limit"]
            value = getattr(settings, f.name)
            require(holds(value), f"{prefix}{f.name}", value, remedy)


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _example(default: float | None) -> str:
    return "" if default is None or default == 0 else f", e.g. {default:g}"
