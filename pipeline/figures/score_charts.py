"""Bars of scores. PNG, colour-blind-safe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from methods.parts.errors import ConfigError
from pipeline.evaluate.final import interval
from pipeline.figures.style import BLUE, GRAY, INK, PALE, VERMILLION, note, picture_at, write


def score_bars(
    rows: Sequence[tuple[str, float]],
    path: Path,
    *,
    title: str = "kNN accuracy",
    about: str = "",
    queries: int = 0,
    majority: float | None = None,
) -> Path:
    """Draw a bar for each score, the last one (the trained network) in colour, with its value and its 95 % interval.

    Args:
        rows: name and accuracy as a fraction in [0, 1], from top to bottom.
        path: the PNG to write.
        title: headline.
        about: the line below it.
        queries: images that the scores are of; 0 = not known, then there are no intervals.
        majority: accuracy of the most common class, whatever the image, drawn as a dashed line.
    """
    if not rows:
        raise ConfigError("scores=0: nothing to draw; give at least one name and score")
    height = 1.2 + 0.48 * len(rows)
    with picture_at(path, 7.2, height) as figure:
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1, rect=(0, 0, 1, 1 - 0.65 / height))
        write(figure, 0.12, 0.34, title, size=13, weight="bold")
        write(figure, 0.12, 0.56, about, size=8, color=GRAY)
        axes = figure.subplots()
        names, values = [name for name, _ in rows], [value for _, value in rows]
        bars = axes.barh(range(len(rows)), values, color=[PALE] * (len(rows) - 1) + [BLUE], height=0.66)
        texts = [f"{100 * value:.1f} %" for value in values]
        ends = values
        if queries:
            limits = [interval(value, queries) for value in values]
            reach = [[value - low for value, (low, _) in zip(values, limits, strict=True)]]
            reach.append([high - value for value, (_, high) in zip(values, limits, strict=True)])
            bars = axes.barh(range(len(rows)), values, color="none", xerr=reach, capsize=3, ecolor=INK, height=0.66)
            texts = [f"{text} ({100 * low:.1f} to {100 * high:.1f})" for text, (low, high) in zip(texts, limits, strict=True)]
            ends = [high for _, high in limits]
        axes.bar_label(bars, labels=texts, padding=5, size=9, weight="bold")
        axes.set_yticks(range(len(rows)), names, size=10)
        axes.invert_yaxis()
        axes.set_xlim(0, max(max(ends) * (1.5 if queries else 1.2), 0.01))
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        if majority is not None:
            axes.axvline(majority, color=VERMILLION, linestyle=(0, (4, 3)), linewidth=1.2)
            text = f"always the most common class: {100 * majority:.1f} %"
            note(axes, text, (majority, 0), ("data", "axes fraction"), (0, -3), va="top", size=8, color=VERMILLION)
    return path
