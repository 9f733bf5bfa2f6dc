"""Picture of the metrics of a run over its steps. PNG, colour-blind-safe."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.figures.style import BLUE, GRAY, PALE, VERMILLION, note, picture_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4  # of small panels
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


def curves(
    metrics_jsonl: Path,
    path: Path,
    *,
    chance: tuple[float, str] | None = None,
    baselines: Mapping[str, float] | None = None,
    title: str = "Training",
) -> Path:
    """Draw the loss and the online kNN large, and below them a small panel for each other metric of a run.

    Long curves show the mean (line) and the range (band) of up to 200 bins of equal width.

    Args:
        metrics_jsonl: one JSON object in each line, with `step` and the metrics.
        path: the PNG to write.
        chance: the loss at chance level and its formula, e.g. `(math.log(3000), "ln K")`.
        baselines: kNN accuracies to compare with, by name; the untrained backbone's is the curve's first point.
        title: headline.

    Raises:
        ConfigError: there is no point to draw.
    """
    from matplotlib.ticker import EngFormatter

    series = {name: points for name, points in read_metrics(metrics_jsonl).items() if _is_curve(name, points[1])}
    if not series:
        raise ConfigError(f"metrics={metrics_jsonl}: holds no points yet; draw the curves after the first steps of training")
    large = [name for name in ("loss", "knn") if name in series]
    small = sorted((name for name in series if name not in large), key=lambda name: (name == "images_per_s", name != "lr"))
    rows: list[list[str]] = [[name for name in large for _ in range(COLUMNS // len(large))]] * 2 if large else []
    small += ["."] * (-len(small) % COLUMNS)  # no panel
    rows += [small[first : first + COLUMNS] for first in range(0, len(small), COLUMNS)]
    with picture_at(path, 3.1 * COLUMNS, 1.9 * len(rows) + 0.6) as figure:
        figure.suptitle(title, x=0.012, ha="left", size=13, weight="bold")
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        panels: dict[str, Axes] = figure.subplot_mosaic(rows)
        last = max(int(steps[-1]) for steps, _ in series.values())
        for name, axes in panels.items():
            steps, values = series[name]
            _curve(axes, steps, values)
            axes.set_title(TITLES.get(name, name.replace("_", " ").replace("/", ": ")), size=11 if name in large else 8)
            axes.set_title(_number(name, values[-1]), loc="right", color=BLUE, weight="bold", size=11 if name in large else 8)
            axes.set_xlim(0, max(last, 1))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if name in large:
                axes.set_xlabel("optimizer step")
        if "images_per_s" in panels:
            panels["images_per_s"].set_ylim(bottom=0)
        if "loss" in panels and chance:
            _level(panels["loss"], chance[0], f"chance: {chance[1]} = {chance[0]:.2f}", VERMILLION)
        if "knn" in panels:
            panels["knn"].yaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")
            steps, values = series["knn"]
            levels = ({"untrained backbone": float(values[0])} if steps[0] == 0 else {}) | dict(baselines or {})
            for (name, value), colour in zip(levels.items(), itertools.cycle((GRAY, VERMILLION))):
                _level(panels["knn"], value, f"{name}: {100 * value:.1f} %", colour)
    return path


def _level(axes: Axes, value: float, label: str, colour: str) -> None:
    """Draw a dashed line across a panel, with its name."""
    axes.axhline(value, color=colour, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
    note(axes, label, (1, value), ("axes fraction", "data"), (0, 3), ha="right", size=8, color=colour)
    axes.margins(y=0.14)


def _is_curve(name: str, values: np.ndarray) -> bool:
    """Return whether to draw a metric: not final scores and the chance level, and not metrics that are usually 0 while they are 0."""
    return not (name.startswith("final/") or name == "loss_chance" or (name in ("bad_images", "cluster_min") and not values.any()))


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, most: int = 200) -> None:
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    if len(steps) > most:
        edges = np.linspace(steps[0], steps[-1] + 1, most + 1)
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


def _number(name: str, value: float) -> str:
    if name == "knn":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
