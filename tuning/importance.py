"""Which knob the score follows: rank correlations over trials measured at the same step, with what chance alone would give."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuning.results import Sweep

FEWEST = 6  # points; below, even a perfect order says little


@dataclass(frozen=True)
class Correlations:
    """Spearman's rank correlation of each knob with the score."""

    step: int
    count: int  # points: trials of one step
    rho: dict[str, float | None]  # by knob; None: choices without an order, or one value only

    @property
    def chance(self) -> float:
        """An unrelated knob stays below it in 95 of 100 sweeps (normal approximation)."""
        return 1.96 / math.sqrt(self.count - 1)

    def words(self, name: str) -> str:
        rho = self.rho[name]
        if rho is None:
            return "no order to follow: see its response curve"
        if abs(rho) < self.chance:
            return "no more than chance would give"
        return "higher values scored better" if rho > 0 else "lower values scored better"


def correlations(sweep: Sweep) -> Correlations | None:
    """Over the finished trials if none ended early, else over all trials at their last common step; None with too few."""
    if all(t in sweep.finals for t in sweep.ranked):
        step, points = sweep.final_step, [(t.values, t.score or 0.0) for t in sweep.finals]
    elif sweep.common_step is not None:
        step = sweep.common_step
        points = [(values, score) for values, scores in sweep.scores_at(step) for score in scores]
    else:
        return None
    if len(points) < FEWEST:
        return None
    rho = {k.name: _spearman([v.get(k.name) for v, _ in points], [s for _, s in points]) for k in sweep.knobs}
    return Correlations(step, len(points), rho)


def _spearman(values: list[object], scores: list[float]) -> float | None:
    import pandas as pd

    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return None
    rho = pd.Series(values, dtype=float).rank().corr(pd.Series(scores).rank())
    return None if math.isnan(rho) else float(rho)
