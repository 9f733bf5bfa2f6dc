"""A sweep's trials under Ray Tune: how many fit, which one is next, and how they are asked to stop."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Iterator
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.config import RunConfig
from pipeline.data.loader import start_ray
from pipeline.data.sources.base import open_source
from pipeline.machine import available_cores
from pipeline.metrics_log import read_points
from tuning import sampling
from tuning.space import parse_space
from tuning.sweep import ENDED, Sweep

LOCAL_SHARE = 0.25  # logical CPUs of a trial on one machine, whose cores its torch threads and the image tasks share by priority
SLOT = "trials"  # a resource of a local Ray
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no score
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours asks trials to end with whole checkpoints
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # its snapshots are not what a sweep goes on from
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def room(config: RunConfig, asked: int | None, gpus_asked: float | None, trials: int) -> dict[str, Any]:
    """Start or join Ray and settle how many trials run at the same time, so that one whole CPU stays free for cutting images.

    Returns:
        `concurrent`, `cluster`, and the resources of a trial, or of each of its workers, as `share`.

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
    return {"concurrent": concurrent, "cluster": cluster, "share": share}


def run_trials(sweep: Sweep, config: RunConfig, book: Any, stop: threading.Event) -> None:
    """Ray Tune over all trials that have not ended."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    import ray
    from ray import tune as ray_tune

    from tuning import schedulers
    from tuning.trainable import InProcess, by_group

    for name in ("ray.tune", "ray.train", "ray.air", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    facts = sweep.facts()
    knobs = parse_space([f"{key}={range_['text']}" for key, range_ in facts["space"].items()], config)
    total = facts["total_steps"]
    spare = ray.cluster_resources().get("CPU", 1) - facts["concurrent"] * facts["share"]["CPU"]
    common = {"sweep": str(sweep.path), "concurrent": facts["concurrent"], "from": []}
    common["tasks"] = None if facts["cluster"] else max(1, round(spare / facts["concurrent"]))

    scheduler: Any = None
    if facts["scheduler"] == "asha" and facts["rungs"]:
        scheduler = schedulers.Halving(facts["rungs"][0], total)
    elif facts["scheduler"] == "pbt":
        scheduler = schedulers.Population(facts["rungs"][0], knobs, facts["seed"] + len(list(sweep.path.glob("ray/*"))))
    waiting = []
    for of in sweep.trials():
        trial = of.facts()
        if trial["status"] not in ENDED:
            waiting.append(common | {key: trial[key] for key in ("number", "values", "seed")} | {"from": trial["from"] or []})
            if (of.path / "tracking.json").is_file():
                book.reopen(of)
        scores = [(p["step"], p["metrics"]["score"]) for p in read_points(of.path) if "score" in p["metrics"]]
        if isinstance(scheduler, schedulers.Halving) and scores:
            scheduler.replay(trial["number"], scores)

    optuna = schedulers.Optuna(knobs, facts["seed"], [t.facts() for t in sweep.trials()]) if facts["search"] == "optuna" else None
    check = checker_of(config) if optuna else None

    def more() -> Any:
        """Optuna's next trial; a setting that cannot work is written down and another one asked for."""
        number = len(sweep.trials())
        while optuna is not None and check is not None and not stop.is_set() and number < facts["trials"]:
            repeat = number % facts["seeds"]
            values = sweep.trial(number - 1).facts()["values"] if repeat else optuna.ask(number)
            seed, error = config.train.seed + repeat, sampling.refusal(check, values)
            of = sweep.add(number, values, seed, error)
            if error is None:
                return common | {"number": number, "values": values, "seed": seed}
            optuna.tell(number, {})
            book.screen.ended(of.facts())
            number += 1
        return None

    limited = facts["scheduler"] != "pbt"  # a population must all be there to be compared: resources limit it
    group = bool(facts["workers"])
    trainable: Any = ray_tune.with_resources(by_group, {"CPU": 0.01}) if group else ray_tune.with_resources(InProcess, facts["share"])
    restarts = 0 if group else config.train.max_restarts  # a group starts its workers again by itself
    storage = sweep.path / "ray"
    tuner = ray_tune.Tuner(
        trainable,
        tune_config=ray_tune.TuneConfig(
            scheduler=scheduler,
            search_alg=schedulers.Queue(waiting, more, optuna.tell if optuna else lambda number, result: None, stop.is_set),
            num_samples=max(1, len(waiting)) if optuna is None else facts["trials"],
            max_concurrent_trials=facts["concurrent"] if limited else None,
            reuse_actors=not group,
            trial_name_creator=lambda trial: f"trial-{trial.config['number']:03d}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']:03d}",
        ),
        run_config=ray_tune.RunConfig(
            name=f"life-{len(list(storage.glob('life-*'))):03d}",
            storage_path=str(storage),
            callbacks=[book],
            failure_config=ray_tune.FailureConfig(max_failures=restarts),
            verbose=0,
        ),
    )
    if not waiting and optuna is None:
        return
    with quiet():
        tuner.fit()


def checker_of(config: RunConfig) -> sampling.Check:
    dataset = open_source(config.data)
    training = dataset.num_training(config.data.held_out)
    return sampling.checker(config, training, None if training is None else len(dataset))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ray Tune's own words stay out of the user's screen."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def stopping(sweep: Sweep, stop: threading.Event) -> Iterator[None]:
    """Pass the wish to stop on to all trials, wherever they run."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if stop.wait(0.2):
                (sweep.path / ".stop").touch()
                return

    thread = threading.Thread(target=watch, name="stopping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
