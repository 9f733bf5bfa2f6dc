"""What of a run the processes between driver and workers need: the middle of the line, and the way into a worker.

This code travels by value (`register_pickle_by_value`), so it needs no import of ours: the actor and Ray Train's controller
spare torch, and a node on which the project cannot be imported can still say so.
"""

from __future__ import annotations

from typing import Any


class Relay:
    """The actor in the middle: what rank 0 has said since it was last asked, and what the driver wants."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.stop = False
        self.lives = 0  # worker groups that may begin
        self.parts: dict[str, dict[str, Any]] = {}

    def give(self, run: str, parts: dict[str, Any]) -> None:
        """From the driver: what a run's workers need to begin."""
        self.parts[run] = parts

    def given(self, run: str) -> dict[str, Any] | None:
        """From a worker: that, if the driver has given it."""
        return self.parts.get(run)

    def send(self, said: list[tuple[str, dict[str, Any]]]) -> bool:
        """From a worker. Returns whether the driver wants the run to stop."""
        self.said += said
        return self.stop

    def may_begin(self, life: int) -> bool:
        """From rank 0: has the driver made way for the worker group of this number?"""
        return self.lives > life

    def begun(self) -> int:
        """How many worker groups there were."""
        return self.lives

    def take(self, stop: bool) -> list[tuple[str, dict[str, Any]]]:
        """From the driver: everything said since the last call."""
        self.stop = self.stop or stop
        said, self.said = self.said, []
        return said

    def admit(self) -> None:
        """From the driver: the next worker group may begin."""
        self.lives += 1


def enter(settings: dict[str, Any]) -> Any:
    """What Ray Train runs in every worker: the worker of this project, or word of why it cannot be imported there.

    Ray Train would start a worker that fails at once again and again.
    """
    import gc
    import socket

    import ray

    def absent(error: Exception) -> None:
        word = {"node": socket.gethostname(), "reason": f"{type(error).__name__}: {error}"}
        ray.get(settings["relay"].send.remote([("absent", word)]))

    gc.disable()  # a module that is loaded makes objects and no garbage: looking for it is a tenth of the time
    try:
        from pipeline.train.worker import run
    except Exception as error:  # a missing library of the system is no ImportError
        absent(error)
        raise
    gc.enable()
    try:
        return run(settings)
    except ImportError as error:  # of what it loads later
        absent(error)
        raise
