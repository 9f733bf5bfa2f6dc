"""What a sweep found: which setting is best, how sure that is, and what it cost."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.run_folder import command
from tuning.sweep import STATUSES, Sweep, Trial, show_score

SCORE_NAMES = {"knn": "kNN accuracy", "linear": "linear accuracy", "rankme": "RankMe"}


@dataclass(frozen=True)
class Setting:
    """Searched values with the trials that ran them, and the scores that count: all measured at the same step."""

    values: dict[str, Any]
    trials: tuple[Trial, ...]
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds (n - 1 in the divisor); None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def by_setting(trials: Iterable[Trial]) -> list[tuple[Trial, ...]]:
    """Return the trials grouped by their values."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(trial.values, sort_keys=True, default=str), []).append(trial)
    return [tuple(members) for members in groups.values()]


def rank(trials: Iterable[Trial]) -> list[Trial]:
    """Return trials best first: those that finished by score, then those that ended earlier by step and score, then the others."""
    return sorted(trials, key=lambda t: (t.status != "finished", t.score is None, -t.step, -(t.score or 0.0), t.number))


@dataclass(frozen=True)
class Results:
    """The scores of a sweep as it stands."""

    sweep: Sweep
    trials: tuple[Trial, ...]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read a sweep and its trials.

        Raises:
            ConfigError: the folder is no sweep, or no trial of it has a score yet.
        """
        sweep = Sweep.read(folder)
        found = cls(sweep, tuple(sweep.trials()))
        if not any(trial.ranked for trial in found.trials):
            error = next((f" (the first error: {t.error})" for t in found.trials if t.error), "")
            hopeless = found.trials and found.count("failed") == len(found.trials)
            go_on = command("resume", sweep.name, runs_dir=sweep.path.parent)
            remedy = "mend the cause and search again" if hopeless else f"go on with: {go_on}"
            raise ConfigError(f"sweep={sweep.name}: no trial has a score yet, {found.states() or 'none started'}{error}; {remedy}")
        return found

    # ------------------------------------------------------------------ what is compared

    @cached_property
    def ranked(self) -> tuple[Trial, ...]:
        """Every trial with a score, best first; a score of a later step counts before one of an earlier step."""
        return tuple(sorted((t for t in self.trials if t.ranked), key=lambda t: (-t.score_step, -(t.score or 0.0), t.number)))

    @cached_property
    def finals(self) -> tuple[Trial, ...]:
        """The trials whose scores choose the best: those that finished; while there is none, those that got furthest."""
        finished = tuple(t for t in self.ranked if t.status == "finished")
        return finished or tuple(t for t in self.ranked if t.score_step == self.ranked[0].score_step)

    @property
    def final_step(self) -> int:
        return max(t.score_step for t in self.finals)

    @cached_property
    def cut(self) -> tuple[Trial, ...]:
        """Trials with a score of an earlier step than those of `finals`."""
        return tuple(t for t in self.ranked if t not in self.finals)

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """Settings with a final score, best first: those that ran with all seeds, then the others.

        A setting that lost seeds to an early stop keeps only its luckier ones, so it does not lead one that has them all.
        """
        found = []
        for members in by_setting(self.trials):
            scores = tuple(t.score for t in members if t in self.finals and t.score is not None)
            if scores:
                found.append(Setting(members[0].values, members, scores))
        most = min(self.sweep.seeds, max(len(s.scores) for s in found))
        return tuple(sorted(found, key=lambda s: (len(s.scores) < most, -s.mean, s.trials[0].number)))

    @property
    def best(self) -> Setting:
        return self.settings[0]

    @property
    def best_trial(self) -> Trial:
        """The best seed of the best setting."""
        return max((t for t in self.best.trials if t in self.finals), key=lambda t: (t.score or 0.0, -t.number))

    @cached_property
    def common_step(self) -> int | None:
        """The last step at which every trial that was measured at all, and did not fail, has a score."""
        curves = [steps for t in self.trials if t.status != "failed" and (steps := set(t.curve) - {0})]
        return max(set.intersection(*curves), default=None) if curves else None

    def settings_at(self, step: int) -> list[Setting]:
        """Return settings with their scores at one step, of all trials measured there that did not fail."""
        groups = by_setting(t for t in self.trials if t.status != "failed" and step in t.curve)
        return [Setting(members[0].values, members, tuple(t.curve[step] for t in members)) for members in groups]

    @property
    def seed_spread(self) -> float | None:
        """Standard deviation over seeds, pooled over the repeated settings; None where nothing was repeated."""
        repeated = [s for s in self.settings if len(s.scores) > 1]
        freedom = sum(len(s.scores) - 1 for s in repeated)
        return math.sqrt(sum((len(s.scores) - 1) * (s.std or 0.0) ** 2 for s in repeated) / freedom) if freedom else None

    # ------------------------------------------------------------------ counts and cost

    def count(self, status: str) -> int:
        return sum(t.status == status for t in self.trials)

    def states(self) -> str:
        """Return the trials by state, e.g. `4 finished, 8 stopped`."""
        return ", ".join(f"{self.count(s)} {s}" for s in STATUSES if self.count(s))

    @property
    def wall(self) -> float:
        """From the first to the last moment of the sweep, s; pauses between interruptions count."""
        begin = float(self.sweep.facts.get("created") or 0.0)
        end = float(self.sweep.facts.get("ended") or 0.0) or max((t.ended or 0.0 for t in self.trials), default=0.0)
        return max(0.0, end - begin) if begin and end else 0.0

    @property
    def images(self) -> int:
        return sum(t.images for t in self.trials)

    @property
    def saved(self) -> float | None:
        """Share of optimizer steps that early stopping saved, over the finished and stopped trials; None where none was stopped."""
        counted, total = [t for t in self.trials if t.status in ("finished", "stopped")], self.sweep.total_steps
        if not total or not self.count("stopped"):
            return None
        return 1 - sum(min(t.step, total) for t in counted) / (len(counted) * total)

    # ------------------------------------------------------------------ sentences

    @property
    def score_name(self) -> str:
        score = str(self.sweep.facts.get("score") or "score")
        return SCORE_NAMES.get(score, score)

    @property
    def percent(self) -> bool:
        """Whether the score is an accuracy."""
        return self.sweep.facts.get("score") in ("knn", "linear")

    def show(self, score: float | None) -> str:
        """Return a score as people read it."""
        return show_score(score, str(self.sweep.facts.get("score")), missing="no score")

    def gap(self, difference: float) -> str:
        """Return a difference of two scores as people read it."""
        return f"{100 * difference:.1f} points" if self.percent else f"{difference:.3f}"

    def best_score(self) -> str:
        """Return the best setting's score with its spread, e.g. `kNN accuracy 61.2 % ± 0.8 points (3 seeds) at step 250`."""
        spread = "" if self.best.std is None else f" ± {self.gap(self.best.std)} ({len(self.best.scores)} seeds)"
        return f"{self.score_name} {self.show(self.best.mean)}{spread} at step {self.final_step:,}"

    def verdict(self) -> str:
        """Say how far the best setting leads the second, and whether that is more than chance between seeds."""
        if len(self.settings) == 1:
            return f"No other setting has a score at step {self.final_step:,}, so there is nothing to compare it with."
        first, second = self.settings[:2]
        lead, spread = first.mean - second.mean, self.seed_spread
        begin = f"It leads the second setting by {self.gap(lead)}"
        if lead < 0:  # only with fewer seeds than asked for
            begin = f"A setting with fewer seeds scored {self.gap(-lead)} more, which does not count as much"
        if spread is None:
            remedy = "repeat the search with --seeds 3, or the best settings by hand"
            return f"{begin}. Every setting ran with one seed, so how much of that is chance is not known; {remedy}."
        repeats = f"standard deviation {self.gap(spread)}, pooled over {sum(len(s.scores) > 1 for s in self.settings)} repeated settings"
        if lead > spread:
            return f"{begin}: more than the spread over seeds ({repeats})."
        return f"{begin}: within the spread over seeds ({repeats}), so take the two as equal."
