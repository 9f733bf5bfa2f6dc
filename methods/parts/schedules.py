"""Schedules: pure functions of the step, so a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def cosine(step: float, total: float, start: float, end: float) -> float:
    """Return end + (start - end) / 2 * (1 + cos(pi * step / total)); `end` from step `total` on."""
    share = min(1.0, step / total) if total > 0 else 1.0
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * share))


def linear_by_epoch(epoch: int, *, epochs: int, start: float, end: float) -> float:
    """Return the value on a straight line from `start` in epoch 0 to `end` in epoch `epochs` - 1, then `end` (DINO's temperature)."""
    return end if epoch >= epochs else start + (end - start) * epoch / max(1, epochs - 1)


def warmup_cosine(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    start: float,
    base: float,
    final: float,
    zero_lr_steps: int = 0,
    reaches_base: bool = True,
) -> float:
    """Return SwAV's learning rate: linear from `start` to `base`, both ends included, over the warm-up steps; then cosine to `final`.

    The first step of the cosine has t = 0 of T = total_steps - warmup_steps, so the last step stays just above `final`.

    Args:
        zero_lr_steps: first steps, at a rate of 0; the schedule fills the remaining ones.
        reaches_base: False = start + (base - start) max(1, step) / warmup_steps in the warm-up, and `base` in the step after it.
    """
    step, total_steps = step - zero_lr_steps, total_steps - zero_lr_steps
    if step < 0:
        return 0.0
    if step < warmup_steps:
        share = step / max(1, warmup_steps - 1) if reaches_base else max(1, step) / warmup_steps
        return start + (base - start) * share
    return cosine(step - warmup_steps, total_steps - warmup_steps, base, final)


def falling_steps(step: int, *, total_steps: int, base: float, milestones: tuple[float, ...]) -> float:
    """Return MoCo v1's learning rate: a tenth of the one before from each milestone on, a fraction of the run."""
    return base * 0.1 ** sum(step >= round(share * total_steps) for share in milestones)
