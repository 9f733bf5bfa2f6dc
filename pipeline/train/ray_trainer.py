"""Training on several workers with Ray Train's `TorchTrainer`, restarted after the loss of a worker.

Ray Train places the workers, starts their process group and detects their failures. Checkpoints are those of this project, as in one
process. Each attempt is one `fit`. After a failure the driver starts the next one from the last checkpoint, on as many workers as fit.
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

POLL_S = 0.25  # between two polls of the workers by the driver
PUSH_S = 10.0  # between two uploads of the metrics to an object store


class WorkersLost(RuntimeError):
    """An attempt failed for a reason that a restart may cure."""


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
    """Train on the largest number of workers of `train.workers` that fits; restart after failures and preemptions.

    Args:
        state: start of a run without a checkpoint; None = the weights of `context`.
        stop: called a few times a second; True ends the run with a checkpoint.
        on_message: called after metrics may have been written.
        on_attempt: called before each attempt with the step from which it starts.

    Raises:
        ConfigError: not even the smallest number of workers fits.
        TrainingAborted, checkpoint.DiskFull: as in `train`; or more than `train.max_restarts` attempts failed from one checkpoint.
    """
    import ray

    config = context.config.train
    settings = {"context": [ray.put((context, state))], "run": folder.shared.uri}
    failures: Counter[int] = Counter()  # failed attempts by the step from which they started
    leaving: set[str] = set()  # ids of preempted nodes
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
            mirror.pull(folder.path)  # files that rank 0 has written to an object store
        if not result.preempted:
            return result
        leaving |= set(result.preempted)
        reporter.info(f"a node is preempted; going on from step {result.step} on the nodes that remain")


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
    """Run one `fit` in a thread: in the main thread it would handle Ctrl-C and end without a checkpoint.

    Args:
        function: runs on every worker with `settings` and two more: the `channel` to the driver, and `tasks`, the number of Ray Data
            tasks that may run at the same time for all workers.
        timeout_s: limit of a collective call, and of the time without a message.

    Returns:
        The return value of rank 0.

    Raises:
        WorkersLost: a failure that a restart may cure.
        Exception: another failure; see `failure_of`.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    channel, scratch = open_channel(), f".ray-{uuid.uuid4().hex[:8]}"
    spare = ray.cluster_resources().get("CPU", 1) - workers * resources["CPU"]
    tasks = None if joins_cluster() else max(1, int(spare))  # no limit in a cluster, so that it scales up
    trainer = TorchTrainer(
        function,
        train_loop_config=settings | {"channel": channel, "tasks": tasks},
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if "GPU" in resources else "gloo", timeout_s=round(timeout_s)),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources),
        run_config=RunConfig(
            name=scratch,
            storage_path=str(folder.path),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # `train_with_workers` restarts
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
    last_message = pushed = time.monotonic()
    try:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            messages = ray.get(channel.collect.remote(stop()))
            deliver(messages, reporter, folder)
            if messages:
                last_message = time.monotonic()
                on_message()
            if time.monotonic() - pushed > PUSH_S:
                pushed = time.monotonic()
                _push_metrics(folder)
            _check_progress(time.monotonic() - last_message, timeout_s)
    finally:
        ray.kill(channel)  # makes workers that still run exit
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
    """Return the exception for a failed `fit`: `WorkersLost` if a restart may cure it, else the error that ends the run.

    These would fail again: errors of this project (too little device memory included), a missing package, and a device assertion
    without a lost worker.
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
    if not failures and ("ModuleNotFoundError" in line or "ImportError" in line):  # the worker could not unpickle its function
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
    """Train as one of the workers of a `TorchTrainer`.

    Args:
        settings: `context`, a list with a reference to the `RunContext` and the state to start from; `run`, the run's folder; `channel`
            and `tasks`, see `run_workers`.
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
        info = get_preemption_info()  # a barrier: every worker must call it
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
        The evaluation; None if `stop` ended it.
    """
    import ray

    resources = worker_resources(context.config.train)
    task = ray.remote(evaluate_checkpoint).options(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_retries=context.config.train.max_restarts
    )
    reference = task.remote(context, folder.shared.uri)
    while not ray.wait([reference], timeout=POLL_S)[0]:
        if stop():
            ray.cancel(reference, force=True)
            return None
    try:
        evaluation: Evaluation = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    mirror.pull(folder.path)
    return evaluation
