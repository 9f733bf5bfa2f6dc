"""Several workers under Ray Train: how many fit, how they are started, and what happens when one is lost.

Ray Train places the workers and notices their deaths; they make their process group themselves. Checkpoints and positions
are ours, the same in one process and in many. After a loss Ray Train starts a fixed number of workers again; for a range, this
driver starts as many as fit. Either way each begins at the run's last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from methods.parts.errors import ConfigError
from pipeline import mirror
from pipeline.config import TrainConfig, divisors
from pipeline.ingest.ray_data import joins_cluster
from pipeline.runs import RunFolder
from pipeline.train import checkpoint
from pipeline.train.attend import WorkersLost, attend
from pipeline.train.display import Screen
from pipeline.train.done import Done
from pipeline.train.group import CPU_WORKER, GPU_WORKER, Group, Shape, answering, fits, kept
from pipeline.train.guards import TrainingStopped
from pipeline.train.prepare import Prepared


def train_with_workers(
    ready: Prepared,
    folder: RunFolder,
    state: checkpoint.State | None,
    *,
    screen: Screen,
    stop: Callable[[], bool],
    news: Callable[[], None],
    before: Callable[[int], None],
    evaluate: bool = True,
    doubtful: bool = False,
) -> Done:
    """Train on as many workers as are asked for and fit; go on after losses.

    Args:
        stop, news, before: as in `attend`.
        evaluate: as in `work`.
        doubtful: workers were lost just now, and perhaps a node with them.

    Raises:
        ConfigError: so many workers do not fit.
        TrainingStopped, checkpoint.DiskFull: as in `work`; or workers were lost `train.max_restarts` times in a row.
    """
    import ray

    config = ready.config.train
    given = {"prepared": [ray.put((ready, state))], "evaluate": evaluate}
    losses: list[int] = []
    while True:
        mirror.pull(folder.path)  # what the last workers saved
        group = start(config, ready.config.data.lanes, folder, say=screen.say, doubtful=doubtful)
        group.give(given)
        try:
            return attend(group, folder, screen=screen, stop=stop, news=news, before=before)
        except WorkersLost as loss:
            doubtful = True
            losses.append(checkpoint.last_step(folder.checkpoints))
            if losses.count(losses[-1]) > config.max_restarts:
                raise TrainingStopped(f"{loss}, {len(losses)} times without a new checkpoint; look at their machines") from None
            screen.say(f"[yellow]warning:[/yellow] {loss}; starting again with as many workers as fit")


def start(config: TrainConfig, lanes: int, folder: RunFolder, *, say: Callable[[str], None], doubtful: bool = False) -> Group:
    """Start as many workers as fit; the arguments and errors are those of `place`."""
    workers, share = place(config, lanes, say=say, doubtful=doubtful)
    again = len(set(config.worker_range)) == 1
    shape = Shape(workers, share, again, timeout_s=config.progress_timeout_s, wait_s=config.wait_s, max_restarts=config.max_restarts)
    folder.update(**kept(shape))
    return Group(folder.path, shape)


# ---------------------------------------------------------------------------- placing


def place(config: TrainConfig, lanes: int, *, say: Callable[[str], None], doubtful: bool = False) -> tuple[int, dict[str, float]]:
    """How many workers, and the resources of each; waits for a growing cluster.

    Args:
        doubtful: ask every node whether it is there: Ray lists one that died for some time yet.

    Raises:
        ConfigError: not even the fewest fit, after `train.wait_s` on a cluster, at once on one machine.
    """
    import ray

    low, high = config.worker_range
    choices = [w for w in divisors(lanes) if low <= w <= high]
    share = GPU_WORKER if _has_gpus() else CPU_WORKER
    deadline = time.monotonic() + (config.wait_s if joins_cluster() else 0.0)
    waiting = False
    while True:
        listed = [node for node in ray.nodes() if node["Alive"]]
        nodes = [node["Resources"] for node in (answering(listed) if doubtful else listed)]
        fitting = [w for w in choices if fits(w, share, nodes)]
        if fitting:
            if waiting:
                _ask_for(0, share)
            return max(fitting), share
        if time.monotonic() >= deadline:
            break
        if not waiting:
            say(f"waiting up to {config.wait_s:.0f} s until the cluster has room for {choices[0]} workers with {_words(share)} each")
            _ask_for(choices[-1], share)
            waiting = True
        time.sleep(2.0)
    there = "; ".join(_words({k: n.get(k, 0) for k in ("CPU", "GPU") if n.get(k)}) or "none" for n in nodes)
    raise ConfigError(
        f"train.workers={config.workers}: {choices[0]} workers with {_words(share)} each, beside one whole free CPU for cutting images, "
        f"do not fit on the nodes there are ({there}); use fewer workers or add nodes"
    )


def _has_gpus() -> bool:
    """Whether the cluster has GPUs, or would have if it grew: an autoscaled pool may be empty now."""
    import ray
    from ray._private.state import state  # nothing public tells what a pool can grow to

    growing = state.get_max_resources_from_cluster_config() or {}
    return bool(ray.cluster_resources().get("GPU", 0) or growing.get("GPU", 0))


def _ask_for(workers: int, share: dict[str, float]) -> None:
    """Tell the cluster's autoscaler, if there is one, to make room; 0 = for nobody any more."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[*[share] * workers, {"CPU": 1}] if workers else [])


def _words(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {key}" for key, amount in resources.items())
