"""Picture of the nearest neighbours of some images. PNG, colour-blind-safe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.figures.style import GRAY, GREEN, INK, VERMILLION, cell, frame, picture_at, show, write


def neighbours(
    images: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray | None,
    class_names: Sequence[str],
    queries: Sequence[int] | np.ndarray,
    path: Path,
    k: int = 8,
    *,
    title: str = "Nearest images by the learned features",
) -> Path:
    """Draw each query beside its k most similar images (cosine): those of its class have a green frame and a tick, others an orange one.

    Args:
        images: uint8 `(N, H, W, 3)`.
        features: `(N, D)`, of any norm.
        labels: `(N,)`, -1 or None if unknown; images without labels have no frame.
        class_names: name of each label.
        queries: rows of `images`; an image is not its own neighbour.
        path: the PNG to write.
        k: neighbours of each query.
        title: headline.
    """
    queries = np.asarray(queries, dtype=np.int64)
    k = min(k, len(images) - 1)
    if k < 1 or not len(queries):
        raise ConfigError(f"images={len(images)}: no neighbours to draw; give at least two images and one query")
    unit = np.asarray(features, dtype=np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    similarity = unit[queries] @ unit.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    known = np.full(len(images), -1) if labels is None else np.asarray(labels)

    def class_of(i: int) -> str:
        label = int(known[i])
        name = class_names[label] if 0 <= label < len(class_names) else str(label) if label >= 0 else ""
        return name if len(name) <= 14 else name[:13] + "…"

    side, gap, between, margin, head, line = 1.0, 0.1, 0.35, 0.2, 1.0, 0.36
    width = max(2 * margin + side + between + k * (side + gap) - gap, 5.2)
    right, wrong = "same class", "another class"
    with picture_at(path, width, head + len(queries) * (side + line) + 0.1) as figure:
        write(figure, margin, 0.36, title, size=13, weight="bold")
        write(figure, margin, head - 0.12, "query", size=9, color=GRAY)
        start = margin + side + between
        write(figure, start, head - 0.12, "most similar first; cosine similarity below", size=9, color=GRAY)
        if (known >= 0).any():
            write(figure, start, head - 0.36, f"✓ {right}", size=9, color=GREEN, weight="bold")
            write(figure, start + 1.25, head - 0.36, f"✗ {wrong}", size=9, color=VERMILLION, weight="bold")
        for row, query in enumerate(queries):
            top = head + row * (side + line)
            axes = cell(figure, margin, top, side, side)
            show(axes, images[query], side)
            write(figure, margin + side / 2, top + side + 0.06, class_of(query), size=7.5, weight="bold", ha="center", va="top")
            for column, near in enumerate(order[row]):
                left = start + column * (side + gap)
                axes = cell(figure, left, top, side, side)
                show(axes, images[near], side)
                text, colour = f"{similarity[row, near]:.2f}", INK
                if known[query] >= 0 and known[near] >= 0:
                    same = known[query] == known[near]
                    colour = GREEN if same else VERMILLION
                    frame(axes, colour, 2.4)
                    text += " ✓" if same else f" ✗ {class_of(near)}"
                write(figure, left + side / 2, top + side + 0.06, text, size=7.5, color=colour, ha="center", va="top")
    return path
