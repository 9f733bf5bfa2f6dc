"""A run as its driver conducts it: screen, tracking, the wish to stop and the word of how it ended, around what trains.

Nothing here is slow to load: the driver of a run that goes on with its workers needs no torch before the run is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from methods.parts.errors import ConfigError
from pipeline import mirror
from pipeline.ingest.ray_data import start_ray
from pipeline.runs import RunFolder
from pipeline.tracking import EndStatus, Tracker
from pipeline.train import checkpoint
from pipeline.train.display import Display, Screen
from pipeline.train.done import Done
from pipeline.train.guards import TrainingStopped

if TYPE_CHECKING:
    from pipeline.evaluate.protocols import Scores
    from pipeline.registry import Registered


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. `status` is finished, interrupted or failed."""

    folder: RunFolder
    status: str
    message: str = ""
    scores: Scores | None = None
    model: Registered | None = None

    @property
    def recipe(self) -> str:
        return str(self.folder.state().get("recipe", ""))

    @property
    def tracking_uri(self) -> str:
        from pipeline.config import from_yaml
        from pipeline.train.finish import tracking_uri

        return tracking_uri(from_yaml(self.folder.config_text()), self.folder)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        scores = self.scores.to_dict() if self.scores else None
        model = {"uri": self.model.uri, "version": self.model.version} if self.model else None
        return self.folder.state() | {"folder": str(self.folder.path), "message": self.message, "scores": scores, "registered": model}


@dataclasses.dataclass(frozen=True)
class Course:
    """What a run's screen tells besides its position; lies in `run.json`.

    `chance` is the loss of guessing, with the words for it.
    """

    total_steps: int
    global_batch_size: int
    chance: tuple[float, str] | None

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Course | None:
        """As a run's facts tell it; None if they do not, because another version of this project wrote them."""
        try:
            chance = facts["chance"] and (float(facts["chance"][0]), str(facts["chance"][1]))
            return cls(int(facts["total_steps"]), int(facts["global_batch_size"]), chance)
        except (KeyError, TypeError, IndexError, ValueError):
            return None


def conduct(
    folder: RunFolder,
    course: Course,
    tracker: Tracker,
    console: Console,
    train: Callable[[Screen, Callable[[], bool]], Done],
    *,
    extra_cpus: int = 0,
) -> Outcome:
    """Train to the end, or until Ctrl-C or SIGTERM; then register the backbone, and write down how it ended.

    Args:
        tracker: of this run; it is closed.
        train: trains, given a screen and what says whether to stop.
        extra_cpus: of a local Ray, as in `start_ray`.

    Raises:
        ConfigError: something must be changed first.
    """
    outcome = Outcome(folder, "failed", "ended unexpectedly")
    try:
        start_ray(extra_cpus=extra_cpus)  # first: it installs a SIGTERM handler of its own
        start = checkpoint.last_step(folder.checkpoints)
        display = Display(console, total_steps=course.total_steps, start_step=start, batch=course.global_batch_size, chance=course.chance)
        with interruptible() as stop, display:
            done = train(display, stop.is_set)
        if not done.complete:
            outcome = Outcome(folder, "interrupted", f"stopped at step {done.step}; its checkpoint is whole")
            return outcome
        from pipeline.train.finish import register

        for picture in done.pictures:
            tracker.artifact(folder.figures / picture)
        outcome = Outcome(folder, "finished", scores=done.scores, model=register(folder, tracker, console))
        return outcome
    except (TrainingStopped, checkpoint.DiskFull) as error:
        outcome = Outcome(folder, "failed", str(error))
        return outcome
    except ConfigError as error:
        outcome = Outcome(folder, "failed", str(error))
        raise
    except KeyboardInterrupt:
        outcome = Outcome(folder, "interrupted", "stopped at once; the last checkpoint is whole")
        return outcome
    finally:
        ends: dict[str, EndStatus] = {"finished": "FINISHED", "interrupted": "KILLED"}
        folder.update(status=outcome.status, message=outcome.message, ended=time.time())
        unsent = tracker.close(ends.get(outcome.status, "FAILED"))
        with contextlib.suppress(ConfigError):
            mirror.push(folder.path, only="tracking.json")
        if unsent:
            console.print(f"{unsent} entries have not reached MLflow; they are kept. Later: manyviews sync {folder.name}", soft_wrap=True)


def tracked(folder: RunFolder, tags: Mapping[str, object] | None = None) -> Tracker:
    """The tracking of a run, where its settings want it."""

    def params() -> Mapping[str, object]:
        from methods.parts.contract import find
        from pipeline.config import flatten, from_yaml

        config = from_yaml(folder.config_text())
        return flatten(config) | {"method": find(config.method).name}

    track = yaml.safe_load(folder.config_text())["track"]
    return Tracker.open(folder.path, uri=track["uri"], experiment=track["experiment"], name=folder.name, params=params, tags=tags or {})


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask the loop to stop after the current step; a second one stops at once."""
    stop = threading.Event()

    def ask(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in earlier.items():
            signal.signal(s, handler)
