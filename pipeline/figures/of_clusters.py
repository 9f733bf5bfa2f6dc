"""Pictures of the clusters of a method that has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.figures import cluster_charts
from pipeline.figures.context import FigureContext
from pipeline.figures.pictures import picture


@picture("clusters")
def clusters(subject: FigureContext, path: Path) -> Path:
    """The most typical images of some prototypes or centres: of the largest, smallest and purest clusters."""
    found = subject.clusters
    shown = [found.nearest(k, cluster_charts.MOST) for members in found.worth_showing().values() for k in members]
    rows = np.sort(np.concatenate(shown))
    originals = dict(zip(rows.tolist(), subject.originals(found.ids[rows]), strict=True)) if found.ids is not None else {}
    source = subject.images_of("training")
    return cluster_charts.gallery(found, subject.dataset.class_names, path, originals=originals, source=source)


@picture("cluster_sizes")
def cluster_sizes(subject: FigureContext, path: Path) -> Path:
    """The sizes of clusters, the largest first, and their classes where there are labels."""
    return cluster_charts.size_bars(subject.clusters, subject.dataset.class_names, path, source=subject.images_of("training"))
