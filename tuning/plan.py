"""What is settled before Ray is started: the words of the command line, the trials' values, their length and where they are cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.config import RunConfig, resolve
from pipeline.ingest.manifest import Manifest
from pipeline.ingest.sources import open_source
from tuning import draws
from tuning.spaces import Knob
from tuning.sweep import LOSS_WORDS, SCORE_WORDS

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
        return draws.grid_values(knobs, asked.points)
    return [draws.random_values(knobs, asked.seed, n) for n in range(asked.trials or 12)] if asked.search == "random" else []


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
    needed = [resolved.idle_steps + resolved.warmup_steps, filled, frozen, total / 9]
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


def refusal(check: draws.Check, values: dict[str, Any]) -> str | None:
    """Why a setting cannot work, or None."""
    try:
        check(values)
    except ConfigError as error:
        return str(error)
    return None


def asked_images(score: str, config: RunConfig, manifest: Manifest) -> int:
    """How many held-out images have labels.

    Raises:
        ConfigError: the score needs labels, and there are none.
    """
    count = int((manifest.labels[manifest.held_out_ids(config.data.held_out)] >= 0).sum())
    if score != "rankme" and not count:
        raise ConfigError(f"--score {score}: {config.data.path} has no labels, or data.held_out=0; use --score rankme")
    return count


def checker_of(config: RunConfig) -> draws.Check:
    manifest = open_source(config.data)
    training = manifest.num_training(config.data.held_out)
    return draws.checker(config, training, None if training is None else len(manifest))
