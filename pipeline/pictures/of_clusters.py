"""Pictures of the clusters of a method that has them."""

from __future__ import annotations

from pathlib import Path

from pipeline import cluster_figures
from pipeline.pictures import picture
from pipeline.pictures.subject import Subject


@picture("clusters")
def clusters(subject: Subject, path: Path) -> Path:
    """The most typical images of some prototypes or centres: of the largest, smallest and purest clusters."""
    return cluster_figures.gallery(subject.clusters, subject.manifest.class_names, path)


@picture("cluster_sizes")
def cluster_sizes(subject: Subject, path: Path) -> Path:
    """How many clusters hold how many images."""
    return cluster_figures.size_histogram(subject.clusters, path)
