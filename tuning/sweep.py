"""A sweep on disk, for the search that writes it and the report that reads it: what was asked for, every trial's values and state.

RUNS/SWEEP/sweep.json  config.yaml  trial-000/ (an ordinary run folder, and trial.json)  ray/ (the state of Ray Tune)  report/
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.parts.errors import ConfigError
from pipeline.metrics_log import read_points
from pipeline.run_folder import RunFolder, new_folder, write_json
from pipeline.storage.place import write_atomic
from tuning.space import Param, as_value

if TYPE_CHECKING:
    from pipeline.config import RunConfig  # importing it costs seconds (torch)

STATUSES = ("finished", "stopped", "interrupted", "running", "waiting", "failed")
ENDED = ("finished", "stopped", "failed")  # `resume` does not run these again
STOP = ".stop"  # in the sweep's folder: trials are to end with whole checkpoints, and no other begins


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial, as its `trial.json` has it; the folder is also a run's. `score` is finite or None."""

    folder: Path
    values: dict[str, Any]
    seed: int = 0
    status: str = "waiting"
    error: str | None = None
    score: float | None = None
    step: int = 0
    seconds: float = 0.0  # of training
    images: int = 0
    started: float | None = None  # s since 1970
    ended: float | None = None
    copied_from: tuple[int, ...] = ()  # PBT: the trials whose weights it took over
    exploits: tuple[int, ...] = ()  # PBT: the steps at which it did
    metric: str = "score"  # what a version without the metric `score` has logged

    @property
    def number(self) -> int:
        return int(self.folder.name.removeprefix("trial-"))

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def ranked(self) -> bool:
        """Whether it has a score that may be compared."""
        return self.score is not None and self.status != "failed"

    @property
    def score_step(self) -> int:
        """The step at which `score` was measured."""
        return self.step if self.status == "finished" or not self.curve else max(self.curve)

    @cached_property
    def curve(self) -> dict[int, float]:
        """Score by step; at step 0 that of the untrained network."""
        points = [(p["step"], p["metrics"].get("score", p["metrics"].get(self.metric))) for p in read_points(self.folder)]
        return {step: score for step, score in points if score is not None and math.isfinite(score)}

    def facts(self) -> dict[str, Any]:
        """Return `trial.json` as it is now."""
        facts: dict[str, Any] = json.loads((self.folder / "trial.json").read_text())
        return facts

    def update(self, **changes: Any) -> None:
        write_json(self.folder / "trial.json", self.facts() | changes)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, with `sweep.json` as it was when it was read."""

    path: Path
    facts: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """Read a sweep; `running` without a process at work reads `interrupted`.

        Raises:
            ConfigError: the folder is no sweep.
        """
        folder = folder.expanduser().resolve()
        try:
            facts = json.loads((folder / "sweep.json").read_text())
        except FileNotFoundError:
            what = "is a single run, not a sweep" if (folder / "run.json").exists() else "is no sweep: it holds no sweep.json"
            raise ConfigError(f"sweep={folder}: {what}; give the folder that `manyviews tune` made") from None
        except ValueError:
            raise ConfigError(f"sweep={folder}: its sweep.json cannot be read; restore it, or search again with: manyviews tune") from None
        if facts.get("status") == "running" and not RunFolder(folder).locked():
            facts["status"] = "interrupted"  # its process was killed, or the machine went down
        return cls(folder, facts)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stopping(self) -> bool:
        """Whether the sweep has been asked to end."""
        return (self.path / STOP).exists()

    @property
    def total_steps(self) -> int:
        return int(self.facts.get("total_steps") or 0)

    @property
    def rungs(self) -> list[int]:
        """The steps at which the scheduler decides."""
        return sorted(int(rung) for rung in self.facts.get("rungs") or ())

    @property
    def seeds(self) -> int:
        """How often each setting was to run."""
        return int(self.facts.get("seeds") or 1)

    @property
    def scheduler(self) -> str:
        return str(self.facts.get("scheduler") or "none")

    @cached_property
    def params(self) -> tuple[Param, ...]:
        return tuple(Param.from_dict(key, given) for key, given in (self.facts.get("space") or {}).items())

    @cached_property
    def labels(self) -> dict[str, str]:
        """Short names of the searched settings: without method., optim. and train., unless two would share one."""
        keys = [param.key for param in self.params]
        short = {key: key.partition(".")[2] if key.startswith(("method.", "optim.", "train.")) else key for key in keys}
        taken = Counter(short.values())
        return {key: label if taken[label] == 1 else key for key, label in short.items()}

    def config(self) -> RunConfig:
        """Return the settings before the searched values."""
        from pipeline.config import from_yaml

        return from_yaml((self.path / "config.yaml").read_text())

    def update(self, **changes: Any) -> None:
        """Change `sweep.json`, and the facts held here."""
        self.facts.update(changes)
        write_json(self.path / "sweep.json", json.loads((self.path / "sweep.json").read_text()) | changes)

    # ------------------------------------------------------------------ trials

    def trials(self) -> list[Trial]:
        """Read every trial, in the order of their numbers."""
        alive = RunFolder(self.path).locked()
        folders = [path for path in self.path.glob("trial-[0-9]*") if path.is_dir() and path.name[6:].isdigit()]
        return [self._read(path, alive) for path in sorted(folders, key=lambda path: (len(path.name), path.name))]

    def trial(self, name: str | int) -> Trial:
        """Read one trial by its number or the name of its folder."""
        return self._read(self.path / (name if isinstance(name, str) else f"trial-{name:03d}"), RunFolder(self.path).locked())

    def _read(self, folder: Path, alive: bool) -> Trial:
        try:
            facts: dict[str, Any] = json.loads((folder / "trial.json").read_text())
        except FileNotFoundError:
            return Trial(folder=folder, values={})
        except ValueError:
            return Trial(folder=folder, values={}, status="failed", error="its trial.json cannot be read")
        status = str(facts.get("status") or "waiting")
        trial = Trial(
            folder=folder,
            values={key: as_value(value) for key, value in (facts.get("values") or {}).items()},
            seed=int(facts.get("seed") or 0),
            status="interrupted" if status == "running" and not alive else status,
            error=facts.get("error"),
            score=_finite(facts.get("score")),
            step=int(facts.get("step") or 0),
            seconds=_finite(facts.get("seconds")) or 0.0,
            images=int(facts.get("images") or 0),
            started=_finite(facts.get("started")),
            ended=_finite(facts.get("ended")),
            copied_from=tuple(facts.get("from") or ()),
            exploits=tuple(int(exploit["step"]) for exploit in facts.get("exploits") or ()),
            metric=str(self.facts.get("score")),
        )
        if trial.score is None and trial.status != "finished" and max(trial.curve, default=0) > 0:
            return replace(trial, score=trial.curve[max(trial.curve)])  # it was killed before its driver wrote the score down
        return trial

    def add(self, number: int, values: Mapping[str, Any], seed: int, error: str | None = None) -> Trial:
        """Make the folder of a trial: a run that has not begun, or one that cannot work, with the reason."""
        from pipeline.config import to_yaml

        folder = self.path / f"trial-{number:03d}"
        RunFolder(folder).figures.mkdir(parents=True, exist_ok=True)
        if error is None:
            write_atomic(folder / "config.yaml", to_yaml(self.trial_config(values, seed)).encode())
        run = {"name": folder.name, "recipe": self.facts["recipe"], "created": time.time(), "total_steps": self.total_steps}
        run |= {"status": "failed", "message": error} if error else {"status": "created"}
        write_json(folder / "run.json", run)
        trial = {"number": number, "values": values, "seed": seed, "status": "failed" if error else "waiting", "error": error}
        trial |= {"score": None, "step": 0, "seconds": 0.0, "images": 0, "started": None, "ended": time.time() if error else None}
        write_json(folder / "trial.json", trial | {"from": None})
        return self.trial(folder.name)

    def trial_config(self, values: Mapping[str, Any], seed: int) -> RunConfig:
        """Return a trial's settings: the sweep's, those that every trial has, and the searched values.

        Raises:
            ConfigError: a value is out of range.
        """
        from pipeline.config import override

        base, every = self.config(), self.facts["measure_every"]
        common: dict[str, Any] = {
            "train.seed": seed,
            "evaluate.score": self.facts["score"],
            "evaluate.knn_every": every,
            # a trial that is cut, or goes on later, has a checkpoint where it was measured
            "train.checkpoint_every": base.train.checkpoint_every or every,
            "track.uri": self.facts["track_uri"],
            "track.register": False,  # the sweep registers the best one
        }
        if self.scheduler == "pbt":  # others go on from these
            common |= {"train.checkpoint_every": every, "train.keep_every": self.rungs[0]}
        return override(base, common | {key: as_value(value) for key, value in values.items()})


def create(runs_dir: Path, name: str | None, config: RunConfig, facts: Mapping[str, Any]) -> Sweep:
    """Make a new sweep's folder.

    Raises:
        ConfigError: the name is taken or not a plain name, or the folder cannot be written.
    """
    from pipeline.config import to_yaml

    path = new_folder(runs_dir, name, f"tune-{config.recipe}", "name")
    write_atomic(path / "config.yaml", to_yaml(config).encode())
    started = {"name": path.name, "kind": "sweep", "status": "created", "created": time.time(), "ended": None}
    write_json(path / "sweep.json", started | dict(facts))
    return Sweep.read(path)


def find(reference: str, runs_dir: Path) -> Sweep | None:
    """Return the sweep of a name or path; None if there is none."""
    for path in (runs_dir / reference, Path(reference)):
        if (path / "sweep.json").is_file():
            return Sweep.read(path)
    return None


def sweeps(runs_dir: Path) -> list[Sweep]:
    """Return every sweep of a folder, oldest first."""
    found = [Sweep.read(path.parent) for path in runs_dir.glob("*/sweep.json")]
    return sorted(found, key=lambda sweep: sweep.facts["created"])


# ---------------------------------------------------------------------------- how values and scores read


def show_value(value: Any) -> str:
    """Return a searched value with four significant digits."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(show_value, value)) if isinstance(value, Iterable) else str(value)


def show_values(values: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Return all searched values in one line."""
    return ", ".join(f"{label} {show_value(values[key])}" for key, label in labels.items() if key in values)


def show_score(score: float | None, kind: str, *, missing: str = "-") -> str:
    """Return a score as people read it: accuracies in percent."""
    if score is None:
        return missing
    return f"{100 * score:.1f} %" if kind in ("knn", "linear") else f"{score:.3f}"


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
