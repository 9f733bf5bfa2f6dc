"""One group of workers under Ray Train, as the driver holds it. Nothing here is slow to load."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import mirror
from pipeline.ingest.ray_data import joins_cluster, start_ray
from pipeline.runs import RunFolder
from pipeline.train import relay_actor
from pipeline.train.done import Done

# logical CPUs of a worker: less than one without a GPU, because Ray Data hangs unless a whole one stays free somewhere
CPU_WORKER: dict[str, float] = {"CPU": 0.25}
GPU_WORKER: dict[str, float] = {"CPU": 1.0, "GPU": 1.0}


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
    """Workers that start at once and wait for what they are given. They end with the process that holds them, the `relay`.

    Args:
        prepares: they wait for nothing; rank 0 prepares the run, which has a checkpoint, from its folder.

    Attributes:
        relay: the line to rank 0.
    """

    def __init__(self, run: Path, shape: Shape, prepares: bool = False) -> None:
        self.run, self.shape, self.prepares = run, shape, prepares
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        ray.cloudpickle.register_pickle_by_value(relay_actor)
        relay = ray.remote(num_cpus=0, concurrency_groups={"train": 1}, scheduling_strategy=here)(relay_actor.Relay)
        self.relay = relay.remote()
        self._scratch = f".ray-{uuid.uuid4().hex[:8]}"
        place = {"workers": shape.workers, "share": shape.share, "again": shape.again, "storage": str(run), "name": self._scratch}
        self._end = self.relay.train.options(concurrency_group="train").remote(self._settings(), place)

    def _settings(self) -> dict[str, Any]:
        import ray

        shape = self.shape
        spare = ray.cluster_resources().get("CPU", 1) - shape.workers * shape.share["CPU"]
        return {
            "run": str(self.run),
            "remote": mirror.remote_of(self.run),
            "prepares": self.prepares,
            "tasks": None if joins_cluster() else max(1, round(spare / shape.workers)),
            "timeout_s": shape.timeout_s,
        }

    def give(self, parts: dict[str, Any]) -> None:
        """What the workers wait for: `prepared`, a list with one reference, and `evaluate`; see `worker.run`."""
        self.relay.give.remote(str(self.run), parts)

    @property
    def alive(self) -> bool:
        return not self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Until the group has ended, or for so long; whether it has."""
        import ray

        return bool(ray.wait([self._end], timeout=seconds)[0])

    def result(self) -> tuple[Done | None, str]:
        """What rank 0 returned, or none and the words of why the group ended; waits for it.

        Raises:
            ray.exceptions.RayActorError: the process that held the workers died, and they with it.
        """
        import ray

        done, loss = ray.get(self._end)
        return done and pickle.loads(done), loss

    def end(self) -> None:
        """End it, whatever it does."""
        import ray

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
