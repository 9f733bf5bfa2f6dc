"""Pictures of the clusters of a method that has them."""

from __future__ import annotations

from pathlib import Path

from pipeline.figures import cluster_charts
from pipeline.figures.context import FigureContext
from pipeline.figures.pictures import picture


@picture("clusters")
def clusters(subject: FigureContext, path: Path) -> Path:
    """The most typical images of some prototypes or centres: of the largest, smallest and purest clusters."""
    return cluster_charts.gallery(subject.clusters, subject.dataset.class_names, path)


@picture("cluster_sizes")
def cluster_sizes(subject: FigureContext, path: Path) -> Path:
    """The histogram of the sizes of clusters."""
    return cluster_charts.size_histogram(subject.clusters, path)
