"""The driver beside its workers: it listens to a group until that ends. Nothing here is slow to load."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline import mirror
from pipeline.runs import RunFolder
from pipeline.train.display import Screen
from pipeline.train.done import Done
from pipeline.train.group import Group, Shape, fits
from pipeline.train.guards import TrainingStopped
from pipeline.train.relay import Listener

POLL = 0.2  # s


class WorkersLost(RuntimeError):
    """Workers died, or their machines did; the run can go on from its last checkpoint."""


def attend(
    group: Group,
    folder: RunFolder,
    *,
    screen: Screen,
    stop: Callable[[], bool],
    news: Callable[[], None],
    before: Callable[[int], None],
) -> Done:
    """Listen to a group until it ends.

    Args:
        stop: asked a few times a second; True ends the run with a whole checkpoint.
        news: called when points may have been written.
        before: called with the step from which every attempt starts.

    Raises:
        WorkersLost: the group is gone, and Ray Train does not start it again.
        TrainingStopped, checkpoint.DiskFull: as in `work`; or workers were lost `train.max_restarts` times in a row.
        Exception: what a worker has found.
    """
    import ray

    listener = Listener(group.relay, screen, folder.path, before, group.shape.max_restarts)
    try:
        while not group.wait(POLL):
            if listener.listen(stop()):
                news()
            _check_progress(time.monotonic() - listener.heard_at, group.shape)
        done, loss = group.result()
        listener.listen(stop())
        news()
    except ray.exceptions.RayActorError as error:
        raise WorkersLost("the process that held the workers died") from error
    finally:
        group.end()
    if done is None:
        raise WorkersLost(loss)
    mirror.pull(folder.path)
    return done


def _check_progress(silence_s: float, shape: Shape) -> None:
    import ray

    if silence_s > shape.timeout_s:
        raise TrainingStopped(
            f"no step in {silence_s:.0f} s; the cluster may lack a free CPU for cutting images, or a worker hangs "
            "(longer steps than that: raise train.progress_timeout_s)"
        )
    workers = shape.workers
    if silence_s > shape.wait_s and not fits(workers, shape.share, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
        raise TrainingStopped(
            f"a node is gone and {workers} workers have not fitted for {silence_s:.0f} s; add nodes and resume, "
            f"or give a range such as train.workers=1:{workers} to a new phase"
        )
