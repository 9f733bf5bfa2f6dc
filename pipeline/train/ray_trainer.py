"""Training on several workers: attempts of Ray Train's `TorchTrainer`, and what follows the loss of a worker.

Ray Train places the workers, joins them in a process group and notices their deaths. Checkpoints and positions are ours, the same
in one process and in many. Each attempt is one `fit`; after a loss the driver begins the next one at the run's last checkpoint,
on as many workers as fit then.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from methods.parts.errors import ConfigError
from pipeline import checkpoint
from pipeline.build import RunContext
from pipeline.data.ray_data import joins_cluster, raise_priority
from pipeline.run_folder import RunFolder
from pipeline.storage import mirror
from pipeline.train.health import TrainingAborted
from pipeline.train.placement import Resources, place_workers, worker_resources
from pipeline.train.progress import ProgressReporter
from pipeline.train.reporting import RemoteReporter, broadcast_through, deliver, open_channel
from pipeline.train.work import Evaluation, TrainResult, evaluate_checkpoint, train

POLL_S = 0.25  # between two looks of the driver at its workers
PUSH_S = 10.0  # between two copies of the metrics to an object store


class WorkersLost(RuntimeError):
    """An attempt ended by a failure that starting again may cure."""


def train_with_workers(
    context: RunContext,
    folder: RunFolder,
    state: checkpoint.State | None,
    *,
    reporter: ProgressReporter,
    stop: Callable[[], bool],
    on_message: Callable[[], None],
    on_attempt: Callable[[int], None],
) -> TrainResult:
    """Train on as many workers as are asked for and fit; go on after losses and preemptions.

    Args:
        state: what to start from where the run has no checkpoint; None = the weights of `context`.
        stop: asked a few times a second; True ends the run with a whole checkpoint.
        on_message: called when points may have been written.
        on_attempt: called with the step from which an attempt starts, before it does.

    Raises:
        ConfigError: so many workers do not fit.
        TrainingAborted, checkpoint.DiskFull: as in `train`; or `train.max_restarts` attempts failed from one checkpoint.
    """
    import ray

    config = context.config.train
    settings = {"context": [ray.put((context, state))], "run": folder.shared.uri}
    failures: Counter[int] = Counter()  # of attempts, by the step from which they began
    leaving: set[str] = set()  # ids of nodes that are being taken away
    while True:
        start = checkpoint.last_step(folder.checkpoints)
        on_attempt(start)
        if start >= context.resolved.facts.total_steps:  # only the evaluation is left
            return TrainResult(start, complete=True)
        placed = place_workers(config, context.config.data.num_shards, info=reporter.info, stop=stop, probe=bool(failures), without=leaving)
        if placed is None:
            return TrainResult(start, complete=False)
        workers, resources = placed
        try:
            result: TrainResult = run_workers(
                worker_main,
                settings,
                folder,
                workers,
                resources,
                reporter=reporter,
                timeout_s=config.progress_timeout_s,
                stop=stop,
                on_message=on_message,
            )
        except WorkersLost as loss:
            if stop():
                return TrainResult(checkpoint.last_step(folder.checkpoints), complete=False)
            failures[start] += 1
            if failures[start] > config.max_restarts:
                raise TrainingAborted(f"{loss}, {failures[start]} times without a checkpoint after step {start}") from loss
            reporter.info(f"[yellow]warning:[/yellow] {loss}; going on from the last checkpoint")
            continue
        finally:
            _push_metrics(folder)
            mirror.pull(folder.path)  # what rank 0 has written to an object store
        if not result.preempted:
            return result
        leaving |= set(result.preempted)
        reporter.info(f"a node is being taken away; going on from step {result.step} on the nodes that remain")


def run_workers(
    function: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    folder: RunFolder,
    workers: int,
    resources: Resources,
    *,
    reporter: ProgressReporter,
    timeout_s: float,
    stop: Callable[[], bool] = lambda: False,
    on_message: Callable[[], None] = lambda: None,
) -> Any:
    """One `fit`, in a thread, because in the main thread it would take Ctrl-C for itself and end without a checkpoint.

    Args:
        function: what every worker runs with `settings`, to which this adds the `channel` to the driver and how many `tasks` may cut
            images at the same time for all workers.
        timeout_s: of a collective call, and of the wait for a message.

    Returns:
        What rank 0 returned.

    Raises:
        WorkersLost: a failure that starting again may cure.
        Exception: another one; see `failure_of`.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    channel, scratch = open_channel(), f".ray-{uuid.uuid4().hex[:8]}"
    spare = ray.cluster_resources().get("CPU", 1) - workers * resources["CPU"]
    tasks = None if joins_cluster() else max(1, int(spare))  # in a cluster as many as it has room for, so that its pool grows
    trainer = TorchTrainer(
        function,
        train_loop_config=settings | {"channel": channel, "tasks": tasks},
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if "GPU" in resources else "gloo", timeout_s=round(timeout_s)),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources),
        run_config=RunConfig(
            name=scratch,
            storage_path=str(folder.path),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # attempts are ours
        ),
    )
    results: list[Any] = []
    errors: list[Exception] = []

    def fit() -> None:
        try:
            results.append(trainer.fit().return_value)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    heard = pushed = time.monotonic()
    try:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            messages = ray.get(channel.collect.remote(stop()))
            deliver(messages, reporter, folder)
            if messages:
                heard = time.monotonic()
                on_message()
            if time.monotonic() - pushed > PUSH_S:
                pushed = time.monotonic()
                _push_metrics(folder)
            _check_progress(time.monotonic() - heard, timeout_s)
    finally:
        ray.kill(channel)  # workers that still run see it and exit
        thread.join(30)
        shutil.rmtree(folder.path / scratch, ignore_errors=True)
    if errors:
        raise failure_of(errors[0]) from errors[0]
    return results[0]


