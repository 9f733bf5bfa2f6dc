"""A search from its ranges to its ranking: `tune` begins one, `resume` goes on with it. The sweep's folder is the truth."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from methods.parts.contract import find as find_method
from methods.parts.errors import ConfigError
from pipeline.build import with_absolute_paths
from pipeline.config import RunConfig
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.sources.base import open_source
from pipeline.export import registry
from pipeline.machine import available_cores
from pipeline.resolve import Resolved, resolve
from pipeline.run_folder import command, hold
from pipeline.tracking.client import default_uri
from pipeline.train.launch import interruptible
from tuning import sampling
from tuning.display import SweepDisplay, conclude, introduce
from tuning.results import Results
from tuning.space import Param, parse_space
from tuning.sweep import STOP, Sweep, create
from tuning.tuner import forward_stop, plan_resources, run_trials

SEARCHES, SCHEDULERS = ("random", "grid", "optuna"), ("asha", "none", "pbt")
ACCURACY = (
    "{what} on held-out training images, which no trial trains on; the test split is not read. With {n:,} images asked, differences below "
    "{error:.1f} points are within chance (one standard error near 50 %)"
)
RANKME = (
    "RankMe (arXiv:2210.02885): effective rank of the features of training images, divided by the most it can be. It needs no "
    "labels. A high rank is needed for good features and does not prove them, so noise can raise it; compare it within one method "
    "and one width of backbone only"
)
LOSS = (
    "--score loss: a loss is not comparable across temperatures, prototypes, queues or masks, because they change its scale: a search "
    "would pick the easiest task, not the best features; use knn, linear, or rankme without labels"
)
SCORES = ("knn", "linear", "rankme")


@dataclass(frozen=True)
class TuneArgs:
    """The options of `tune`."""

    space: tuple[str, ...] = ()
    trials: int | None = None  # settings to try; None = 12, of a grid all
    search: str = "random"
    scheduler: str = "asha"
    score: str = "knn"
    seeds: int = 1  # trials of each setting
    seed: int = 0  # of the values
    grace: int | None = None  # steps before ASHA cuts, or between PBT's exchanges; None = by rule
    points: int = 4  # of a grid on a range
    concurrent: int | None = None  # trials at the same time; None = by rule
    gpus: float | None = None  # of a trial's worker, a part of one allowed
    command: str = "manyviews tune"


def tune(config: RunConfig, args: TuneArgs, *, runs_dir: Path, name: str | None, console: Console) -> tuple[Sweep, int]:
    """Begin a search and run it. Returns its sweep and the exit code.

    Raises:
        ConfigError: anything that cannot work, before Ray is started where it can be known.
    """
    check_args(args)
    params = parse_space(args.space, config)
    config = with_absolute_paths(config)
    dataset = open_source(config.data)
    training = dataset.num_training(config.data.held_out)
    ids = None if training is None else len(dataset)
    check = sampling.checker(config, training, ids)
    sampling.check_corners(params, check)
    settings = known_settings(args, params)
    count = (len(settings) or args.trials or 12) * args.seeds
    schedule = plan_schedule(config, args, training, ids)
    if args.search == "optuna":
        from tuning.schedulers import optuna_search

        optuna_search(params, args.seed)  # refuses where it is not installed
        if args.scheduler == "pbt":
            raise ConfigError("--search optuna: pbt chooses new values itself; use --search random, or --scheduler asha")
    if args.scheduler == "pbt":
        if config.train.worker_range[1]:
            raise ConfigError(
                "--scheduler pbt: works in process only, where starting anew from another's state is quick; use train.workers=0"
            )
        if count < 2:
            raise ConfigError(f"--trials {count}: pbt needs a population; use 4 or more")
        sampling.check_fixed_shapes(params, config, training, ids)
    facts: dict[str, Any] = {
        "recipe": config.recipe,
        "method": find_method(config.method).name,
        "command": args.command,
        "score": args.score,
        "score_words": describe_score(args.score, config, count_labels(args.score, config, dataset)),
        "mode": "max",
        "space": {param.key: param.to_dict() for param in params},
        "search": args.search,
        "scheduler": args.scheduler,
        "trials": count,
        "seed": args.seed,
        "seeds": args.seeds,
        "workers": config.train.worker_range[1],
        "asked_concurrent": args.concurrent,
        "gpus": args.gpus,
        "cores": int(available_cores()),
        "track_uri": config.track.uri or default_uri(runs_dir),  # of sweep and trials, so that MLflow shows them nested
        "mlflow_run": None,
        **schedule,
    }
    sweep = create(runs_dir, name, config, facts | plan_resources(config, args.concurrent, args.gpus, count))
    for number, values in enumerate(v for v in settings for _ in range(args.seeds)):
        sweep.add(number, values, config.train.seed + number % args.seeds, sampling.refusal(check, values))
    return sweep, fit(sweep, console)


def resume(sweep: Sweep, console: Console) -> int:
    """Go on with a sweep: trials that have ended are kept, the others go on from their last checkpoints.

    Raises:
        ConfigError: it is finished, or another process is at work on it.
    """
    if sweep.facts["status"] == "finished":
        page = command("report", sweep.name, runs_dir=sweep.path.parent)
        raise ConfigError(f"sweep={sweep.name}: it is finished; `{page}` shows it, a new search needs another --name")
    return fit(sweep, console)


# ---------------------------------------------------------------------------- before Ray is started


def check_args(args: TuneArgs) -> None:
    """Refuse what no search can do.

    Raises:
        ConfigError: an option, or a pair of them, that cannot work.
    """
    if args.score not in SCORES:
        raise ConfigError(LOSS if "loss" in args.score else f"--score {args.score}: unknown; use {', '.join(SCORES)}")
    for option, value, known in (("search", args.search, SEARCHES), ("scheduler", args.scheduler, SCHEDULERS)):
        if value not in known:
            raise ConfigError(f"--{option} {value}: unknown; use {', '.join(known)}")
    for option in ("trials", "seeds", "grace", "concurrent"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value}: use 1 or more")
    if args.points < 2:
        raise ConfigError(f"--points {args.points}: use 2 or more values of each range")
    if args.gpus is not None and (args.gpus <= 0 or args.gpus > 1):
        raise ConfigError(
            f"--gpus {args.gpus:g}: a trial's worker uses one GPU or a part of it; use 0 < GPUS <= 1, more with train.workers"
        )
    if args.search == "grid" and args.trials is not None:
        raise ConfigError(f"--trials {args.trials}: a grid tries all its combinations; leave it out, or set --points")
    if args.scheduler == "pbt" and args.seeds > 1:
        raise ConfigError(f"--seeds {args.seeds}: pbt changes a trial's values in mid-run, so none is repeated; use 1")


def known_settings(args: TuneArgs, params: list[Param]) -> list[dict[str, Any]]:
    """Return the settings that are known beforehand; none with Optuna."""
    if args.search == "grid":
        return sampling.grid_values(params, args.points)
    return [sampling.random_values(params, args.seed, n) for n in range(args.trials or 12)] if args.search == "random" else []


def plan_schedule(config: RunConfig, args: TuneArgs, training: int | None, ids: int | None) -> dict[str, Any]:
    """Return the length of a trial, the steps between measurements, and the steps at which the scheduler decides.

    The first decision comes after the warm-up, early enough for two more.

    Raises:
        ConfigError: a grace period that is longer than a trial.
    """
    resolved = resolve(config, training, ids)
    total = resolved.facts.total_steps
    every = min(resolved.knn_every, total)
    wanted = args.grace or max(warmup_steps(config, resolved), total / 9)
    grace = every * math.ceil(wanted / every)
    if args.grace is not None and grace >= total and args.scheduler != "none":
        raise ConfigError(f"--grace {args.grace}: not below the {total} steps of a trial; use fewer, or --scheduler none")
    rungs: list[int] = []
    if args.scheduler == "asha":
        from tuning.schedulers import asha_rungs

        rungs = asha_rungs(grace, total)
    elif args.scheduler == "pbt":
        rungs = list(range(grace, total, grace))
        if not rungs:
            raise ConfigError(f"train.steps={total}: no exchange fits in; use --grace below it, or more steps")
    return {"total_steps": total, "measure_every": every, "rungs": rungs}


def warmup_steps(config: RunConfig, resolved: Resolved) -> float:
    """Return the steps after which scores may be compared: the learning rate is up, and what the method waits for is there.

    What would outlast the run does not count.
    """
    facts = resolved.facts
    parts = (resolved.zero_lr_steps + resolved.warmup_steps, *config.method.settled(facts).hints(facts).settling_steps, 0.0)
    return max(float(step) for step in parts if step < facts.total_steps)


def count_labels(score: str, config: RunConfig, dataset: ImageDataset) -> int:
    """Return how many held-out images have labels.

    Raises:
        ConfigError: the score needs labels, and there are none.
    """
    count = int((dataset.labels[dataset.held_out_ids(config.data.held_out)] >= 0).sum())
    if score != "rankme" and not count:
        raise ConfigError(f"--score {score}: {config.data.path} has no labels, or data.held_out=0; use --score rankme")
    return count


def describe_score(score: str, config: RunConfig, labelled: int) -> str:
    """Say what a score is, on which images, and where its limits are."""
    if score == "rankme":
        return RANKME
    asked = config.evaluate
    n = min(labelled, asked.knn_queries)
    what = f"kNN top-1 (k {asked.knn_k}, T {asked.knn_temperature:g})" if score == "knn" else "top-1 of a linear probe"
    return ACCURACY.format(what=what, n=n, error=50 / max(1, n) ** 0.5)


# ---------------------------------------------------------------------------- with Ray


def fit(sweep: Sweep, console: Console) -> int:
    """Run every trial that has not ended, then rank them and register the best. Returns the exit code."""
    from tuning.callback import close_orphans, outcome

    with hold(sweep.path, f"sweep={sweep.name}: another process is at work on it; stop that one first"):
        (sweep.path / STOP).unlink(missing_ok=True)
        close_orphans(sweep)
        facts, config = sweep.facts, sweep.config()
        resources = plan_resources(config, facts["asked_concurrent"], facts["gpus"], facts["trials"])
        sweep.update(status="running", ended=None, unsent=0, **resources)
        status, model = "failed", None
        try:
            introduce(sweep, console)
            with interruptible() as stop, forward_stop(sweep, stop), SweepDisplay(console, sweep):
                run_trials(sweep)
            status = outcome(sweep)
            if status == "finished" and config.track.register:
                model = register_best(sweep, config, console)
        except KeyboardInterrupt:
            status = "interrupted"
            close_orphans(sweep)
        finally:
            sweep.update(status=status, ended=time.time())
    sweep = Sweep.read(sweep.path)
    if status != "interrupted":
        shutil.rmtree(sweep.path / "ray", ignore_errors=True)
    conclude(console, sweep, model)
    if sweep.facts["unsent"]:
        console.print(f"{sweep.facts['unsent']} entries have not reached MLflow; they are kept in the trials' folders", highlight=False)
    if status == "interrupted":
        go_on = command("resume", sweep.name, runs_dir=sweep.path.parent)
        console.print(f"interrupted; go on with: {go_on}", highlight=False, soft_wrap=True)
    return 0 if status == "finished" else 1


def register_best(sweep: Sweep, config: RunConfig, console: Console) -> str | None:
    """Register the best trial's backbone under the alias `champion`; a registry that is down does not fail the sweep."""
    uri = sweep.facts["track_uri"]
    try:
        results = Results.read(sweep.path)
        best, values = results.best_trial, results.best.values
        _, spec = registry.read_export(best.run.model)
        tags = {key: str(value) for key, value in spec.facts.items() if value is not None}
        tracking = best.folder / "tracking.json"
        model = registry.register(
            best.run.model,
            name=config.track.model_name or config.recipe or find_method(config.method).name,
            uri=uri,
            run_id=json.loads(tracking.read_text()).get("run_id") if tracking.is_file() else None,
            tags=tags | {"sweep": sweep.name, "trial": best.folder.name} | {key: str(value) for key, value in values.items()},
            held_out_knn=spec.facts.get("knn_held_out"),
            experiment=config.track.experiment,
        )
        registry.set_alias(model, "champion", uri)
    except ConfigError as error:
        console.print(f"not registered: {error}", highlight=False, soft_wrap=True)
        return None
    best.run.update(model=model.uri, model_version=model.version)
    sweep.update(best=best.number, model=model.uri)
    return model.uri
