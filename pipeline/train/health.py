"""Health of a run: warnings of a loss at chance, collapsed representations and empty clusters; an error for a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from methods.parts.hints import Hints

FEW_PROTOTYPES = 0.1  # of those that a batch could use; a run that learns uses half and more, a collapsed one a handful


class TrainingAborted(RuntimeError):
    """Training cannot go on; the message gives the step, the reason and a remedy."""


def check_finite(losses: list[float], first_step: int, last_checkpoint: int | None) -> None:
    """Raise `TrainingAborted` if a loss is NaN or infinite; `losses[i]` belongs to step `first_step + i`."""
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            kept = f"the checkpoint of step {last_checkpoint} is good" if last_checkpoint is not None else "there is no checkpoint yet"
            raise TrainingAborted(
                f"loss is {loss} at step {first_step + i}; {kept}. Try a lower optim.base_lr, a warm-up (optim.warmup_epochs), "
                "optim.clip_norm, or train.precision=float32"
            )


class HealthMonitor:
    """Warnings of a run, each given once."""

    def __init__(self, hints: Hints, patience_steps: int) -> None:
        self.hints = hints
        self.patience_steps = patience_steps
        self.given: set[str] = set()

    def warnings(self, step: int, metrics: Mapping[str, float]) -> Iterable[str]:
        """Yield new warnings after `step` completed steps, from the latest logged metrics."""
        std = metrics.get("embedding_std")
        if std is not None and std < 0.05 and step >= self.patience_steps // 4:
            text = f"embeddings collapse: their spread is {std:.3f} of a healthy 1 at step {step}; {self.hints.remedies}"
            yield from self._once("collapse", text)
        if step < self.patience_steps:
            return
        used = metrics.get("prototypes_used")
        if used is not None and used < FEW_PROTOTYPES:
            text = f"the targets collapse: a batch uses {100 * used:.0f} % of the prototypes it could at step {step}; {self.hints.remedies}"
            yield from self._once("few prototypes", text)
        levels = {"loss": self.hints.chance_loss} if self.hints.chance_loss else self.hints.chance_parts
        uniform = metrics.get(self.hints.uniform_metric or "", 1.0)
        for metric, (level, name) in levels.items():
            loss = metrics.get(metric, 0.0)
            if loss > 0.98 * level and uniform > 0.98:
                text = f"the loss sticks at {name}: {loss:.3f} of {level:.3f} after {step} steps; {self.hints.remedies}"
                yield from self._once("stuck", text)

    def cluster_warnings(self, step: int, sizes: np.ndarray) -> Iterable[str]:
        """Yield new warnings after `step` completed steps, from the sizes `(K,)` of the clusters.

        One cluster holds 90 % of the images. Or more than half of the clusters are empty, with at least four images to a
        cluster (with random assignments, 2 % would be empty).
        """
        images, clusters = int(sizes.sum()), len(sizes)
        if step < self.patience_steps or clusters < 2:
            return
        largest, empty = int(sizes.max()), int((sizes == 0).sum())
        if largest >= 0.9 * images:
            text = f"one cluster holds {largest:,} of {images:,} images at step {step}; {self.hints.remedies}"
            yield from self._once("one cluster", text)
        elif empty > 0.5 * clusters and images >= 4 * clusters:
            text = f"{empty:,} of {clusters:,} clusters are empty at step {step}; use fewer clusters, or {self.hints.remedies}"
            yield from self._once("empty clusters", text)

    def _once(self, key: str, text: str) -> Iterable[str]:
        if key not in self.given:
            self.given.add(key)
            yield text
