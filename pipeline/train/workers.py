"""Several workers under Ray Train: how many fit, how they are started, and what happens when one is lost.

Ray Train places the workers, forms their process group and notices their deaths. Checkpoints and positions are ours, the same
in one process and in many. After a loss Ray Train starts a fixed number of workers again; for a range, this driver starts as
many as fit. Either way each begins at the run's last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from methods.parts.errors import ConfigError
from pipeline import mirror
from pipeline.config import TrainConfig, divisors
from pipeline.ingest.ray_data import joins_cluster
from pipeline.runs import RunFolder
from pipeline.train import checkpoint, relay_actor
from pipeline.train.display import Screen
from pipeline.train.guards import TrainingStopped
from pipeline.train.prepare import Prepared
from pipeline.train.relay import Listener
from pipeline.train.work import Done

# logical CPUs of a worker: less than one without a GPU, because Ray Data hangs unless a whole one stays free somewhere
CPU_WORKER: dict[str, float] = {"CPU": 0.25}
GPU_WORKER: dict[str, float] = {"CPU": 1.0, "GPU": 1.0}
POLL = 0.2  # s
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a death is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class WorkersLost(RuntimeError):
    """Workers died, or their machines did; the run can go on from its last checkpoint."""


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
) -> Done:
    """Train on as many workers as are asked for and fit; go on after losses.

    Args:
        stop: asked a few times a second; True ends the run with a whole checkpoint.
        news: called when points may have been written.
        before: called with the step from which every attempt starts.
        evaluate: as in `work`.

    Raises:
        ConfigError: so many workers do not fit.
        TrainingStopped, checkpoint.DiskFull: as in `work`; or workers were lost `train.max_restarts` times in a row.
    """
    import ray

    config = ready.config.train
    given = {"stream": [ray.put(ready.stream)], "rest": [ray.put((ready.config, ready.resolved, ready.method, state))]}
    losses: list[int] = []
    while True:
        workers, share = place(config, ready.config.data.lanes, say=screen.say, doubtful=bool(losses))
        mirror.pull(folder.path)  # what the last workers saved
        try:
            return _attempt(ready, folder, given, workers, share, screen=screen, stop=stop, news=news, before=before, evaluate=evaluate)
        except WorkersLost as loss:
            losses.append(checkpoint.last_step(folder.checkpoints))
            if losses.count(losses[-1]) > config.max_restarts:
                raise TrainingStopped(f"{loss}, {len(losses)} times without a new checkpoint; look at their machines") from None
            screen.say(f"[yellow]warning:[/yellow] {loss}; starting again with as many workers as fit")


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


def answering(nodes: list[dict[str, Any]], patience_s: float = 10.0) -> list[dict[str, Any]]:
    """Those of the nodes that run a task, of no resources, within so many seconds."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def there(node: dict[str, Any]) -> Any:
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ray.remote(lambda: True).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned).remote()

    asked = {there(node): node for node in nodes}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=patience_s)
    found = []
    for reference in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(reference)
            found.append(asked[reference])
    return found


def fits(workers: int, share: dict[str, float], nodes: list[dict[str, float]]) -> bool:
    """Whether the workers can be placed so that one whole logical CPU stays free on some node, for the tasks that cut images."""
    room = [min(int(node.get(key, 0) / amount + 1e-9) for key, amount in share.items()) for node in nodes]
    for spare, node in enumerate(nodes):  # the node that keeps a whole CPU free
        kept = int(max(0.0, node.get("CPU", 0) - 1) / share["CPU"] + 1e-9) if node.get("CPU", 0) >= 1 else -1
        if kept >= 0 and sum(room) - room[spare] + min(room[spare], kept) >= workers:
            return True
    return False


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


# ---------------------------------------------------------------------------- one group of workers


def _attempt(
    ready: Prepared,
    folder: RunFolder,
    given: dict[str, Any],
    workers: int,
    share: dict[str, float],
    *,
    screen: Screen,
    stop: Callable[[], bool],
    news: Callable[[], None],
    before: Callable[[int], None],
    evaluate: bool,
) -> Done:
    """One Ray Train run. With a fixed number of workers it restarts the group after a loss; a range ends it, to choose anew."""
    os.environ.update({key: value for key, value in SETTINGS.items() if key not in os.environ})
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config = ready.config.train
    elastic = len(set(config.worker_range)) > 1
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ray.cloudpickle.register_pickle_by_value(relay_actor)
    relay = ray.remote(relay_actor.Relay).options(num_cpus=0, scheduling_strategy=here).remote()
    spare = ray.cluster_resources().get("CPU", 1) - workers * share["CPU"]
    tasks = None if joins_cluster() else max(1, round(spare / workers))
    settings = given | {
        "relay": relay,
        "run": str(folder.path),
        "remote": mirror.remote_of(folder.path),
        "tasks": tasks,
        "timeout_s": config.progress_timeout_s,
        "evaluate": evaluate,
    }
    scratch = f".ray-{uuid.uuid4().hex[:8]}"
    trainer = _trainer_class()(
        relay_actor.enter,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in share, resources_per_worker=share),
        run_config=RunConfig(name=scratch, storage_path=str(folder.path), failure_config=FailureConfig(max_failures=0 if elastic else -1)),
    )
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit().return_value)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    listener = Listener(relay, screen, folder.path, before, config.max_restarts)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL)
            if listener.listen(stop()):
                news()
            _check_progress(time.monotonic() - listener.heard_at, config, workers, share)
        listener.listen(stop())
        news()
    finally:
        if thread.is_alive():
            ray.shutdown()  # the only way to end a worker group that Ray Train would start again
        else:
            ray.kill(relay)
        shutil.rmtree(folder.path / scratch, ignore_errors=True)
    if isinstance(outcome[0], Done):
        mirror.pull(folder.path)
        return outcome[0]
    raise _meaning(outcome[0])


def _trainer_class() -> type[Any]:
    """Ray Train's general trainer, without two helper processes that have nothing to do here, of some 4 CPU seconds each.

    Its trainer for torch would load torch in the controller before that can start a worker; the workers make their process
    group themselves (`process_group`). Of the helpers, one serves `datasets=`, which is not used; the other frees the
    workers' places when the controller has died, but a run of this project ends then, and Ray frees what an ended driver had.
    Nothing public leaves them out: where Ray's inner names change, they are started as before.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # the outer one of this name is of the former Ray Train

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            spare = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
            return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in spare]

    return Trainer


def _check_progress(silence_s: float, config: TrainConfig, workers: int, share: dict[str, float]) -> None:
    import ray

    if silence_s > config.progress_timeout_s:
        raise TrainingStopped(
            f"no step in {silence_s:.0f} s; the cluster may lack a free CPU for cutting images, or a worker hangs "
            "(longer steps than that: raise train.progress_timeout_s)"
        )
    if silence_s > config.wait_s and not fits(workers, share, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
        raise TrainingStopped(
            f"a node is gone and {workers} workers have not fitted for {silence_s:.0f} s; add nodes and resume, "
            f"or give a range such as train.workers=1:{workers} to a new phase"
        )


def _meaning(error: BaseException) -> BaseException:
    """What a run that ended with an error means. The errors of our own code have reached the driver before."""
    from ray.train import TrainingFailedError

    if not isinstance(error, TrainingFailedError):
        return error
    failures = getattr(error, "worker_failures", None) or {}
    ranks = ", ".join(str(rank) for rank in sorted(failures))
    return WorkersLost(f"lost worker {ranks}" if ranks else f"Ray Train failed ({str(error).strip().splitlines()[-1]})")
