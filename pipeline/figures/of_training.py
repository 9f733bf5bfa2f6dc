"""Pictures of the views and the metrics of a run."""

from __future__ import annotations

from pathlib import Path

from pipeline.figures import curve_charts, score_charts
from pipeline.figures.context import FigureContext
from pipeline.figures.pictures import NothingToDraw, picture
from pipeline.figures.run_figures import views_sheet


@picture("views")
def views(subject: FigureContext, path: Path) -> Path:
    """Contact sheet: a few images with the crops that training made of them."""
    return views_sheet(subject.config, subject.dataset, path)


@picture("curves")
def curves(subject: FigureContext, path: Path) -> Path:
    """Loss, learning rate, online kNN and the other meters over the steps."""
    chance = subject.config.method.hints(subject.facts).chance_loss
    return curve_charts.curves(subject.run.metrics, path, chance=chance, title=subject.name)


@picture("scores")
def scores(subject: FigureContext, path: Path) -> Path:
    """Top-1 of the kNN beside raw pixels and the untrained backbone, as bars."""
    found, names = subject.scores, subject.dataset.class_names
    if not found.rows:
        raise NothingToDraw(f"data.path={subject.config.data.path}: {found.protocol}")
    rows = [(row.label, row.accuracy) for row in found.rows]
    return score_charts.score_bars(rows, path, title=f"kNN accuracy, {found.split} images", chance=1 / len(names) if names else None)
