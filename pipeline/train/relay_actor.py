"""What of a run the processes between driver and workers need: the middle of the line, Ray Train's controller, and the way into a worker.

This code travels by value (`register_pickle_by_value`), so it needs no import of ours: the actor spares torch, and a node on which
the project cannot be imported can still say so.
"""

from __future__ import annotations

from typing import Any

KNOWN = "2.60."  # the Ray whose inner names `trainer_class` builds on
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a death is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Relay:
    """The actor in the middle: what rank 0 has said since it was last asked, and what the driver wants. It also holds the workers:
    they end with it."""

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

    def train(self, settings: dict[str, Any], group: dict[str, Any]) -> tuple[bytes | None, str]:
        """From the driver, in a thread of its own: start the workers and hold them until they have ended.

        Args:
            settings: for `enter`, but for `relay`.
            group: `workers`, the `share` of resources of each, whether they start `again` after a loss, and Ray Train's own
                folder as `storage` and `name`.

        Returns:
            What rank 0 returned, pickled, because what it needs is slow to load; or none, and the words of why the workers ended.
        """
        import os

        import ray

        os.environ.update({key: value for key, value in SETTINGS.items() if key not in os.environ})
        make = trainer_class()
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

        share = group["share"]
        trainer = make(
            enter,
            train_loop_config=settings | {"relay": ray.get_runtime_context().current_actor},
            scaling_config=ScalingConfig(num_workers=group["workers"], use_gpu="GPU" in share, resources_per_worker=share),
            run_config=RunConfig(
                name=group["name"], storage_path=group["storage"], failure_config=FailureConfig(max_failures=-1 if group["again"] else 0)
            ),
        )
        try:
            return trainer.fit().return_value, ""
        except TrainingFailedError as error:
            ranks = ", ".join(str(rank) for rank in sorted(getattr(error, "worker_failures", None) or {}))
            return None, f"lost worker {ranks}" if ranks else f"Ray Train failed ({str(error).strip().splitlines()[-1]})"


class Exchange:
    """In place of Ray Train's actor for collective calls, which loads all of Ray Train to pass a few values on."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[dict[int, Any], Any]] = {}

    async def broadcast_from_rank_zero(self, *, world_rank: int, world_size: int, data: Any, collective_seq: int, **others: Any) -> Any:
        """From a worker: what rank 0 gave, once all have come."""
        import asyncio

        given, all_there = self.calls.setdefault(collective_seq, ({}, asyncio.Event()))
        given[world_rank] = data
        if len(given) == world_size:
            all_there.set()
        await all_there.wait()
        return given[0]


class Exchanges:
    """Starts one for each group of workers, the first one ahead. For Ray Train it stands where its actor's class is."""

    def __init__(self) -> None:
        self.ahead = [self._start()]

    def options(self, **where: Any) -> Exchanges:
        """As of an actor's class; each is on this node anyway."""
        return self

    def remote(self, **settings: Any) -> Any:
        """As of an actor's class."""
        return self.ahead.pop() if self.ahead else self._start()

    def _start(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return ray.remote(num_cpus=0, scheduling_strategy=here)(Exchange).remote()


def trainer_class() -> type[Any]:
    """Ray Train's general trainer, with its controller in this process and without helper processes that have nothing to do here.

    Each is some 4 CPU seconds, and the workers would wait for them. Its trainer for torch would also load torch before it can start a
    worker; the workers make their process group themselves (`worker.process_group`). Of the helpers, one serves `datasets=`,
    which is not used; one frees the workers' places when the controller has died, but they end with this process, and Ray
    frees what it had; and one asks an autoscaler for the workers' places while the controller waits: that they fit is known, and
    if they must start again, Ray itself tells an autoscaler of places that are wanted. Workers get no environment of their
    own, so that Ray can use processes that it has started already. Nothing public leaves these out: with another Ray than
    the known one they are as Ray Train has them.
    """
    import asyncio

    import ray

    known = ray.__version__.startswith(KNOWN)
    exchanges = Exchanges() if known else None  # one starts while Ray Train loads
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # the outer one of this name is of the former Ray Train

    if not known:
        return DataParallelTrainer
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2._internal.execution.worker_group import WorkerGroup, worker_group

    class Unasking(FixedScalingPolicy):
        def _send_resource_request(self) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

        def _cancel_resource_request(self) -> None: ...

    worker_group.SynchronizationActor = exchanges

    class Workers(WorkerGroup):
        @staticmethod
        def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
            return custom_runtime_env

    class Controller(TrainController):
        worker_group_cls = Workers

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            spare = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
            return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in spare]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            controller = Controller(**parts | {"scaling_policy": Unasking(parts["scaling_policy"].scaling_config)})
            asyncio.run(controller.run())
            return controller.get_result()

    return Trainer


def come_forward() -> None:
    """As far forward on the cores as the raylet is, where that is allowed.

    A cluster's Ray starts all workers at niceness 15, trainers and tasks alike, and a trainer that waits for its turn keeps all others
    waiting; tasks step back only once they run.
    """
    import contextlib
    import os

    with contextlib.suppress(OSError):  # not Linux, or not allowed
        wanted = os.getpriority(os.PRIO_PROCESS, os.getppid())
        for thread in os.listdir("/proc/self/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), wanted)


def enter(settings: dict[str, Any]) -> bytes:
    """What Ray Train runs in every worker: the worker of this project, or word of why it cannot be imported there.

    Ray Train would start a worker that fails at once again and again.

    Returns:
        What the worker returned, pickled.
    """
    import gc
    import socket

    import ray

    def absent(error: Exception) -> None:
        word = {"node": socket.gethostname(), "reason": f"{type(error).__name__}: {error}"}
        ray.get(settings["relay"].send.remote([("absent", word)]))

    come_forward()
    gc.disable()  # a module that is loaded makes objects and no garbage: looking for it is a tenth of the time
    try:
        from pipeline.train.worker import run
    except Exception as error:  # a missing library of the system is no ImportError
        absent(error)
        raise
    gc.enable()
    try:
        return ray.cloudpickle.dumps(run(settings))  # type: ignore[no-any-return]
    except ImportError as error:  # of what it loads later
        absent(error)
        raise
