"""A sweep's trials under Ray Tune: how many fit at the same time, and the `Tuner` that runs them or goes on with them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import threading
from collections.abc import Iterator
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.config import RunConfig
from pipeline.data.ray_data import start_ray
from pipeline.machine import available_cores
from tuning.space import parse_space
from tuning.sweep import STOP, Sweep

LOCAL_SHARE = 0.25  # logical CPUs of a trial on one machine, whose cores its torch threads and the image tasks share by priority
SLOT = "trials"  # a resource of a local Ray
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no score
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours asks trials to end with whole checkpoints first
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a killed search loses no more of its own state than that
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def plan_resources(config: RunConfig, asked: int | None, gpus_asked: float | None, trials: int) -> dict[str, Any]:
    """Start or join Ray, and choose how many trials run at the same time, so that one whole CPU stays free for cutting images.

    Returns:
        `concurrent`, `cluster`, the resources of a trial, or of each of its workers, as `share`, and `tasks`: how many tasks may cut images
        for a trial at the same time; None = as many as the cluster has room for.

    Raises:
        ConfigError: so many do not fit.
    """
    import ray

    from pipeline.data.ray_data import joins_cluster
    from pipeline.train.placement import CPU_WORKER, GPU_WORKER, fits

    workers, cores = config.train.worker_range[0], int(available_cores())
    cluster = joins_cluster()
    concurrent = asked or (1 if workers else max(1, cores // 4))
    start_ray(extra_cpus=math.ceil(LOCAL_SHARE * max(1, workers) * concurrent), resources={SLOT: concurrent})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = any(node.get("GPU", 0) for node in nodes)
    if gpus_asked and not gpus:
        raise ConfigError(f"--gpus {gpus_asked:g}: there is no GPU here; leave it out")
    share = dict(GPU_WORKER if gpus else CPU_WORKER) if workers else {"CPU": 1.0 if cluster or gpus else LOCAL_SHARE}
    if gpus and not workers:
        share["GPU"] = gpus_asked or 1.0
    elif workers and gpus_asked:
        raise ConfigError(f"--gpus {gpus_asked:g}: each worker of train.workers={config.train.workers} takes a whole GPU; leave it out")
    group = max(1, workers)
    if not asked and (cluster or gpus):
        concurrent = max((n for n in range(1, trials + 1) if fits(n * group, share, nodes)), default=1)
    if not fits(concurrent * group, share, nodes):
        there = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        each = ", ".join(f"{amount:g} {key}" for key, amount in share.items())
        raise ConfigError(
            f"--concurrent {concurrent}: {concurrent * group} workers with {each} each, beside one whole free CPU for cutting images, "
            f"do not fit on the nodes there are ({there}); use fewer, or --gpus below 1"
        )
    if not workers and ray.cluster_resources().get(SLOT, 0) >= concurrent:  # limits a population, all of whose trials are there at once
        share[SLOT] = 1
    spare = ray.cluster_resources().get("CPU", 1) - concurrent * share["CPU"]
    return {"concurrent": concurrent, "cluster": cluster, "share": share, "tasks": None if cluster else max(1, round(spare / concurrent))}


def run_trials(sweep: Sweep) -> None:
    """Run every trial that has not ended.

    Ray Tune goes on from its own snapshot. Where there is none, or the sweep lies elsewhere or has other resources than those in the
    snapshot, it begins anew with the trials that have not ended, which go on from their own checkpoints.
    """
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    from ray.tune import Tuner

    for name in ("ray.tune", "ray.train", "ray.air", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    state = sweep.path / "ray"
    placement = {"folder": str(sweep.path), **{key: sweep.facts[key] for key in ("concurrent", "cluster", "share", "tasks")}}
    if sweep.facts.get("tuner") == placement and Tuner.can_restore(state) and any(state.glob("experiment_state-*.json")):
        tuner = Tuner.restore(str(state), trainable=trainable_of(sweep), resume_unfinished=True)
    else:
        shutil.rmtree(state, ignore_errors=True)
        waiting = [trial for trial in sweep.trials() if not trial.has_ended]
        if not waiting and sweep.facts["search"] != "optuna":
            return
        tuner = new_tuner(sweep)
        sweep.update(tuner=placement)
    with quiet():
        tuner.fit()


def trainable_of(sweep: Sweep) -> Any:
    """Return what Ray Tune starts for a trial, with its resources: a process for many trials, or a function with a group of workers."""
    from ray import tune

    from tuning.trainable import TrialProcess, train_group

    if sweep.facts["workers"]:
        return tune.with_resources(train_group, {"CPU": 0.01})
    return tune.with_resources(TrialProcess, sweep.facts["share"])


def new_tuner(sweep: Sweep) -> Any:
    """Return a `Tuner` of the trials that have not ended."""
    from ray import tune

    from tuning.callback import SweepCallback
    from tuning.schedulers import OptunaTrials, make_scheduler, task_of

    facts, config = sweep.facts, sweep.config()
    params = parse_space([f"{param.key}={param.text}" for param in sweep.params], config)
    optuna, group = facts["search"] == "optuna", bool(facts["workers"])
    common = {"sweep": str(sweep.path), "concurrent": facts["concurrent"], "tasks": facts["tasks"]}
    waiting = [task_of(trial) for trial in sweep.trials() if not trial.has_ended]
    scheduler = make_scheduler(sweep, params)
    return tune.Tuner(
        trainable_of(sweep),
        param_space=common if optuna else common | {"trial": tune.grid_search(waiting)},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            search_alg=OptunaTrials(sweep, params) if optuna else None,
            num_samples=facts["trials"] if optuna else 1,
            # a population must all be there to be compared: only its resources limit how many run
            max_concurrent_trials=None if facts["scheduler"] == "pbt" else facts["concurrent"],
            reuse_actors=not group,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(sweep.path),
            callbacks=[SweepCallback(sweep.path, scheduler if facts["scheduler"] == "asha" else None)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            # a group starts its workers again by itself
            failure_config=tune.FailureConfig(max_failures=0 if group else config.train.max_restarts),
            verbose=0,
        ),
    )


def trial_name(trial: Any) -> str:
    """Return the name by which Ray Tune knows a trial: that of its folder."""
    name: str = trial.config["trial"]["name"]
    return name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Ray Tune's messages off the user's screen."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def forward_stop(sweep: Sweep, stop: threading.Event) -> Iterator[None]:
    """Tell all trials, wherever they run, when `stop` is set."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if stop.wait(0.2):
                (sweep.path / STOP).touch()
                return

    thread = threading.Thread(target=watch, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
