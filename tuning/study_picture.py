"""The picture of a study: one panel a figure, one row an arm, every seed a point."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.figures.style import BLUE, PALE
from tuning.axes import titled

if TYPE_CHECKING:
    from tuning.studies import StudyResults


def arms(results: StudyResults, path: Path) -> Path:
    """Mean and standard deviation of each figure over the seeds of an arm, the seeds beside them."""
    planned = results.study
    shown = [f for f in planned.figures if any(results.of(arm.name, f.key) for arm in planned.arms)]
    names = [arm.words for arm in planned.arms]
    most = max(len(results.of(arm.name, f.key)) for arm in planned.arms for f in shown)
    words = f"small points: seeds (up to {most}); large: their mean; bar: standard deviation" if most > 1 else "one seed"
    width = 2.2 + 2.5 * len(shown)
    with titled(path, max(width, 6.0), 1.6 + 0.42 * len(names), planned.name, words) as figure:
        for axes, about in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True).flat, shown, strict=True):
            for row, arm in enumerate(planned.arms):
                values = results.of(arm.name, about.key)
                if not values:
                    continue
                mean = statistics.fmean(values)
                if len(values) > 1:
                    axes.plot(values, [row] * len(values), "o", color=BLUE, alpha=0.35, markersize=3.5, markeredgewidth=0)
                    axes.errorbar(mean, row, xerr=statistics.stdev(values), color=BLUE, linewidth=1.2, capsize=3)
                axes.plot(mean, row, "o", color=BLUE, markersize=6, markeredgecolor="white", markeredgewidth=0.6)
            axes.set_title(about.words)
            axes.grid(axis="x", color=PALE, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.margins(x=0.12)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter((lambda v, _: f"{100 * v:g} %") if about.percent else (lambda v, _: f"{v:,g}"))
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
    return path
