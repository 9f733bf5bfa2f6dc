"""What a sweep folder holds, read back: trials, settings with their spread over seeds, what is best and what it cost."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.figures.charts import read_metrics
from pipeline.run_folder import RunFolder, command

SCORE_WORDS = {"knn": "kNN accuracy", "linear": "linear accuracy", "rankme": "RankMe"}
STATUSES = ("finished", "stopped", "interrupted", "running", "waiting", "failed")


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A searched setting and its range."""

    name: str  # dotted
    label: str  # without method., optim., train., unless two knobs would share it
    scale: str = "linear"  # log, linear, int, choice
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    text: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial; `score` is finite or None and was measured at `score_step`."""

    number: int
    values: dict[str, Any]
    seed: int = 0
    status: str = "waiting"
    error: str | None = None
    score: float | None = None
    step: int = 0
    seconds: float = 0.0
    images: int = 0
    ended: float | None = None  # s since 1970
    copied_from: tuple[int, ...] = ()  # PBT: the trials whose weights it took over
    exploits: tuple[int, ...] = ()  # PBT: at these steps, where the search has written them down
    curve: dict[int, float] = field(default_factory=dict)  # score by step; at step 0 that of the untrained network

    @property
    def ranked(self) -> bool:
        """Has it a score that may be compared?"""
        return self.score is not None and self.status != "failed"

    @property
    def score_step(self) -> int:
        return self.step if self.status == "finished" or not self.curve else max(self.curve)


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
        """Standard deviation over repeats (n - 1 in the divisor); None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep folder as it stands."""

    folder: Path
    facts: dict[str, Any]
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or self.folder.name)

    @property
    def total_steps(self) -> int:
        return int(self.facts.get("total_steps") or max((t.step for t in self.trials), default=0))

    @property
    def rungs(self) -> list[int]:
        return sorted(int(r) for r in self.facts.get("rungs") or ())

    @property
    def seeds(self) -> int:
        """How often each setting was to run."""
        return int(self.facts.get("seeds") or 1)

    @property
    def scheduler(self) -> str:
        return str(self.facts.get("scheduler") or "none")

    @cached_property
    def knobs(self) -> tuple[Knob, ...]:
        space: dict[str, dict[str, Any]] = self.facts.get("space") or {}
        short = {name: name.removeprefix(name.split(".")[0] + ".") for name in space}
        short = {name: label if name.startswith(("method.", "optim.", "train.")) else name for name, label in short.items()}
        taken = Counter(short.values())
        knobs = []
        for name, given in space.items():
            label = short[name] if taken[short[name]] == 1 else name
            choices = tuple(tuple(c) if isinstance(c, list) else c for c in given.get("choices") or ())
            words = {key: str(given.get(key) or "") for key in ("text", "reason")}
            knobs.append(
                Knob(
                    name=name,
                    label=label,
                    scale=given.get("scale") or "linear",
                    low=given.get("low"),
                    high=given.get("high"),
                    choices=choices,
                    **words,
                )
            )
        return tuple(knobs)

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
        """The step of their scores."""
        return max(t.score_step for t in self.finals)

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """Settings with a final score, best first: those that ran with all seeds, then the others.

        A setting that lost repeats to an early stop keeps only its luckier ones, so it does not lead one that has them all.
        """
        groups: dict[str, list[Trial]] = {}
        for trial in self.trials:
            groups.setdefault(_key(trial.values), []).append(trial)
        found = []
        for members in groups.values():
            scores = tuple(t.score for t in members if t in self.finals and t.score is not None)
            if scores:
                found.append(Setting(members[0].values, tuple(members), scores))
        most = min(self.seeds, max(len(s.scores) for s in found))
        return tuple(sorted(found, key=lambda s: (len(s.scores) < most, -s.mean, s.trials[0].number)))

    @property
    def best(self) -> Setting:
        return self.settings[0]

    @property
    def best_trial(self) -> Trial:
        """The best repeat of the best setting."""
        return max((t for t in self.best.trials if t in self.finals), key=lambda t: (t.score or 0.0, -t.number))

    @cached_property
    def common_step(self) -> int | None:
        """The last step at which every trial that was measured at all, and did not fail, has a score."""
        curves = [steps for t in self.trials if t.status != "failed" and (steps := set(t.curve) - {0})]
        return max(set.intersection(*curves), default=None) if curves else None

    def scores_at(self, step: int) -> list[tuple[dict[str, Any], tuple[float, ...]]]:
        """Searched values and scores at one step, by setting, of all trials measured there that did not fail."""
        groups: dict[str, list[Trial]] = {}
        for trial in self.trials:
            if trial.status != "failed" and step in trial.curve:
                groups.setdefault(_key(trial.values), []).append(trial)
        return [(members[0].values, tuple(t.curve[step] for t in members)) for members in groups.values()]

    @property
    def seed_spread(self) -> float | None:
        """Standard deviation over seeds, pooled over the repeated settings; None where nothing was repeated."""
        repeated = [s for s in self.settings if len(s.scores) > 1]
        freedom = sum(len(s.scores) - 1 for s in repeated)
        return math.sqrt(sum((len(s.scores) - 1) * (s.std or 0.0) ** 2 for s in repeated) / freedom) if freedom else None

    def count(self, status: str) -> int:
        return sum(t.status == status for t in self.trials)

    # ------------------------------------------------------------------ cost

    @property
    def wall(self) -> float:
        """From the first to the last moment of the sweep, s; pauses between interruptions count."""
        begin = _finite(self.facts.get("created"))
        end = _finite(self.facts.get("ended")) or max((t.ended or 0.0 for t in self.trials), default=0.0)
        return max(0.0, end - begin) if begin and end else 0.0

    @property
    def images(self) -> int:
        return sum(t.images for t in self.trials)

    @property
    def saved(self) -> float | None:
        """Share of optimizer steps that early stopping saved, over the finished and stopped trials; None where none was stopped."""
        counted = [t for t in self.trials if t.status in ("finished", "stopped")]
        if not self.total_steps or not any(t.status == "stopped" for t in counted):
            return None
        return 1 - sum(min(t.step, self.total_steps) for t in counted) / (len(counted) * self.total_steps)

    # ------------------------------------------------------------------ words

    @property
    def score_name(self) -> str:
        score = str(self.facts.get("score") or "score")
        return SCORE_WORDS.get(score, score)

    @property
    def percent(self) -> bool:
        """Is the score an accuracy?"""
        return self.facts.get("score") in ("knn", "linear")

    def show(self, score: float | None) -> str:
        """A score as people read it."""
        if score is None:
            return "no score"
        return f"{100 * score:.1f} %" if self.percent else f"{score:.3f}"

    def gap(self, difference: float) -> str:
        """A difference of two scores."""
        return f"{100 * difference:.1f} points" if self.percent else f"{difference:.3f}"

    def verdict(self) -> str:
        """How far the best setting leads the second, and whether that is more than chance between seeds."""
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


def _key(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def show_value(value: Any) -> str:
    """A searched value for a table: four significant digits."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(show_value(v) for v in value) if isinstance(value, Iterable) else str(value)


