"""What watches a run: a loss that is no number, representations that collapse, a loss that sticks at chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from methods.parts.contract import Method


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why and what to try."""


def check_finite(losses: list[float], first_step: int, last_checkpoint: int | None) -> None:
    """Raise `TrainingStopped` if a loss is NaN or infinite; `losses[i]` belongs to step `first_step + i`."""
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            kept = f"the checkpoint of step {last_checkpoint} is good" if last_checkpoint is not None else "there is no checkpoint yet"
            raise TrainingStopped(
                f"loss is {loss} at step {first_step + i}; {kept}. Try a lower optim.base_lr, a warm-up (optim.warmup_epochs), "
                "optim.clip_norm, or train.precision=float32"
            )


class Guards:
    """Warnings of a run, each given once."""

    def __init__(self, method: Method, patience_steps: int) -> None:
        self.chance = method.chance_loss()
        self.remedies = method.stuck_remedies()
        self.patience_steps = patience_steps
        self.given: set[str] = set()

    def warnings(self, step: int, metrics: Mapping[str, float]) -> Iterable[str]:
        """New warnings after `step` completed steps, from the latest logged metrics."""
        std = metrics.get("embedding_std")
        if std is not None and std < 0.05 and step >= self.patience_steps // 4:
            text = f"embeddings collapse: their spread is {std:.3f} of a healthy 1 at step {step}; {self.remedies}"
            yield from self._once("collapse", text)
        if self.chance is None or step < self.patience_steps:
            return
        level, name = self.chance
        if metrics.get("loss", 0.0) > 0.98 * level and metrics.get("code_entropy", 1.0) > 0.98:
            text = f"the loss sticks at {name}: {metrics['loss']:.3f} of {level:.3f} after {step} steps; {self.remedies}"
            yield from self._once("stuck", text)

    def _once(self, key: str, text: str) -> Iterable[str]:
        if key not in self.given:
            self.given.add(key)
            yield text
