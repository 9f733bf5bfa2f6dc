"""Pictures of the views and the metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.figures import curve_charts, score_charts
from pipeline.figures.context import FigureContext
from pipeline.figures.pictures import NothingToDraw, picture
from pipeline.figures.run_figures import views_sheet
from pipeline.run_folder import RunFolder


@picture("views")
def views(subject: FigureContext, path: Path) -> Path:
    """Contact sheet: a few images with the crops that training made of them."""
    return views_sheet(subject.config, subject.dataset, path)


@picture("curves")
def curves(subject: FigureContext, path: Path) -> Path:
    """Loss and online kNN beside chance and the baselines, and the other meters, over the steps."""
    chance = subject.config.method.hints(subject.facts).chance_loss
    return curve_charts.curves(subject.run.metrics, path, chance=chance, baselines=raw_pixels(subject.run), title=subject.name)


def raw_pixels(run: RunFolder) -> dict[str, float]:
    """Return the better kNN accuracy of raw pixels, by name, as it was measured at the end of a run; nothing before."""
    file = run.path / "evaluation.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if "raw_l2" not in found:
        return {}
    where = "" if found["split"] == "held-out" else f", {found['split']} images"
    return {f"raw pixels{where}": max(found["raw_l2"], found["raw_cosine"])}


@picture("scores")
def scores(subject: FigureContext, path: Path) -> Path:
    """Top-1 of the kNN beside raw pixels and the untrained backbone, as bars."""
    found = subject.scores
    if not found.rows:
        raise NothingToDraw(f"data.path={subject.config.data.path}: {found.protocol}")
    rows = [(row.label, row.accuracy) for row in found.rows]
    if found.split == "test":
        images = f"test images of {subject.config.evaluate.path or subject.dataset.test_path}"
    else:
        images = subject.images_of("held-out")
    about = f"n = {found.queries:,} {images}; bars with 95 % intervals"
    return score_charts.score_bars(
        rows, path, title=f"kNN accuracy: {subject.name}", about=about, queries=found.queries, majority=found.majority
    )
