"""Bars of scores. PNG, colour-blind-safe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from methods.parts.errors import ConfigError
from pipeline.figures.style import BLUE, PALE, VERMILLION, note, picture_at


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
