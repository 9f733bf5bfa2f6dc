"""Messages between the workers of a run and its driver, and among the workers, through one small actor that the driver polls."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.metrics_log import append_line, encode
from pipeline.run_folder import RunFolder
from pipeline.train.progress import ProgressReporter, Throughput

PAUSE_S = 0.25  # between messages
Message = tuple[str, dict[str, Any]]


class Channel:
    """The actor in the middle: what rank 0 has reported since the driver last asked, and whether the driver wants the run to stop."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.stop = False
        self.value: Any = None

    def set_value(self, value: Any) -> None:
        """From rank 0, for the other workers."""
        self.value = value

    def get_value(self) -> Any:
        """From a worker."""
        return self.value

    def post(self, messages: list[Message]) -> bool:
        """From a worker. Return whether to stop."""
        self.messages += messages
        return self.stop

    def collect(self, stop: bool) -> list[Message]:
        """From the driver. Return the messages since the last call."""
        self.stop = self.stop or stop
        messages, self.messages = self.messages, []
        return messages


def open_channel() -> Any:
    """Start the actor on this node; it ends with this process, or by `ray.kill`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Channel).remote()


def broadcast_through(channel: Any, rank: int) -> Callable[[Any], Any]:
    """Return a collective function of all workers: it takes a value, and returns on every rank what rank 0 gave.

    The value may hold object references. `ray.train.collective.broadcast_from_rank_zero` would keep these, and what they stand for, as long
    as rank 0 lives, because it measures their size by pickling them.
    """
    import ray
    from ray.train.collective import barrier

    def broadcast(value: Any) -> Any:
        if rank == 0:
            ray.get(channel.set_value.remote(value))
        barrier()
        found = ray.get(channel.get_value.remote())
        barrier()
        if rank == 0:
            channel.set_value.remote(None)
        return found

    return broadcast


class RemoteReporter:
    """A worker's end. On rank 0 it is the screen and takes the metrics; other ranks only watch for the end.

    A worker whose channel is gone exits at once: the driver has given its attempt up, or has died.

    Attributes:
        stopping: the driver wants the run to stop.
    """

    def __init__(self, channel: Any, folder: RunFolder, *, rank: int, batch: int, start_step: int) -> None:
        self.channel, self.folder, self.rank = channel, folder, rank
        self.throughput = Throughput(batch, start_step)
        self.stopping = threading.Event()
        self._messages: list[Message] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="reporter", daemon=True)
        self._thread.start()

    @property
    def images_per_s(self) -> float:
        return self.throughput.images_per_s

    def update(self, step: int, *, loss: float | None = None, knn: float | None = None) -> None:
        self.throughput.mark(step)
        figures = {key: value for key, value in (("loss", loss), ("knn", knn)) if value is not None}
        with self._lock:
            if not figures and self._messages and set(self._messages[-1][1]) == {"step"}:
                self._messages.pop()  # the driver needs the newest bare step only
        self._post("update", step=step, **figures)

    def info(self, text: str) -> None:
        self._post("info", text=text)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one point: in the run's folder first, so that a killed driver loses none."""
        if self.rank > 0:
            return
        line = encode(step, metrics)
        if self.folder.place.is_remote:
            self._post("point", line=line)
        else:
            with contextlib.suppress(OSError):  # a full disk stops the run at its next checkpoint, with a clear message
                append_line(self.folder.path, line)

    def close(self) -> None:
        """Send what is left."""
        self._closing.set()
        self._thread.join(timeout=10)

    def _post(self, kind: str, **content: Any) -> None:
        if self.rank == 0:
            with self._lock:
                self._messages.append((kind, content))

    def _exchange(self) -> None:
        import ray

        while True:
            closing = self._closing.wait(PAUSE_S)
            with self._lock:
                messages, self._messages = self._messages, []
            try:
                if ray.get(self.channel.post.remote(messages)):
                    self.stopping.set()
            except ray.exceptions.RayError:
                if not closing:
                    os._exit(1)
            if closing:
                return


def deliver(messages: list[Message], reporter: ProgressReporter, folder: RunFolder) -> None:
    """The driver's end: show and record what rank 0 has reported."""
    for kind, content in messages:
        if kind == "point":
            append_line(folder.path, content["line"])
        else:
            getattr(reporter, kind)(**content)
