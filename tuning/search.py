"""From ranges to a ranked sweep: `tune` begins one, `resume` goes on with it. Ray Tune runs the trials; the folder is the truth."""

from __future__ import annotations

import math
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
from pipeline.machine import available_cores
from pipeline.resolve import resolve
from pipeline.run_folder import command, hold
from pipeline.tracking.run_tracker import Tracker
from pipeline.train.launch import interruptible
from tuning import sampling
from tuning.finalize import champion, conclude, introduce
from tuning.space import Knob, parse_space
from tuning.sweep import ENDED, LOSS_WORDS, SCORE_WORDS, Sweep, create, score_words, track_uri
from tuning.tuner import room, run_trials, stopping

SEARCHES, SCHEDULERS = ("random", "grid", "optuna"), ("asha", "none", "pbt")


@dataclass(frozen=True)
class Asked:
    """What the command line says of a search."""

    space: tuple[str, ...] = ()
    trials: int | None = None  # settings to try; None = 12, of a grid all
    search: str = "random"
    scheduler: str = "asha"
    score: str = "knn"
    seeds: int = 1  # trials of each setting
    seed: int = 0  # of the draws
    grace: int | None = None  # steps before ASHA cuts, or between PBT's exchanges; None = by rule
    points: int = 4  # of a grid on a range
    concurrent: int | None = None  # trials at the same time; None = by rule
    gpus: float | None = None  # of a trial's worker, a part of one allowed
    command: str = "manyviews tune"


def tune(config: RunConfig, asked: Asked, *, runs_dir: Path, name: str | None, console: Console) -> tuple[Sweep, int]:
    """A new sweep. Returns its folder and the exit code.

    Raises:
        ConfigError: anything that cannot work, before Ray is started where it can be known.
    """
    check_words(asked)
    knobs = parse_space(asked.space, config)
    config = with_absolute_paths(config)
    dataset = open_source(config.data)
    training = dataset.num_training(config.data.held_out)
    ids = None if training is None else len(dataset)
    check = sampling.checker(config, training, ids)
    sampling.check_corners(knobs, check)
    settings = drawn(asked, knobs)
    count = (len(settings) or asked.trials or 12) * asked.seeds
    plan = planned(config, asked, training, ids)
    if asked.search == "optuna":
        from tuning.schedulers import Optuna

        Optuna(knobs, asked.seed, [])  # refuses where it is not installed
    if asked.scheduler == "pbt":
        if config.train.worker_range[1]:
            raise ConfigError(
                "--scheduler pbt: works in process only, where starting anew from another's state is quick; use train.workers=0"
            )
        if count < 2:
            raise ConfigError(f"--trials {count}: pbt needs a population; use 4 or more")
        sampling.fixed_shapes(knobs, config, training, ids)
    facts: dict[str, Any] = {
        "recipe": config.recipe,
        "method": find_method(config.method).name,
        "command": asked.command,
        "score": asked.score,
        "score_words": score_words(asked.score, config, asked_images(asked.score, config, dataset)),
        "mode": "max",
        "space": {knob.key: knob.to_dict() for knob in knobs},
        "search": asked.search,
        "scheduler": asked.scheduler,
        "trials": count,
        "seed": asked.seed,
        "seeds": asked.seeds,
        "workers": config.train.worker_range[1],
        "asked_concurrent": asked.concurrent,
        "gpus": asked.gpus,
        "cores": int(available_cores()),
        "track_uri": track_uri(config, runs_dir),
        "mlflow_run": None,
        **plan,
    }
    sweep = create(runs_dir, name, config, facts | room(config, asked.concurrent, asked.gpus, count))
    for number, values in enumerate(v for v in settings for _ in range(asked.seeds)):
        sweep.add(number, values, config.train.seed + number % asked.seeds, sampling.refusal(check, values))
    return sweep, fit(sweep, console)


def resume(sweep: Sweep, console: Console) -> int:
    """Go on with a sweep: ended trials are kept, half-done ones go on from their last checkpoints.

    Raises:
        ConfigError: it is finished, or another process is at work on it.
    """
    if sweep.facts()["status"] == "finished":
        page = command("report", sweep.name, runs_dir=sweep.path.parent)
        raise ConfigError(f"sweep={sweep.name}: it is finished; `{page}` shows it, a new search needs another --name")
    return fit(sweep, console)


# ---------------------------------------------------------------------------- before Ray is started


def check_words(asked: Asked) -> None:
    """Refuse what no search can do."""
    if asked.score not in SCORE_WORDS:
        if "loss" in asked.score:
            raise ConfigError(LOSS_WORDS)
        raise ConfigError(f"--score {asked.score}: unknown; use {', '.join(SCORE_WORDS)}")
    for option, value, known in (("search", asked.search, SEARCHES), ("scheduler", asked.scheduler, SCHEDULERS)):
        if value not in known:
            raise ConfigError(f"--{option} {value}: unknown; use {', '.join(known)}")
    for option in ("trials", "seeds", "grace", "concurrent"):
        value = getattr(asked, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value}: use 1 or more")
    if asked.points < 2:
        raise ConfigError(f"--points {asked.points}: use 2 or more values of each range")
    if asked.gpus is not None and (asked.gpus <= 0 or asked.gpus > 1):
        raise ConfigError(
            f"--gpus {asked.gpus:g}: a trial's worker uses one GPU or a part of it; use 0 < GPUS <= 1, more with train.workers"
        )
    if asked.search == "grid" and asked.trials is not None:
        raise ConfigError(f"--trials {asked.trials}: a grid tries all its combinations; leave it out, or set --points")
    if asked.scheduler == "pbt" and asked.seeds > 1:
        raise ConfigError(f"--seeds {asked.seeds}: pbt changes a trial's values in mid-run, so none is repeated; use 1")


