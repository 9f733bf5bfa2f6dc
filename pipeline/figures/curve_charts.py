"""Picture of the metrics of a run over its steps. PNG, colour-blind-safe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.figures.style import BLUE, PALE, VERMILLION, note, picture_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "loss": "loss",
    "lr": "learning rate",
    "knn": "online kNN, held-out images",
    "cluster_min": "smallest cluster, 1 = even share",
    "cluster_max": "largest cluster, 1 = even share",
    "clusters_empty": "share of clusters that are empty",
    "clusters_empty_epoch": "share of clusters empty for an epoch",
    "assignment_entropy": "entropy of cluster sizes / ln K",
    "nmi": "NMI of clusters and labels",
    "images_per_s": "throughput, images/s",
}


def read_metrics(metrics_jsonl: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return every metric of a run as (steps, values), in the order of its first point. Of a repeated step the last value counts.

    Values that are not finite, and an incomplete last line, are left out.
    """
    series: dict[str, dict[int, float]] = {}
    lines = metrics_jsonl.read_text(encoding="utf-8", errors="replace").splitlines() if metrics_jsonl.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
            values = row["metrics"] if isinstance(row.get("metrics"), dict) else row
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, value in values.items():
            if name not in ("step", "epoch", "time", "timestamp") and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, {})[step] = float(value)
    return {
        name: (np.array(sorted(points), dtype=np.int64), np.array([points[s] for s in sorted(points)])) for name, points in series.items()
    }


def curves(metrics_jsonl: Path, path: Path, *, chance: tuple[float, str] | None = None, title: str = "Training") -> Path:
    """Draw a panel for each metric of a run over the logarithm of steps: loss, learning rate, online kNN, then the others.

    Long curves show the mean (line) and the range (band) of up to 200 bins of equal width on the axis.

    Args:
        metrics_jsonl: one JSON object in each line, with `step` and the metrics.
        path: the PNG to write.
        chance: the loss at chance level and its formula, e.g. `(math.log(3000), "ln K")`.
        title: headline.

    Raises:
        ConfigError: there is no point to draw.
    """
    series = {name: points for name, points in read_metrics(metrics_jsonl).items() if _is_curve(name, points[1])}
    if not series:
        raise ConfigError(f"metrics={metrics_jsonl}: holds no points yet; draw the curves after the first steps of training")
    first = [name for name in ("loss", "knn", "lr") if name in series]
    last = [name for name in ("images_per_s",) if name in series]
    names = first + [name for name in series if name not in first + last] + last
    columns = {1: 1, 2: 2, 4: 2, 7: 4, 8: 4, 10: 4, 13: 5}.get(len(names), 3)  # no single panel in the last row
    rows = math.ceil(len(names) / columns)
    low = max(1, min(int(steps[0]) for steps, _ in series.values()))
    high = max(low, *(int(steps[-1]) for steps, _ in series.values()))
    with picture_at(path, max(3.7 * columns, 4.2), 2.35 * rows + 0.85) as figure:
        figure.suptitle(title, x=0.012, ha="left", size=13, weight="bold")
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        grid = figure.subplots(rows, columns, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(names):
                axes.remove()
                continue
            name = names[place]
            steps, values = series[name]
            _curve(axes, np.maximum(steps, 1), values)  # a logarithmic axis has no 0
            axes.set_title(TITLES.get(name, name.replace("_", " ").replace("/", ": ")))
            axes.set_title(_number(name, values[-1]), loc="right", color=BLUE, weight="bold")
            _step_axis(axes, low, high)
            if place + columns >= len(names):
                axes.set_xlabel("optimizer step")
            if name == "knn":
                axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")
            if name == "images_per_s":
                axes.set_ylim(bottom=0)
            if name == "loss" and chance:
                axes.axhline(chance[0], color=VERMILLION, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
                text = f"chance: {chance[1]} = {chance[0]:.2f}"
                note(axes, text, (1, chance[0]), ("axes fraction", "data"), (0, 3), ha="right", size=8, color=VERMILLION)
                axes.margins(y=0.14)
    return path


def _is_curve(name: str, values: np.ndarray) -> bool:
    """Return whether to draw a metric: not final scores and the chance level, and not metrics that are usually 0 while they are 0."""
    return not (name.startswith("final/") or name == "loss_chance" or (name in ("bad_images", "cluster_min") and not values.any()))


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, most: int = 200) -> None:
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    if len(steps) > most:
        edges = np.geomspace(steps[0], steps[-1] + 1, most + 1)
        bins = np.searchsorted(edges, steps, side="right")
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        counts = np.diff(starts, append=len(steps))
        axes.fill_between(
            np.add.reduceat(steps, starts) / counts,
            np.minimum.reduceat(values, starts),
            np.maximum.reduceat(values, starts),
            color=BLUE,
            alpha=0.18,
            linewidth=0,
        )
        steps, values = np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts
    few = len(steps) <= 25
    axes.plot(steps, values, color=BLUE, linewidth=1.5, marker="o" if few else "", markersize=3.5, zorder=2, clip_on=not few)


def _step_axis(axes: Axes, low: int, high: int) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low / 1.05, max(high * 1.05, low * 2))
    axes.xaxis.set_major_formatter(lambda v, _: _short(v))
    if high / low < 30:  # a logarithmic locator would give one tick or none
        ticks = sorted({low, round(math.sqrt(low * high)), high})
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _short(steps: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if steps >= size and steps % (size / 10) == 0:
            return f"{steps / size:g}{letter}"
    return f"{steps:g}"


def _number(name: str, value: float) -> str:
    if name == "knn":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
