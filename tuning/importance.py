"""Which setting the score follows: rank correlations over trials measured at the same step, with what chance alone would give."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuning.results import Results

FEWEST = 6  # points; below, even a perfect order says little


@dataclass(frozen=True)
class Correlations:
    """Spearman's rank correlation of each searched setting with the score."""

    step: int
    count: int  # points: trials of one step
    rho: dict[str, float | None]  # by key; None: choices without an order, or one value only

    @property
    def chance(self) -> float:
        """An unrelated setting stays below it in 95 of 100 sweeps (normal approximation)."""
        return 1.96 / math.sqrt(self.count - 1)

    def words(self, key: str) -> str:
        rho = self.rho[key]
        if rho is None:
            return "no order to follow: see its response curve"
        if abs(rho) < self.chance:
            return "no more than chance would give"
        return "higher values scored better" if rho > 0 else "lower values scored better"


def correlations(results: Results) -> Correlations | None:
    """Return them over the finished trials if none ended early, else over all trials at their last common step; None with too few."""
    step = results.common_step if results.cut else results.final_step
    if step is None:
        return None
    settings = results.settings_at(step) if results.cut else results.settings
    points = [(setting.values, score) for setting in settings for score in setting.scores]
    if len(points) < FEWEST:
        return None
    rho = {p.key: _spearman([values.get(p.key) for values, _ in points], [score for _, score in points]) for p in results.sweep.params}
    return Correlations(step, len(points), rho)


def _spearman(values: list[object], scores: list[float]) -> float | None:
    import pandas as pd

    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return None
    rho = pd.Series(values, dtype=float).rank().corr(pd.Series(scores).rank())
    return None if math.isnan(rho) else float(rho)
