"""How training ended, in words that need nothing slow to load: a driver reads them when its workers have ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.evaluate.protocols import Scores


@dataclass(frozen=True)
class Done:
    """How a worker's training ended. Only rank 0 of a complete run has scores and names of pictures."""

    step: int
    complete: bool
    scores: Scores | None = None
    pictures: list[str] = field(default_factory=list)
