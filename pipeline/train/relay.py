"""The line between rank 0, wherever it runs, and the driver, who has the screen and the keyboard: its two ends."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.points import append_line, encode
from pipeline.runs import RunFolder
from pipeline.train.display import Pace, Screen
from pipeline.train.guards import TrainingStopped
from pipeline.train.relay_actor import Relay as Relay

PAUSE = 0.25  # s between messages


class Mute:
    """The screen of every rank but 0."""

    images_per_s = 0.0

    def update(self, step: int, *, loss: float | None = None, knn: float | None = None) -> None: ...

    def say(self, text: str) -> None: ...


class Remote:
    """Rank 0's screen: what it is told goes to the driver in the background. Points go straight to the run's folder.

    Attributes:
        first: no worker of this group was lost before.
    """

    def __init__(self, relay: Any, folder: RunFolder, batch: int, start_step: int) -> None:
        self.relay, self.folder, self.pace = relay, folder, Pace(batch, start_step)
        self.stopping = threading.Event()
        self._said: list[tuple[str, dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="relay", daemon=True)
        self._begin(start_step)
        self._thread.start()

    def _begin(self, step: int) -> None:
        """Wait until the driver has forgotten the points behind this step."""
        import ray

        life = ray.get(self.relay.begun.remote())
        self.first = life == 0
        ray.get(self.relay.send.remote([("begin", {"step": step})]))
        while not ray.get(self.relay.may_begin.remote(life)):
            time.sleep(PAUSE / 2)

    @property
    def images_per_s(self) -> float:
        return self.pace.images_per_s

    def update(self, step: int, *, loss: float | None = None, knn: float | None = None) -> None:
        self.pace.mark(step)
        with self._lock:
            if loss is None and knn is None and self._said and self._said[-1][0] == "update" and len(self._said[-1][1]) == 1:
                self._said.pop()  # only the newest bare step is of interest
            figures = {key: value for key, value in (("loss", loss), ("knn", knn)) if value is not None}
            self._said.append(("update", {"step": step} | figures))

    def say(self, text: str) -> None:
        with self._lock:
            self._said.append(("say", {"text": text}))

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point: on the shared storage first, so that a killed driver loses none."""
        line = encode(step, metrics)
        if self.folder.place.is_remote:  # the driver has a copy, which it sends
            with self._lock:
                self._said.append(("point", {"line": line}))
            return
        with contextlib.suppress(OSError):  # a full disk stops the run at its next checkpoint, with a clear message
            append_line(self.folder.path, line)

    def close(self) -> None:
        """Send what is left."""
        self._end.set()
        self._thread.join(timeout=10)

    def _work(self) -> None:
        import ray

        while True:
            ending = self._end.wait(PAUSE)
            with self._lock:
                said, self._said = self._said, []
            with contextlib.suppress(ray.exceptions.RayError):  # a driver that went away ends this process soon
                if ray.get(self.relay.send.remote(said)):
                    self.stopping.set()
            if ending:
                return


class Listener:
    """The driver's end: shows what rank 0 says and passes on the wish to stop.

    Args:
        before: called with the step from which a worker group begins, before it does.
        restarts: groups that may begin at the same step before the run gives up.

    Attributes:
        heard_at: monotonic time of the last sign of life, s.
    """

    def __init__(self, relay: Any, screen: Screen, folder: Path, before: Callable[[int], None], restarts: int) -> None:
        self.relay, self.screen, self.folder, self.before, self.restarts = relay, screen, folder, before, restarts
        self.heard_at = time.monotonic()
        self.begins: list[int] = []

    def listen(self, stop: bool) -> bool:
        """Returns whether there was anything.

        Raises:
            Exception: what a worker failed with, where starting again would not help.
            TrainingStopped: workers were lost too often without a new checkpoint between.
        """
        import ray

        said = ray.get(self.relay.take.remote(stop))
        for kind, what in said:
            if kind == "point":
                append_line(self.folder, what["line"])
            elif kind == "begin":
                self.begin(what["step"])
            elif kind == "failed":
                raise what["error"]
            elif kind == "absent":
                raise TrainingStopped(
                    f"a worker on {what['node']} cannot import this project ({what['reason']}); "
                    "install the packages of the driver's environment there (`manyviews doctor` compares them)"
                )
            else:
                getattr(self.screen, kind)(**what)
        if said:
            self.heard_at = time.monotonic()
        return bool(said)

    def begin(self, step: int) -> None:
        import ray

        if self.begins:
            self.screen.say(f"[yellow]warning:[/yellow] workers were lost; going on from step {step}")
        self.begins.append(step)
        if self.begins.count(step) > self.restarts + 1:
            raise TrainingStopped(
                f"workers were lost {self.restarts + 1} times without a checkpoint after step {step}; look at their machines"
            )
        self.before(step)
        ray.get(self.relay.admit.remote())
