"""One group of workers under Ray Train, as the driver holds it. Nothing here is slow to load."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import mirror
from pipeline.ingest.ray_data import joins_cluster, start_ray
from pipeline.runs import RunFolder
from pipeline.train import relay_actor

# logical CPUs of a worker: less than one without a GPU, because Ray Data hangs unless a whole one stays free somewhere
CPU_WORKER: dict[str, float] = {"CPU": 0.25}
GPU_WORKER: dict[str, float] = {"CPU": 1.0, "GPU": 1.0}
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a death is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class Shape:
    """How many workers, and the resources of each.

    With `again`, Ray Train starts so many of them again after a loss; without, the group ends, and the driver chooses anew.
    `timeout_s` ends a collective call that waits for a worker, `wait_s` the wait for room after a loss; after `max_restarts`
    of them from one checkpoint the run gives up.
    """

    workers: int
    share: dict[str, float]
    again: bool
    timeout_s: float
    wait_s: float
    max_restarts: int

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Shape | None:
        """That of a run's last group as its facts tell it (`kept`); None if they do not."""
        try:
            return cls(**facts["group"])
        except (KeyError, TypeError):  # none yet, a number that may change, or written by another version of this project
            return None


class Group:
    """Workers that start at once and wait for what they are given.

    Args:
        prepares: they wait for nothing; rank 0 prepares the run, which has a checkpoint, from its folder.

    Attributes:
        relay: the line to rank 0.
        outcome: what rank 0 returned, or the error with which the group ended; empty while it is `alive`.
    """

    def __init__(self, run: Path, shape: Shape, prepares: bool = False) -> None:
        self.run, self.shape, self.prepares = run, shape, prepares
        os.environ.update({key: value for key, value in SETTINGS.items() if key not in os.environ})
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        ray.cloudpickle.register_pickle_by_value(relay_actor)
        self.relay = ray.remote(relay_actor.Relay).options(num_cpus=0, scheduling_strategy=here).remote()
        self.outcome: list[Any] = []
        self._scratch = f".ray-{uuid.uuid4().hex[:8]}"
        self._thread = threading.Thread(target=self._fit, args=[self._trainer()], name="ray-train", daemon=True)
        self._thread.start()

    def _fit(self, trainer: Any) -> None:
        try:
            self.outcome.append(trainer.fit().return_value)
        except BaseException as error:
            self.outcome.append(error)

    def _trainer(self) -> Any:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        shape = self.shape
        spare = ray.cluster_resources().get("CPU", 1) - shape.workers * shape.share["CPU"]
        settings = {
            "relay": self.relay,
            "run": str(self.run),
            "remote": mirror.remote_of(self.run),
            "prepares": self.prepares,
            "tasks": None if joins_cluster() else max(1, round(spare / shape.workers)),
            "timeout_s": shape.timeout_s,
        }
        return _trainer_class()(
            relay_actor.enter,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=shape.workers, use_gpu="GPU" in shape.share, resources_per_worker=shape.share),
            run_config=RunConfig(
                name=self._scratch, storage_path=str(self.run), failure_config=FailureConfig(max_failures=-1 if shape.again else 0)
            ),
        )

    def give(self, parts: dict[str, Any]) -> None:
        """What the workers wait for: `prepared`, a list with one reference, and `evaluate`; see `worker.run`."""
        self.relay.give.remote(str(self.run), parts)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Until it has ended, or for so long."""
        self._thread.join(seconds)

    def end(self) -> None:
        """End it, whatever it does."""
        import ray

        if self.alive:
            ray.shutdown()  # the only way to end a worker group that Ray Train would start again
        else:
            ray.kill(self.relay)
        shutil.rmtree(self.run / self._scratch, ignore_errors=True)


def begin_again(folder: RunFolder, shape: Shape) -> Group | None:
    """A group for a run with a checkpoint, which it prepares itself; None if it does not fit now."""
    start_ray(extra_cpus=1)
    import ray

    if not fits(shape.workers, shape.share, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
        return None
    return Group(folder.path, shape, prepares=True)


def kept(shape: Shape) -> dict[str, Any]:
    """Of a group, what `Shape.of` reads again, for `run.json`; nothing of one whose number of workers may change."""
    return {"group": dataclasses.asdict(shape)} if shape.again else {}


def fits(workers: int, share: dict[str, float], nodes: list[dict[str, float]]) -> bool:
    """Whether the workers can be placed so that one whole logical CPU stays free on some node, for the tasks that cut images."""
    room = [min(int(node.get(key, 0) / amount + 1e-9) for key, amount in share.items()) for node in nodes]
    for spare, node in enumerate(nodes):  # the node that keeps a whole CPU free
        kept = int(max(0.0, node.get("CPU", 0) - 1) / share["CPU"] + 1e-9) if node.get("CPU", 0) >= 1 else -1
        if kept >= 0 and sum(room) - room[spare] + min(room[spare], kept) >= workers:
            return True
    return False


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


def _trainer_class() -> type[Any]:
    """Ray Train's general trainer, without helper processes that have nothing to do here, of some 4 CPU seconds each.

    Its trainer for torch would load torch in the controller before that can start a worker; the workers make their process
    group themselves (`worker.process_group`). Of the helpers, one serves `datasets=`, which is not used; one frees the workers'
    places when the controller has died, but a run of this project ends then, and Ray frees what an ended driver had; and one
    asks an autoscaler for the workers' places while the controller waits: a local Ray has none. Nothing public leaves them out:
    where Ray's inner names change, they are started as before.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # the outer one of this name is of the former Ray Train

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            spare = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
            return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in spare]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            if not joins_cluster():
                with contextlib.suppress(ImportError, KeyError):
                    parts |= {"scaling_policy": _unasking(parts["scaling_policy"])}
            return super()._initialize_and_run_controller(**parts)

    return Trainer


def _unasking(policy: Any) -> Any:
    """The same policy of how many workers there are, which asks no autoscaler."""
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class Unasking(FixedScalingPolicy):
        def _send_resource_request(self) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

        def _cancel_resource_request(self) -> None: ...

    return Unasking(policy.scaling_config)
