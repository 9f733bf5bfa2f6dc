"""Messages between rank 0 and the driver, and broadcasts among the workers, through an actor that the driver polls."""

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
    """Actor that holds the messages of rank 0 since the last poll, and the driver's request to stop."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.stop = False
        self.value: Any = None

    def set_value(self, value: Any) -> None:
        """Store the broadcast value (rank 0)."""
        self.value = value

    def get_value(self) -> Any:
        """Return the broadcast value (every worker)."""
        return self.value

    def post(self, messages: list[Message]) -> bool:
        """Add messages (every worker). Return whether to stop."""
        self.messages += messages
        return self.stop

    def collect(self, stop: bool) -> list[Message]:
        """Return the messages since the last call (driver)."""
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
    """Return a collective function of all workers that takes a value and returns rank 0's.

    The value may contain object references. `ray.train.collective.broadcast_from_rank_zero` pickles the value to measure its size, which
    would keep the objects alive as long as rank 0.
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
    """The reporter of a worker. Rank 0 sends progress and metrics to the driver; other ranks only receive the request to stop.

    A worker exits at once if the channel no longer exists: the driver has ended the attempt, or has died.

    Attributes:
        stopping: set when the driver asks the run to stop.
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
                self._messages.pop()  # a later step replaces one without loss and kNN
        self._post("update", step=step, **figures)

    def info(self, text: str) -> None:
        self._post("info", text=text)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step in the run's folder, so that none are lost if the driver is killed."""
        if self.rank > 0:
            return
        line = encode(step, metrics)
        if self.folder.place.is_remote:
            self._post("point", line=line)
        else:
            with contextlib.suppress(OSError):  # a full disk stops the run at its next checkpoint, with a clear message
                append_line(self.folder.path, line)

    def close(self) -> None:
        """Send the remaining messages."""
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
    """Show and record the messages of rank 0, on the driver."""
    for kind, content in messages:
        if kind == "point":
            append_line(folder.path, content["line"])
        else:
            getattr(reporter, kind)(**content)
