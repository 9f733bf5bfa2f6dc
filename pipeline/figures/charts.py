"""Pictures of a run: contact sheet of the crops, curves, nearest neighbours, bars of scores. PNG, colour-blind-safe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.figures.style import BLUE, GRAY, GREEN, GROUP_COLOURS, INK, PALE, VERMILLION, cell, frame, note, picture_at, show, write

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


# ---------------------------------------------------------------------------- crops


def contact_sheet(
    originals: Sequence[np.ndarray],
    crops: Mapping[str, np.ndarray],
    boxes: Mapping[str, np.ndarray],
    path: Path,
    *,
    title: str = "What the method sees",
    row_inches: float = 1.9,
) -> Path:
    """Draw each image with the boxes of its crops, beside the augmented crops. Numbers match boxes and crops.

    Args:
        originals: B images, uint8 `(H, W, 3)`, of any sizes.
        crops: for each group `(B, V, h, w, 3)`, augmented but not normalised: uint8, or floats in [0, 1].
        boxes: for each group `(B, V, 4)`: top, left, height, width in pixels of the original.
        path: the PNG to write.
        title: headline.
        row_inches: height of a row.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    groups = {name: np.asarray(stack) for name, stack in crops.items() if np.asarray(stack).shape[1]}
    if not len(originals) or not groups:
        raise ConfigError(f"views={list(crops)}: no crops to draw; give at least one image and one group with a count of 1 or more")
    colours = {name: GROUP_COLOURS[i % len(GROUP_COLOURS)] for i, name in enumerate(groups)}
    largest = max(stack.shape[2] for stack in groups.values())
    gap, margin, between, head = 0.07, 0.2, 0.3, 0.95

    def shape(name: str) -> tuple[int, int]:  # rows and columns of a group's crops; small crops share the height of a large one
        count, size = groups[name].shape[1:3]
        rows = 1 if size == largest and count <= 4 else math.ceil(count / 4) if size == largest else max(2, math.ceil(count / 6))
        rows = min(rows, count)
        return rows, math.ceil(count / rows)

    # a single small crop is not enlarged to the height of a large one
    sides = {name: (row_inches - gap * (max(2, shape(name)[0]) - 1)) / max(2, shape(name)[0]) for name in groups}
    sides |= {name: (row_inches - gap * (shape(name)[0] - 1)) / shape(name)[0] for name in groups if groups[name].shape[2] == largest}
    widest = max(image.shape[1] / image.shape[0] for image in originals)
    original_width = row_inches * min(max(widest, 0.6), 1.6)
    lefts, left = {}, margin + original_width + between
    for name in groups:
        lefts[name] = left
        left += max(shape(name)[1] * (sides[name] + gap) - gap, 1.15) + between
    width = max(left - between + margin, 4.5)
    height = head + len(originals) * (row_inches + 0.14) + margin

    with picture_at(path, width, height) as figure:
        write(figure, margin, 0.36, title, size=13, weight="bold")
        write(figure, margin, head - 0.26, "original", size=10, weight="bold", color=GRAY)
        write(figure, margin, head - 0.09, _sizes(originals), size=8, color=GRAY)
        for name, stack in groups.items():
            write(figure, lefts[name], head - 0.26, name, size=10, weight="bold", color=colours[name])
            write(figure, lefts[name], head - 0.09, f"{stack.shape[1]} × {stack.shape[2]} px", size=8, color=GRAY)
        for i, image in enumerate(originals):
            top = head + i * (row_inches + 0.14)
            tall, wide = image.shape[:2]
            scale = min(original_width / wide, row_inches / tall)
            axes = cell(figure, margin, top, wide * scale, tall * scale)
            show(axes, image, max(wide, tall) * scale)
            axes.set(xlim=(-0.5, wide - 0.5), ylim=(tall - 0.5, -0.5))
            halo = [withStroke(linewidth=3.2, foreground="white", alpha=0.75)]
            for name, stack in groups.items():
                columns = shape(name)[1]
                for v in range(stack.shape[1]):
                    y, x, h, w = (float(n) for n in boxes[name][i, v])
                    box = Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=colours[name], linewidth=1.5, clip_on=False)
                    box.set_path_effects([*halo])
                    axes.add_patch(box)
                    digit = {"weight": "bold", "color": colours[name], "path_effects": halo, "va": "top"}
                    note(axes, str(v + 1), (x - 0.5, y - 0.5), "data", (2.5, -2.5), size=6.5, **digit)
                    row, column = divmod(v, columns)
                    side = sides[name]
                    thumb = cell(figure, lefts[name] + column * (side + gap), top + row * (side + gap), side, side)
                    show(thumb, stack[i, v], side)
                    frame(thumb, colours[name], 1.2)
                    note(thumb, str(v + 1), (0, 1), "axes fraction", (3, -3), size=7, **digit)
    return path


