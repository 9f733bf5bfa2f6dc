"""Pictures of clusters: a gallery of what some of them hold, and how large all of them are. PNG, colour-blind-safe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.canvas import BLUE, GRAY, PALE, VERMILLION, cell, frame, note, picture_at, show, write
from pipeline.evaluate.clusters import Clusters


def gallery(clusters: Clusters, class_names: Sequence[str], path: Path, *, most: int = 10) -> Path:
    """A row of the most typical images for each of some clusters: the largest, the smallest, and the purest (without labels: the tightest).

    Beside each row stand its size and, with labels, the share of its commonest class; images of another class are framed.

    Args:
        clusters: what to show.
        class_names: name of each label.
        path: the PNG to write.
        most: images in a row.
    """
    chosen = clusters.worth_showing()
    sizes = clusters.sizes
    side, gap, margin, words, head, heading, between = 0.85, 0.08, 0.2, 1.6, 0.85, 0.34, 0.14
    rows = sum(map(len, chosen.values()))
    height = head + rows * (side + gap) + len(chosen) * heading + (len(chosen) - 1) * between + margin
    with picture_at(path, 2 * margin + words + most * (side + gap) - gap, height) as figure:
        write(figure, margin, 0.36, "What the clusters hold", size=13, weight="bold")
        write(figure, margin, 0.61, _summary(clusters), size=9, color=GRAY)
        top = head
        for why, members in chosen.items():
            write(figure, margin, top + 0.21, why.capitalize(), size=10, weight="bold", color=BLUE)
            legend = "most typical first" + ("; framed: not of the commonest class" if clusters.commonest(members[0]) else "")
            write(figure, margin + words, top + 0.21, legend, size=8, color=GRAY)
            top += heading
            for cluster in members:
                common = clusters.commonest(cluster)
                write(figure, margin, top + 0.24, f"cluster {cluster}", size=9, weight="bold")
                write(figure, margin, top + 0.43, f"{sizes[cluster]:,} image{'s' * bool(sizes[cluster] > 1)}", size=8)
                if common:
                    write(figure, margin, top + 0.6, f"{100 * common[1]:.0f} % {_name(common[0], class_names)}", size=8)
                for column, image in enumerate(clusters.nearest(cluster, most)):
                    axes = cell(figure, margin + words + column * (side + gap), top, side, side)
                    show(axes, clusters.images[image], side)
                    if common and clusters.labels[image] not in (-1, common[0]):
                        frame(axes, VERMILLION, 2.4)
                top += side + gap
            top += between
    return path


def size_histogram(clusters: Clusters, path: Path, *, bins: int = 30) -> Path:
    """How many clusters hold how many images; empty ones by themselves, the even share N / K dashed.

    Args:
        clusters: what to show.
        path: the PNG to write.
        bins: at most so many bars beside that of the empty clusters.
    """
    sizes = clusters.sizes
    width = math.ceil(sizes.max() / bins)
    counts = np.bincount((sizes[sizes > 0] - 1) // width)  # bar i: sizes i * width + 1 to (i + 1) * width
    empty = int((sizes == 0).sum())
    with picture_at(path, 6.4, 3.4) as figure:
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1, rect=(0, 0, 1, 0.8))
        write(figure, 0.2, 0.36, "Cluster sizes", size=13, weight="bold")
        write(figure, 0.2, 0.61, _summary(clusters), size=9, color=GRAY)
        axes = figure.subplots()
        axes.bar(np.arange(len(counts)) * width + (width + 1) / 2, counts, width=0.92 * width, color=BLUE)
        if empty:
            axes.bar(-(width - 1) / 2, empty, width=0.92 * width, color=VERMILLION)
            note(axes, f"{empty:,} empty", (-(width - 1) / 2, empty), "data", (0, 3), ha="center", size=8, color=VERMILLION)
        axes.axvline(clusters.even, color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2)
        words = f"all equal: {clusters.even:,.3g}"
        note(axes, words, (clusters.even, 1), ("data", "axes fraction"), (4, -2), va="top", size=8, color=GRAY)
        axes.set(xlabel="images in a cluster" + (f", {width} sizes to a bar" if width > 1 else ""), ylabel="clusters")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(y=0.12)
    return path


def _summary(clusters: Clusters) -> str:
    """One line: how many images and clusters, sizes, agreement with labels."""
    sizes, found = clusters.sizes, clusters.metrics()
    words = f"{len(clusters.assignments):,} images in {clusters.count:,} clusters of {sizes.min():,} to {sizes.max():,}"
    words += f", {(sizes == 0).sum():,} empty"
    return words + (f"; NMI with the labels {found['nmi']:.2f}, purity {found['purity']:.2f}" if "nmi" in found else "")


def _name(label: int, class_names: Sequence[str]) -> str:
    name = class_names[label] if label < len(class_names) else f"class {label}"
    return name if len(name) <= 16 else name[:15] + "…"
