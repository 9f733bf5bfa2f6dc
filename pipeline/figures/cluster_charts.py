"""Pictures of clusters: images of some of them, and their sizes. PNG, colour-blind-safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluate.clusters import Clusters
from pipeline.figures.style import BLUE, GRAY, GROUP_COLOURS, INK, PALE, VERMILLION, cell, frame, picture_at, show, write

MOST = 10  # images of a cluster
EDGES_UP_TO = 100  # clusters between which a white line is drawn


def gallery(
    clusters: Clusters,
    class_names: Sequence[str],
    path: Path,
    *,
    most: int = MOST,
    originals: Mapping[int, np.ndarray] | None = None,
    source: str = "",
) -> Path:
    """Draw a row of the most typical images of the largest, the smallest, and the purest (without labels: the tightest) clusters.

    The text of a row is the size of its cluster and, with labels, the fraction of its most common class. Images of other classes
    have a frame.

    Args:
        clusters: clusters to draw.
        class_names: name of each label.
        path: the PNG to write.
        most: images in a row.
        originals: whole images by their row in `clusters`, uint8 `(H, W, 3)`; others are drawn as they were evaluated.
        source: description of the images.
    """
    side, step, margin, head, heading = 0.85, 0.93, 0.2, 0.85, 0.34  # inches
    shown = clusters.worth_showing()
    known, labelled = originals or {}, bool((clusters.labels >= 0).any())
    height = head + sum(heading + len(members) * step + 0.14 for members in shown.values()) + 0.1
    with picture_at(path, 2 * margin + (most + 2) * step, height) as figure:
        write(figure, margin, 0.36, "What the clusters hold", size=13, weight="bold")
        write(figure, margin, 0.61, _summary(clusters, source), size=9, color=GRAY)
        legend = "most typical first" + ("; framed: not of the cluster's commonest class" if labelled else "")
        write(figure, margin + 2 * step, head + 0.21, legend, size=8, color=GRAY)
        top = head
        for why, members in shown.items():
            write(figure, margin, top + 0.21, why.capitalize(), size=10, weight="bold", color=BLUE)
            top += heading
            for cluster in members:
                size, common = clusters.sizes[cluster], clusters.commonest(cluster)
                lines = [f"cluster {cluster}", "1 image" if size == 1 else f"{size:,} images"]
                lines += [f"{100 * common[1]:.0f} % {_name(common[0], class_names)}"] if common else []
                for line, text in enumerate(lines):
                    font = {"size": 8} if line else {"size": 9, "weight": "bold"}
                    write(figure, margin, top + 0.24 + 0.18 * line, text, **font)
                for place, image in enumerate(clusters.nearest(cluster, most).tolist()):
                    axes = cell(figure, margin + (place + 2) * step, top, side, side)
                    show(axes, known.get(image, clusters.images[image]), side)
                    if common and clusters.labels[image] not in (-1, common[0]):
                        frame(axes, VERMILLION, 2.4)
                top += step
            top += 0.14
    return path


def size_bars(clusters: Clusters, class_names: Sequence[str], path: Path, *, source: str = "") -> Path:
    """Draw a bar for the size of each cluster, the largest first, and a dashed line at N / K.

    With labels, bars are divided: by class if there are few, else in the cluster's commonest class and other images.

    Args:
        clusters: clusters to draw.
        class_names: name of each label.
        path: the PNG to write.
        source: description of the images.
    """
    sizes = clusters.sizes
    order = np.argsort(-sizes, kind="stable")
    edges = np.arange(clusters.count + 1) + 0.5
    empty = int((sizes == 0).sum())
    with picture_at(path, 8.6, 3.8) as figure:
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1, rect=(0, 0, 1, 0.82))
        write(figure, 0.2, 0.36, "Cluster sizes", size=13, weight="bold")
        write(figure, 0.2, 0.61, _summary(clusters, source), size=8, color=GRAY)
        axes = figure.subplots()
        low = np.zeros(clusters.count)
        for (name, counts), colour in zip(_parts(clusters, class_names).items(), [*GROUP_COLOURS, PALE], strict=False):
            high = low + counts[order]
            axes.stairs(high, edges, baseline=low, fill=True, color=PALE if name in ("others", "no label") else colour, label=name)
            low = high
        if clusters.count <= EDGES_UP_TO:
            axes.vlines(edges, 0, sizes.max(), color="white", linewidth=0.6)
        if empty:
            style: dict[str, Any] = {"color": VERMILLION, "alpha": 0.2, "linewidth": 0}
            axes.axvspan(clusters.count - empty + 0.5, clusters.count + 0.5, label=f"empty: {empty:,}", **style)
        axes.axhline(clusters.even, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label=f"all equal: {clusters.even:,.3g}")
        axes.legend(frameon=False, fontsize=8)
        axes.set(xlabel="clusters, the largest first", ylabel="images in a cluster", xlim=(0.5, clusters.count + 0.5))
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:,g}" if v == int(v) else "")
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
    return path


def _parts(clusters: Clusters, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the parts of each cluster by name, each `(K,)`."""
    labels, count = clusters.labels, clusters.count
    classes = np.unique(labels[labels >= 0])
    if not len(classes):
        return {"images": clusters.sizes}
    members = {k: np.bincount(clusters.assignments[labels == k], minlength=count) for k in classes.tolist()}
    unknown = np.bincount(clusters.assignments[labels < 0], minlength=count)
    if len(classes) <= len(GROUP_COLOURS):
        parts = {_name(k, class_names): found for k, found in members.items()}
        return parts | ({"no label": unknown} if unknown.any() else {})
    commonest = np.max(list(members.values()), axis=0)
    return {"the cluster's commonest class": commonest, "others": clusters.sizes - commonest}


def _summary(clusters: Clusters, source: str) -> str:
    """Return one line: the images, numbers of images and clusters, sizes, agreement with labels."""
    found, held = clusters.metrics(), clusters.sizes[clusters.sizes > 0]
    summary = f"{len(clusters.assignments):,} {source or 'images'}; {len(held):,} clusters hold {held.min():,} to {held.max():,}"
    summary += f", {clusters.count - len(held):,} are empty" if len(held) < clusters.count else ""
    return summary + (f"; NMI with labels {found['nmi']:.2f}, purity {found['purity']:.2f}" if "nmi" in found else "")


def _name(label: int, class_names: Sequence[str]) -> str:
    name = class_names[label] if label < len(class_names) else f"class {label}"
    return name if len(name) <= 16 else name[:15] + "…"