def drawn(asked: Asked, knobs: list[Knob]) -> list[dict[str, Any]]:
    """The settings that are known beforehand; none with Optuna."""
    if asked.search == "grid":
        return sampling.grid_values(knobs, asked.points)
    return [sampling.random_values(knobs, asked.seed, n) for n in range(asked.trials or 12)] if asked.search == "random" else []


def planned(config: RunConfig, asked: Asked, training: int | None, ids: int | None) -> dict[str, Any]:
    """Length of a trial, steps between measurements, and where the scheduler decides.

    The first decision comes after the warm-up, after a queue is in use and after prototypes move, and with room for two more.

    Raises:
        ConfigError: a grace period that is longer than a trial.
    """
    resolved = resolve(config, training, ids)
    facts = resolved.facts
    total, every = facts.total_steps, min(resolved.knn_every, facts.total_steps)
    method = config.method
    queue = getattr(method, "queue_length", 0)
    filled = getattr(method, "queue_start_epoch", 0) * facts.steps_per_epoch + queue / facts.global_batch_size if queue else 0
    frozen = getattr(method, "freeze_prototypes_epochs", 0) * facts.steps_per_epoch
    needed = [resolved.zero_lr_steps + resolved.warmup_steps, filled, frozen, total / 9]
    wanted = asked.grace or max(step for step in needed if step < total)
    grace = every * math.ceil(wanted / every)
    if asked.grace is not None and grace >= total and asked.scheduler != "none":
        raise ConfigError(f"--grace {asked.grace}: not below the {total} steps of a trial; use fewer, or --scheduler none")
    rungs: list[int] = []
    if asked.scheduler == "asha":
        from tuning.schedulers import rungs as of

        rungs = of(grace, total)
    elif asked.scheduler == "pbt":
        rungs = list(range(grace, total, grace))
        if not rungs:
            raise ConfigError(f"train.steps={total}: no exchange fits in; use --grace below it, or more steps")
    return {"total_steps": total, "measure_every": every, "rungs": rungs}


def asked_images(score: str, config: RunConfig, dataset: ImageDataset) -> int:
    """How many held-out images have labels.

    Raises:
        ConfigError: the score needs labels, and there are none.
    """
    count = int((dataset.labels[dataset.held_out_ids(config.data.held_out)] >= 0).sum())
    if score != "rankme" and not count:
        raise ConfigError(f"--score {score}: {config.data.path} has no labels, or data.held_out=0; use --score rankme")
    return count


# ---------------------------------------------------------------------------- with Ray


def fit(sweep: Sweep, console: Console) -> int:
    """Run every trial that has not ended, then rank them and register the best. Returns the exit code."""
    with hold(sweep.path, f"sweep={sweep.name}: another process is at work on it; stop that one first"):
        (sweep.path / ".stop").unlink(missing_ok=True)
        status, unsent = "failed", 0
        facts, config = sweep.facts(), sweep.config()
        sweep.update(status="running", ended=None, **room(config, facts["asked_concurrent"], facts["gpus"], facts["trials"]))
        parent = Tracker.open(
            sweep.path,
            uri=facts["track_uri"],
            experiment=config.track.experiment,
            name=sweep.name,
            params=lambda: (
                {f"space.{key}": range_["text"] for key, range_ in facts["space"].items()}
                | {key: facts[key] for key in ("search", "scheduler", "score", "trials", "seeds", "seed", "total_steps", "workers")}
            ),
            tags={"recipe": facts["recipe"], "method": facts["method"], "kind": "sweep"},
        )
        from tuning.callback import Book, settle
        from tuning.display import SweepDisplay

        settle(sweep)
        sweep.update(mlflow_run=parent.run_id(timeout=60.0))
        screen = SweepDisplay(console, [t.facts() for t in sweep.trials()], facts["total_steps"], facts["trials"], facts["score"])
        book = Book(sweep, parent, screen)
        model = None
        try:
            introduce(sweep, console)
            with interruptible() as stop, stopping(sweep, stop), screen:
                run_trials(sweep, config, book, stop)
            trials = [t.facts() for t in sweep.trials()]
            left = len(trials) < sweep.facts()["trials"] or any(t["status"] not in ENDED for t in trials)
            status = "interrupted" if left else "finished" if any(t["status"] == "finished" for t in trials) else "failed"
            if status == "finished" and config.track.register:
                model = champion(sweep, config, console)
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            unsent = book.close("finished" if status == "finished" else status)
            sweep.update(status=status, ended=time.time())
    return conclude(sweep, console, status, model, unsent)
