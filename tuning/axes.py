"""What the pictures of a sweep share: where the values of a knob lie on an axis, its ticks, a headline, the ticks of a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.figures.style import GRAY, picture_at, write
from tuning.results import Knob, Sweep, Trial, show_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Place:
    """Where a knob's values lie: numbers as they are, choices side by side in their order."""

    knob: Knob
    names: tuple[Any, ...]  # of categories; empty for numbers
    low: float = 0.0  # of numbers: the searched range, or that of the values where they go beyond it (PBT)
    high: float = 1.0

    def __call__(self, value: Any) -> float:
        return float(self.names.index(value)) if self.names else float(value)

    @property
    def log(self) -> bool:
        return self.knob.scale == "log" and not self.names

    def height(self, x: float) -> float:
        """The place as a fraction in [0, 1] of the axis."""
        if self.names:
            return (x + 0.5) / len(self.names)
        change: Callable[[float], float] = math.log if self.log else float
        low, high = change(self.low), change(self.high)
        return (change(x) - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Round numbers within the range."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.names:
            return [float(i) for i in range(len(self.names))]
        if self.high <= self.low:
            return [self.low]
        if not self.log:
            found = MaxNLocator(5, integer=self.knob.scale == "int").tick_values(self.low, self.high)
        else:
            decades = math.log10(self.high / self.low)
            subs = (1, 2, 5) if decades < 1.3 else (1, 3) if decades < 2.5 else (1,)
            found = LogLocator(subs=subs, numticks=12).tick_values(self.low, self.high)
        slack = 1e-9 * abs(self.high)
        return [float(t) for t in found if self.low - slack <= t <= self.high + slack]

    def tick_words(self) -> list[str]:
        return [brief(name) for name in self.names] or [f"{t:,g}" for t in self.ticks()]


def place(knob: Knob, trials: Sequence[Trial]) -> Place:
    """The axis of a knob for the values that trials ran with."""
    values = [t.values[knob.name] for t in trials if knob.name in t.values]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    ends = [v for v in (knob.low, knob.high) if v is not None]
    if knob.scale == "choice" or not numbers or not (values or ends) or (knob.scale == "log" and min([*values, *ends]) <= 0):
        others = [v for v in dict.fromkeys(values) if v not in knob.choices]
        return Place(knob, (*knob.choices, *others))
    return Place(knob, (), float(min([*values, *ends])), float(max([*values, *ends])))


def knob_axis(axes: Axes, where: Place) -> None:
    """Make the x axis that of a knob."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xlabel(where.knob.label + (" (log scale)" if where.log else ""))
    if where.names:
        crowded = len(where.names) > 6 or any(len(brief(n)) > 9 for n in where.names)
        style: dict[str, Any] = {"rotation": 30, "ha": "right"} if crowded else {}
        axes.set_xticks(range(len(where.names)), where.tick_words(), **style)
        axes.set_xlim(-0.5, len(where.names) - 0.5)
        return
    low, high = where.low, where.high
    if where.log:
        axes.set_xscale("log")
        margin = (high / low) ** 0.06 if high > low else 2
        axes.set_xlim(low / margin, high * margin)
    else:
        margin = 0.06 * (high - low) or max(abs(high), 1) * 0.1
        axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(FixedLocator(where.ticks()))
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:,g}")
    axes.xaxis.set_minor_locator(NullLocator())


@contextmanager
def titled(path: Path, width: float, height: float, title: str, words: str) -> Iterator[Figure]:
    """A figure with a headline and one line below it."""
    with picture_at(path, width, height) as figure:
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08, rect=(0, 0, 1, 1 - 0.75 / height))
        write(figure, 0.12, 0.32, title, size=13, weight="bold")
        write(figure, 0.12, 0.57, words, size=8.5, color=GRAY)
        yield figure


def score_ticks(sweep: Sweep) -> Callable[[float, Any], str]:
    return (lambda v, _: f"{100 * v:g} %") if sweep.percent else (lambda v, _: f"{v:g}")


def brief(value: Any) -> str:
    return shortened(show_value(value), 14)


def shortened(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"
