"""The folder of a sweep: what was asked for, every trial's values and state, and how a trial's settings come about.

RUNS/SWEEP/sweep.json  config.yaml  trial-000/ (an ordinary run folder, and trial.json)  report/
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run_folder import RunFolder, new_folder, write_json
from pipeline.storage.place import write_atomic
from pipeline.tracking.client import default_uri

if TYPE_CHECKING:
    from pipeline.config import RunConfig  # importing it costs seconds (torch)

ENDED = ("finished", "stopped", "failed")  # a trial that `resume` leaves alone
SCORE_WORDS = {
    "knn": (
        "kNN top-1 (k {k}, T {t:g}) on held-out training images, which no trial trains on; the test split is not read. With {n} images "
        "asked, differences below {error:.1f} points are within chance (one standard error near 50 %)"
    ),
    "linear": (
        "top-1 of a linear probe on held-out training images, which no trial trains on; the test split is not read. With {n} images "
        "asked, differences below {error:.1f} points are within chance (one standard error near 50 %)"
    ),
    "rankme": (
        "RankMe (arXiv:2210.02885): effective rank of the features of training images, divided by the most it can be. It needs no "
        "labels. A high rank is needed for good features and does not prove them, so noise can raise it; compare it within one method "
        "and one width of backbone only"
    ),
}
LOSS_WORDS = (
    "--score loss: a loss is not comparable across temperatures, prototypes, queues or masks, because they change its scale: a search "
    "would pick the easiest task, not the best features; use knn, linear, or rankme without labels"
)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def facts(self) -> dict[str, Any]:
        """`sweep.json`; `running` without a process at work reads `interrupted`."""
        facts: dict[str, Any] = json.loads((self.path / "sweep.json").read_text())
        if facts["status"] == "running" and not self.run.locked():
            facts["status"] = "interrupted"
        return facts

    @property
    def run(self) -> RunFolder:
        """The folder as a run's, for its lock."""
        return RunFolder(self.path)

    def update(self, **changes: Any) -> None:
        write_json(self.path / "sweep.json", json.loads((self.path / "sweep.json").read_text()) | changes)

    def config(self) -> RunConfig:
        """The settings before the searched values."""
        from pipeline.config import from_yaml

        return from_yaml((self.path / "config.yaml").read_text())

    def trials(self) -> list[Trial]:
        """In the order of their numbers."""
        return [Trial(path.parent) for path in sorted(self.path.glob("trial-*/trial.json"))]

    def trial(self, number: int) -> Trial:
        return Trial(self.path / f"trial-{number:03d}")

    def add(self, number: int, values: dict[str, Any], seed: int, error: str | None = None) -> Trial:
        """A new trial's folder: a run that has not begun, or one that cannot."""
        trial = self.trial(number)
        for folder in (trial.run.path, trial.run.figures):
            folder.mkdir(exist_ok=True)
        facts = self.facts()
        config = self.config()
        if error is None:
            config = trial_config(config, facts, values, seed)
            from pipeline.config import to_yaml

            write_atomic(trial.path / "config.yaml", to_yaml(config).encode())
        status = "failed" if error else "created"
        start = {
            "name": trial.path.name,
            "recipe": config.recipe,
            "created": time.time(),
            "status": status,
            "total_steps": facts["total_steps"],
        }
        write_json(trial.path / "run.json", start | ({"message": error} if error else {}))
        facts = {
            "number": number,
            "values": values,
            "seed": seed,
            "status": "failed" if error else "waiting",
            "error": error,
            "score": None,
        }
        facts |= {"step": 0, "seconds": 0.0, "images": 0, "started": None, "ended": time.time() if error else None, "from": None}
        write_json(trial.path / "trial.json", facts)
        return trial


@dataclass(frozen=True)
class Trial:
    """One trial's folder, which is also a run's."""

    path: Path

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path)

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.path / "trial.json").read_text())
        return facts

    def update(self, **changes: Any) -> None:
        write_json(self.path / "trial.json", self.facts() | changes)


def create(runs_dir: Path, name: str | None, config: RunConfig, facts: dict[str, Any]) -> Sweep:
    """A new sweep's folder.

    Raises:
        ConfigError: the name is taken or not a plain name, or the folder cannot be written.
    """
    from pipeline.config import to_yaml

    sweep = Sweep(new_folder(runs_dir, name, f"tune-{config.recipe}", "name"))
    write_atomic(sweep.path / "config.yaml", to_yaml(config).encode())
    started = {"name": sweep.name, "kind": "sweep", "status": "created", "created": time.time(), "ended": None}
    write_json(sweep.path / "sweep.json", started | facts)
    return sweep


def find(reference: str, runs_dir: Path) -> Sweep | None:
    """The sweep of a name or path; None if there is none."""
    for path in (runs_dir / reference, Path(reference)):
        if (path / "sweep.json").is_file():
            return Sweep(path.resolve())
    return None


def sweeps(runs_dir: Path) -> list[Sweep]:
    """Every sweep of a folder, oldest first."""
    found = [Sweep(path.parent) for path in runs_dir.glob("*/sweep.json")]
    return sorted(found, key=lambda sweep: sweep.facts()["created"])


def trial_config(base: RunConfig, sweep: dict[str, Any], values: dict[str, Any], seed: int) -> RunConfig:
    """A trial's settings: the base, what every trial of the sweep has, and the searched values.

    Raises:
        ConfigError: a value out of range.
    """
    from pipeline.config import override

    every = sweep["measure_every"]
    common: dict[str, Any] = {
        "train.seed": seed,
        "evaluate.score": sweep["score"],
        "evaluate.knn_every": every,
        # a trial that is cut, or goes on later, has a checkpoint where it was measured
        "train.checkpoint_every": base.train.checkpoint_every or every,
        "track.uri": sweep["track_uri"],
        "track.register": False,  # the best one is, by the sweep
    }
    if sweep["scheduler"] == "pbt":  # others go on from these
        common |= {"train.checkpoint_every": every, "train.keep_every": sweep["rungs"][0]}
    return override(base, common | {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def track_uri(config: RunConfig, runs_dir: Path) -> str:
    """Where sweep and trials are tracked: beside each other, so that MLflow shows them nested."""
    return config.track.uri or default_uri(runs_dir)


def score_words(score: str, config: RunConfig, asked: int) -> str:
    """What a score is, on which images, and its limits."""
    n = min(asked, config.evaluate.knn_queries)
    error = 50 / max(1, n) ** 0.5
    return SCORE_WORDS[score].format(k=config.evaluate.knn_k, t=config.evaluate.knn_temperature, n=f"{n:,}", error=error)


def show_score(score: float | None, kind: str) -> str:
    """A score as people read it: accuracies in percent."""
    if score is None:
        return "-"
    return f"{100 * score:.1f} %" if kind in ("knn", "linear") else f"{score:.3f}"


def ranked(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials best first: those that ran to the end by score, then those that were cut, by step and score, then the others."""

    def key(facts: dict[str, Any]) -> tuple[Any, ...]:
        score = facts["score"]
        known = score is not None and score == score
        return (facts["status"] != "finished", not known, -facts["step"], -(score if known else 0.0), facts["number"])

    return sorted(trials, key=key)
