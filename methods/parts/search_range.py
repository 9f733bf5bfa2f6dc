"""Search ranges: plain values beside the settings they belong to, as metadata of a dataclass field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class SearchRange:
    """A sensible range of a setting for a hyperparameter search; plain values, translated by `tuning/spaces.py`."""

    low: float | None = None
    high: float | None = None
    scale: Literal["log", "linear", "int", "choice"] = "log"
    choices: tuple[Any, ...] = ()
    reason: str = ""
    around: float | None = None  # instead of low and high: the setting's own value divided by this, and multiplied


def searchable(default: Any, search: SearchRange) -> Any:
    """A dataclass field with its search range beside it."""
    return field(default=default, metadata={"search": search})