def _sizes(images: Sequence[np.ndarray]) -> str:
    """Return width × height of the images, or the range of both."""
    heights, widths = [i.shape[0] for i in images], [i.shape[1] for i in images]
    spans = [f"{min(s)}" if min(s) == max(s) else f"{min(s)}–{max(s)}" for s in (widths, heights)]
    return f"{spans[0]} × {spans[1]} px"


# ---------------------------------------------------------------------------- curves


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


# ---------------------------------------------------------------------------- neighbours and scores


def neighbours(
    images: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray | None,
    class_names: Sequence[str],
    queries: Sequence[int] | np.ndarray,
    path: Path,
    k: int = 8,
    *,
    title: str = "Nearest images by the learned features",
) -> Path:
    """Draw each query beside its k most similar images (cosine): those of its class have a green frame and a tick, others an orange one.

    Args:
        images: uint8 `(N, H, W, 3)`.
        features: `(N, D)`, of any norm.
        labels: `(N,)`, -1 or None if unknown; images without labels have no frame.
        class_names: name of each label.
        queries: rows of `images`; an image is not its own neighbour.
        path: the PNG to write.
        k: neighbours of each query.
        title: headline.
    """
    queries = np.asarray(queries, dtype=np.int64)
    k = min(k, len(images) - 1)
    if k < 1 or not len(queries):
        raise ConfigError(f"images={len(images)}: no neighbours to draw; give at least two images and one query")
    unit = np.asarray(features, dtype=np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    similarity = unit[queries] @ unit.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    known = np.full(len(images), -1) if labels is None else np.asarray(labels)

    def class_of(i: int) -> str:
        label = int(known[i])
        name = class_names[label] if 0 <= label < len(class_names) else str(label) if label >= 0 else ""
        return name if len(name) <= 14 else name[:13] + "…"

    side, gap, between, margin, head, line = 1.0, 0.1, 0.35, 0.2, 1.0, 0.36
    width = max(2 * margin + side + between + k * (side + gap) - gap, 5.2)
    right, wrong = "same class", "another class"
    with picture_at(path, width, head + len(queries) * (side + line) + 0.1) as figure:
        write(figure, margin, 0.36, title, size=13, weight="bold")
        write(figure, margin, head - 0.12, "query", size=9, color=GRAY)
        start = margin + side + between
        write(figure, start, head - 0.12, "most similar first; cosine similarity below", size=9, color=GRAY)
        if (known >= 0).any():
            write(figure, start, head - 0.36, f"✓ {right}", size=9, color=GREEN, weight="bold")
            write(figure, start + 1.25, head - 0.36, f"✗ {wrong}", size=9, color=VERMILLION, weight="bold")
        for row, query in enumerate(queries):
            top = head + row * (side + line)
            axes = cell(figure, margin, top, side, side)
            show(axes, images[query], side)
            write(figure, margin + side / 2, top + side + 0.06, class_of(query), size=7.5, weight="bold", ha="center", va="top")
            for column, near in enumerate(order[row]):
                left = start + column * (side + gap)
                axes = cell(figure, left, top, side, side)
                show(axes, images[near], side)
                text, colour = f"{similarity[row, near]:.2f}", INK
                if known[query] >= 0 and known[near] >= 0:
                    same = known[query] == known[near]
                    colour = GREEN if same else VERMILLION
                    frame(axes, colour, 2.4)
                    text += " ✓" if same else f" ✗ {class_of(near)}"
                write(figure, left + side / 2, top + side + 0.06, text, size=7.5, color=colour, ha="center", va="top")
    return path


def score_bars(
    rows: Sequence[tuple[str, float]], path: Path, *, title: str = "kNN accuracy on test images", chance: float | None = None
) -> Path:
    """Draw a bar for each score, the last one (the trained network) in colour, with values at their ends.

    Args:
        rows: name and accuracy as a fraction in [0, 1], from top to bottom.
        path: the PNG to write.
        title: headline.
        chance: accuracy at chance level, drawn as a dashed line.
    """
    if not rows:
        raise ConfigError("scores=0: nothing to draw; give at least one name and score")
    with picture_at(path, 6.4, 0.95 + 0.48 * len(rows) + (0.25 if chance else 0)) as figure:
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
        figure.suptitle(title, x=0.015, ha="left", size=13, weight="bold")
        axes = figure.subplots()
        names, values = [name for name, _ in rows], [100 * value for _, value in rows]
        bars = axes.barh(range(len(rows)), values, color=[PALE] * (len(rows) - 1) + [BLUE], height=0.66)
        axes.bar_label(bars, labels=[f"{value:.1f} %" for value in values], padding=5, size=10, weight="bold")
        axes.set_yticks(range(len(rows)), names, size=10)
        axes.invert_yaxis()
        axes.set_xlim(0, min(118, max(max(values) * 1.18, 1)))
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        if chance:
            axes.axvline(100 * chance, color=VERMILLION, linestyle=(0, (4, 3)), linewidth=1.2)
            text = f"guessing: {100 * chance:.1f} %"
            note(axes, text, (100 * chance, 0), ("data", "axes fraction"), (0, -3), va="top", size=8, color=VERMILLION)
    return path
