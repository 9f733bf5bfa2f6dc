"""Pictures of clusters: images of some of them, and a histogram of their sizes. PNG, colour-blind-safe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.evaluate.clusters import Clusters
from pipeline.figures.style import BLUE, GRAY, INK, PALE, VERMILLION, cell, frame, picture_at, show, write


def gallery(clusters: Clusters, class_names: Sequence[str], path: Path, *, most: int = 10) -> Path:
    """Draw a row of the most typical images of the largest, the smallest, and the purest (without labels: the tightest) clusters.

    The text of a row is the size of its cluster and, with labels, the fraction of its most common class. Images of other classes
    have a frame.

    Args:
        clusters: clusters to draw.
        class_names: name of each label.
        path: the PNG to write.
        most: images in a row.
    """
    side, step, margin, head, heading = 0.85, 0.93, 0.2, 0.85, 0.34  # inches
    columns = most + 2  # the text takes two
    places: list[tuple[int, np.ndarray, int, float]] = []  # cluster, its images, column, top
    headings, top = [], head
    for why, members in clusters.worth_showing().items():
        headings.append((why, top))
        top, column = top + heading, 0
        for cluster in members:
            shown = clusters.nearest(cluster, most)
            if column + 2 + len(shown) > columns:  # clusters with few images share a row
                top, column = top + step, 0
            places.append((cluster, shown, column, top))
            column += 2 + len(shown)
        top += step + 0.14
    labelled = bool((clusters.labels >= 0).any())
    with picture_at(path, 2 * margin + columns * step, top + 0.1) as figure:
        write(figure, margin, 0.36, "What the clusters hold", size=13, weight="bold")
        write(figure, margin, 0.61, _summary(clusters), size=9, color=GRAY)
        legend = "most typical first" + ("; framed: not of the cluster's commonest class" if labelled else "")
        write(figure, margin + 2 * step, head + 0.21, legend, size=8, color=GRAY)
        for why, top in headings:
            write(figure, margin, top + 0.21, why.capitalize(), size=10, weight="bold", color=BLUE)
        for cluster, shown, column, top in places:
            left, size, common = margin + (column + 2) * step, clusters.sizes[cluster], clusters.commonest(cluster)
            lines = [f"cluster {cluster}", "1 image" if size == 1 else f"{size:,} images"]
            lines += [f"{100 * common[1]:.0f} % {_name(common[0], class_names)}"] if common else []
            x, side_of = (left - 0.1, "right") if column else (margin, "left")  # in a shared row, beside its images
            for line, text in enumerate(lines):
                style = {"size": 8} if line else {"size": 9, "weight": "bold"}
                write(figure, x, top + 0.24 + 0.18 * line, text, ha=side_of, **style)
            for place, image in enumerate(shown):
                axes = cell(figure, left + place * step, top, side, side)
                show(axes, clusters.images[image], side)
                if common and clusters.labels[image] not in (-1, common[0]):
                    frame(axes, VERMILLION, 2.4)
    return path


def size_histogram(clusters: Clusters, path: Path, *, bins: int = 30) -> Path:
    """Draw a histogram of the sizes of clusters, with a bar for empty ones and a dashed line at N / K.

    Args:
        clusters: clusters to draw.
        path: the PNG to write.
        bins: largest number of bars, without that of empty clusters.
    """
    sizes = clusters.sizes
    width = math.ceil(sizes.max() / bins)
    counts = np.bincount((sizes[sizes > 0] - 1) // width)  # bar i: sizes i * width + 1 to (i + 1) * width
    empty = int((sizes == 0).sum())
    left = -(width - 1) / 2  # a bar that ends at 0
    with picture_at(path, 6.8, 3.4) as figure:
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1, rect=(0, 0, 1, 0.8))
        write(figure, 0.2, 0.36, "Cluster sizes", size=13, weight="bold")
        write(figure, 0.2, 0.61, _summary(clusters), size=9, color=GRAY)
        axes = figure.subplots()
        axes.bar(np.arange(len(counts)) * width + (width + 1) / 2, counts, width=0.92 * width, color=BLUE)
        if empty:
            axes.bar(left, empty, width=0.92 * width, color=VERMILLION, label=f"empty: {empty:,}")
            if empty > 10 * counts.max():
                axes.set_yscale("log")
                axes.set_ylim(bottom=0.5)
        axes.axvline(clusters.even, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label=f"all equal: {clusters.even:,.3g}")
        axes.legend(frameon=False, fontsize=8)
        axes.set(xlabel="images in a cluster" + (f", {width} sizes to a bar" if width > 1 else ""), ylabel="clusters")
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:,g}" if v == int(v) else "")
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
    return path


def _summary(clusters: Clusters) -> str:
    """Return one line: numbers of images and clusters, sizes, agreement with labels."""
    found, held = clusters.metrics(), clusters.sizes[clusters.sizes > 0]
    summary = f"{len(clusters.assignments):,} images; {len(held):,} clusters hold {held.min():,} to {held.max():,}"
    summary += f", {clusters.count - len(held):,} are empty" if len(held) < clusters.count else ""
    return summary + (f"; NMI with labels {found['nmi']:.2f}, purity {found['purity']:.2f}" if "nmi" in found else "")


def _name(label: int, class_names: Sequence[str]) -> str:
    name = class_names[label] if label < len(class_names) else f"class {label}"
    return name if len(name) <= 16 else name[:15] + "…"
