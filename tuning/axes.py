"""The axis of a searched setting, and what the pictures of a sweep share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.figures.style import BLUE, GRAY, VERMILLION, picture_at, write
from tuning.results import Results
from tuning.space import Param
from tuning.sweep import Trial, show_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AxisScale:
    """Where the values of a searched setting lie on an axis: numbers as they are, choices side by side in their order."""

    label: str
    names: tuple[Any, ...]  # of choices; empty for numbers
    low: float = 0.0  # of numbers: the searched range, or that of the values where they go beyond it (PBT)
    high: float = 1.0
    log: bool = False
    whole: bool = False

    @classmethod
    def of(cls, param: Param, label: str, trials: Sequence[Trial]) -> AxisScale:
        """Return the scale for the values that trials ran with."""
        values = [t.values[param.key] for t in trials if param.key in t.values]
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        ends = [v for v in (param.low, param.high) if v is not None]
        if param.choices or not numbers or not (values or ends) or (param.scale == "log" and min([*values, *ends]) <= 0):
            return cls(label, tuple(dict.fromkeys([*param.choices, *values])))
        low, high = float(min([*values, *ends])), float(max([*values, *ends]))
        return cls(label, (), low, high, log=param.scale == "log", whole=param.scale == "int")

    def __call__(self, value: Any) -> float:
        return float(self.names.index(value)) if self.names else float(value)

    def height(self, x: float) -> float:
        """Return the place of `x` as a fraction in [0, 1] of the axis."""
        if self.names:
            return (x + 0.5) / len(self.names)
        change: Callable[[float], float] = math.log if self.log else float
        low, high = change(self.low), change(self.high)
        return (change(x) - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Return round numbers within the range."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.names:
            return [float(i) for i in range(len(self.names))]
        if self.high <= self.low:
            return [self.low]
        if not self.log:
            found = MaxNLocator(5, integer=self.whole).tick_values(self.low, self.high)
        else:
            decades = math.log10(self.high / self.low)
            subs = (1, 2, 5) if decades < 1.3 else (1, 3) if decades < 2.5 else (1,)
            found = LogLocator(subs=subs, numticks=12).tick_values(self.low, self.high)
        slack = 1e-9 * abs(self.high)
        return [float(t) for t in found if self.low - slack <= t <= self.high + slack]

    def tick_labels(self) -> list[str]:
        return [shorten(show_value(name), 14) for name in self.names] or [f"{t:,g}" for t in self.ticks()]

    def apply(self, axes: Axes) -> None:
        """Make it the x axis."""
        axes.set_xlabel(self.label + (" (log scale)" if self.log else ""))
        low, high, labels = self.low, self.high, self.tick_labels()
        crowded = bool(self.names) and (len(labels) > 6 or any(len(label) > 9 for label in labels))
        if self.names:
            axes.set_xlim(-0.5, len(self.names) - 0.5)
        elif self.log:
            axes.set_xscale("log")
            margin = (high / low) ** 0.06 if high > low else 2
            axes.set_xlim(low / margin, high * margin)
        else:
            margin = 0.06 * (high - low) or max(abs(high), 1) * 0.1
            axes.set_xlim(low - margin, high + margin)
        axes.set_xticks(self.ticks(), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
        axes.minorticks_off()


@contextmanager
def titled(path: Path, width: float, height: float, title: str, words: str) -> Iterator[Figure]:
    """A figure with a headline and one line below it."""
    with picture_at(path, width, height) as figure:
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08, rect=(0, 0, 1, 1 - 0.75 / height))
        write(figure, 0.12, 0.32, title, size=13, weight="bold")
        write(figure, 0.12, 0.57, words, size=8.5, color=GRAY)
        yield figure


def bands(results: Results, *, spread: bool) -> list[tuple[float, float, str, str]]:
    """Return the ranges of scores that are chance, as low, high, name and colour: the untrained networks', and that around the best.

    Args:
        spread: with the one around the best, which is the standard deviation over seeds.
    """
    found = []
    untrained = [trial.curve[0] for trial in results.trials if 0 in trial.curve]
    if untrained:
        found.append((min(untrained), max(untrained), "untrained network", VERMILLION))
    if spread and results.seed_spread is not None:
        best, reach = results.best.mean, results.seed_spread
        found.append((best - reach, best + reach, "best setting ± standard deviation over seeds", BLUE))
    return found


def draw_bands(axes: Axes, results: Results, *, spread: bool) -> None:
    """Draw the ranges of `bands` behind the scores of the y axis."""
    for low, high, _, colour in bands(results, spread=spread):
        axes.axhspan(low, high, facecolor=(colour, 0.15), edgecolor=(colour, 0.6), linewidth=1.2, zorder=0)


def band_handles(results: Results, *, spread: bool) -> list[Any]:
    """Return the ranges of `bands` for a legend."""
    from matplotlib.patches import Patch

    return [Patch(color=colour, alpha=0.25, label=name) for _, _, name, colour in bands(results, spread=spread)]


def score_ticks(results: Results) -> Callable[[float, Any], str]:
    return (lambda v, _: f"{100 * v:g} %") if results.percent else (lambda v, _: f"{v:g}")


def shorten(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"