def _push_metrics(folder: RunFolder) -> None:
    with contextlib.suppress(ConfigError):  # a store that does not answer stops the run at its next checkpoint
        if folder.metrics.exists():
            mirror.push(folder.path, only=folder.metrics.name)


def _check_progress(silence_s: float, limit_s: float) -> None:
    if silence_s > limit_s:
        raise TrainingAborted(
            f"no step in {silence_s:.0f} s; the cluster may lack a free CPU for cutting images, or a worker hangs "
            "(longer steps than that: raise train.progress_timeout_s)"
        )


def failure_of(error: Exception) -> Exception:
    """What the failure of a `fit` means for the run: the error that ends it, or `WorkersLost`.

    An error of this project, memory that is used up, a package that a node lacks, and a device assertion that no peer's death explains
    would come again.
    """
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    died = [rank for rank, failure in failures.items() if type(failure).__module__.startswith("ray.")]
    for failure in failures.values():
        if isinstance(failure, (ConfigError, TrainingAborted, checkpoint.DiskFull)):
            return failure
        if isinstance(failure, ImportError):
            return _not_importable(f"{type(failure).__name__}: {failure}")
        if "device-side assert" in str(failure) and not died:
            return TrainingAborted(f"an assertion failed on the device: {_last_line(failure)}")
    line = _last_line(error)
    if not failures and ("ModuleNotFoundError" in line or "ImportError" in line):  # the worker could not even unpickle its function
        return _not_importable(line)
    if died:
        return WorkersLost(f"lost worker {', '.join(map(str, sorted(died)))}")
    if failures:
        rank, failure = min(failures.items())
        return WorkersLost(f"worker {rank} failed ({type(failure).__name__}: {_last_line(failure)})")
    return WorkersLost(f"Ray Train failed ({line})")


def _not_importable(reason: str) -> TrainingAborted:
    return TrainingAborted(
        f"a worker cannot import this project ({reason}); install the packages of the driver's environment there "
        "(`manyviews doctor` compares them)"
    )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1][:300]


# ---------------------------------------------------------------------------- in a worker


def worker_main(settings: dict[str, Any]) -> TrainResult:
    """Train as one of the workers; what `TorchTrainer` runs in each.

    Args:
        settings: `context`, a list with the reference to the `RunContext` and the state to start from; the folder `run`; the
            `channel` to the driver; and how many `tasks` cut images at the same time for all workers.
    """
    import ray
    from ray.train import get_context, get_preemption_info
    from ray.train.torch import get_device

    raise_priority()
    train_context = get_context()
    context, state = ray.get(settings["context"][0])
    config, folder = context.config.train, RunFolder(settings["run"])
    preempted: list[str] = []
    reporter = RemoteReporter(
        settings["channel"],
        folder,
        rank=train_context.get_world_rank(),
        batch=context.resolved.facts.global_batch_size,
        start_step=checkpoint.last_step(folder.checkpoints),
    )

    def stop() -> bool:
        info = get_preemption_info()  # a barrier: every worker must ask, whatever else it knows
        if info is not None and not preempted:
            preempted.extend(info.preempted_node_ids)
        return bool(preempted) or reporter.stopping.is_set()

    try:
        result = train(
            context,
            folder,
            state,
            reporter=reporter,
            report=reporter.report,
            stop=stop,
            ask_every=config.log_every,
            device=get_device(),
            local_workers=train_context.get_local_world_size(),
            tasks=settings["tasks"],
            broadcast=broadcast_through(settings["channel"], train_context.get_world_rank()),
        )
    finally:
        reporter.close()
    if result.complete or reporter.stopping.is_set():
        return result
    return TrainResult(result.step, complete=False, preempted=tuple(preempted))


# ---------------------------------------------------------------------------- after training


def evaluate_in_task(context: RunContext, folder: RunFolder, *, stop: Callable[[], bool]) -> Evaluation | None:
    """Evaluate and export a complete run in one Ray task with the resources of one worker, so that the other GPUs are free.

    Returns:
        What it found; None if `stop` ended it.
    """
    import ray

    resources = worker_resources(context.config.train)
    task = ray.remote(evaluate_checkpoint).options(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_retries=context.config.train.max_restarts
    )
    found = task.remote(context, folder.shared.uri)
    while not ray.wait([found], timeout=POLL_S)[0]:
        if stop():
            ray.cancel(found, force=True)
            return None
    try:
        evaluation: Evaluation = ray.get(found)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    mirror.pull(folder.path)
    return evaluation