def show_values(values: dict[str, Any], knobs: Sequence[Knob]) -> str:
    """All searched values in one line."""
    return ", ".join(f"{k.label} {show_value(values[k.name])}" for k in knobs if k.name in values)


# ---------------------------------------------------------------------------- reading


def read_sweep(folder: Path) -> Sweep:
    """A sweep folder.

    Raises:
        ConfigError: it is none, or no trial of it has a score yet.
    """
    folder = folder.expanduser().resolve()
    try:
        facts = json.loads((folder / "sweep.json").read_text())
    except FileNotFoundError:
        what = "is a single run, not a sweep" if (folder / "run.json").exists() else "is no sweep: it holds no sweep.json"
        raise ConfigError(f"sweep={folder}: {what}; give the folder that `manyviews tune` made") from None
    except ValueError:
        raise ConfigError(f"sweep={folder}: its sweep.json cannot be read; restore it, or search again with: manyviews tune") from None
    alive = RunFolder(folder).locked()
    if facts.get("status") == "running" and not alive:  # its process is gone: killed, or the machine went down
        facts["status"] = "interrupted"
    folders = sorted((p for p in folder.glob("trial-[0-9]*") if p.is_dir() and p.name[6:].isdigit()), key=lambda p: (len(p.name), p.name))
    trials = tuple(_read_trial(path, facts.get("score"), alive) for path in folders)
    sweep = Sweep(folder=folder, facts=facts, trials=trials)
    if not any(t.ranked for t in trials):
        states = ", ".join(f"{sweep.count(s)} {s}" for s in STATUSES if sweep.count(s)) or "none started"
        error = next((f" (the first error: {t.error})" for t in trials if t.error), "")
        hopeless = trials and sweep.count("failed") == len(trials)
        remedy = "mend the cause and search again" if hopeless else f"go on with: {command('resume', sweep.name, runs_dir=folder.parent)}"
        raise ConfigError(f"sweep={sweep.name}: no trial has a score yet, {states}{error}; {remedy}")
    return sweep


def _read_trial(folder: Path, score: str | None, alive: bool) -> Trial:
    number = int(folder.name.removeprefix("trial-"))
    try:
        facts: dict[str, Any] = json.loads((folder / "trial.json").read_text())
    except FileNotFoundError:
        return Trial(number=number, values={})
    except ValueError:
        return Trial(number=number, values={}, status="failed", error="its trial.json cannot be read")
    series = read_metrics(folder / "metrics.jsonl")
    steps, scores = series.get("score") or series.get(score or "") or ((), ())
    curve = {int(step): float(value) for step, value in zip(steps, scores, strict=True)}
    final = _finite(facts.get("score"))
    status = str(facts.get("status") or "waiting")
    if final is None and max(curve, default=0) > 0 and status != "finished":
        # a trial that is cut off has told its last measurement only here
        final = curve[max(curve)]
    return Trial(
        number=number,
        values={k: tuple(v) if isinstance(v, list) else v for k, v in (facts.get("values") or {}).items()},
        seed=int(facts.get("seed") or 0),
        status="interrupted" if status == "running" and not alive else status,
        error=facts.get("error"),
        score=final,
        step=int(facts.get("step") or 0),
        seconds=_finite(facts.get("seconds")) or 0.0,
        images=int(facts.get("images") or 0),
        ended=_finite(facts.get("ended")),
        copied_from=tuple(facts.get("from") or ()),
        exploits=tuple(int(e["step"]) for e in facts.get("exploits") or ()),
        curve=curve,
    )


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
