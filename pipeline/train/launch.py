"""From a config to a finished, evaluated and registered run: `pretrain`, `resume` and `continue_run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from methods.parts.contract import find
from methods.parts.errors import ConfigError
from pipeline import mirror, registry
from pipeline.config import RunConfig, from_yaml, to_yaml
from pipeline.runs import RunFolder, create_run, write_atomic
from pipeline.train import checkpoint
from pipeline.train.conduct import Course, Outcome, conduct, tracked
from pipeline.train.display import Screen
from pipeline.train.done import Done
from pipeline.train.introduction import introduction
from pipeline.train.loop import Position
from pipeline.train.prepare import Prepared, prepare, prepare_again
from pipeline.train.work import work
from pipeline.train.workers import train_with_workers

# ---------------------------------------------------------------------------- the three ways to begin


def pretrain(config: RunConfig, *, runs_dir: Path, run: str | None, console: Console) -> Outcome:
    """A new run from random (or `backbone.init`) weights."""
    ready = prepare(config, given_weights(config, runs_dir))
    return _begin(ready, runs_dir=runs_dir, run=run, console=console, state=None)


def given_weights(config: RunConfig, runs_dir: Path) -> Callable[[nn.Module], None] | None:
    """What fills a new backbone with the weights of `backbone.init`; None without it."""
    reference = config.backbone.init
    if reference is None:
        return None
    return lambda backbone: registry.init_backbone(backbone, reference, runs_dir=runs_dir, uri=config.track.uri)


def continue_run(earlier: RunFolder, config: RunConfig, *, runs_dir: Path, run: str | None, console: Console) -> Outcome:
    """A new run from the full last state of another, with a new schedule."""
    saved = last_state(earlier)
    before = from_yaml(earlier.config_text())
    for key in ("backbone", "method"):
        if getattr(config, key) != getattr(before, key):
            raise ConfigError(f"{key}: another {key} cannot continue {earlier.name}; use pretrain --backbone.init {earlier.name}")
    if config.optim.name != before.optim.name:
        raise ConfigError(f"optim.name={config.optim.name}: {earlier.name} holds the state of {before.optim.name}; keep that one")
    done = prepare(before).resolved.facts.steps_per_epoch
    passes = before.train.first_epoch - (-int(saved["position"]["step"]) // done)  # whole and begun ones
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, first_epoch=passes))
    return _begin(
        prepare(config),
        runs_dir=runs_dir,
        run=run,
        console=console,
        state=saved | {"position": vars(Position())},
        stem=f"{earlier.name}-continued",
    )


def resume(folder: RunFolder, *, runs_dir: Path, console: Console) -> Outcome:
    """Go on with a run: same plan, same config, from its last checkpoint (or from the start if it has none)."""
    if folder.state().get("status") == "finished":
        raise ConfigError(f"run={folder.name}: it is finished; `manyviews continue {folder.name} --train.steps N` starts a new phase")
    fresh = checkpoint.pointed_to(folder.checkpoints) is None
    config = from_yaml(folder.config_text())
    ready = prepare_again(folder, given_weights(config, runs_dir) if fresh else None)
    with folder.working():
        return _train(ready, folder, console, None)


def last_state(folder: RunFolder) -> checkpoint.State:
    pointed = checkpoint.pointed_to(folder.checkpoints)
    if pointed is None:
        raise ConfigError(f"run={folder.name}: has no checkpoint yet; start again with pretrain")
    return checkpoint.load(pointed)


def _begin(ready: Prepared, *, runs_dir: Path, run: str | None, console: Console, state: Any, stem: str | None = None) -> Outcome:
    folder = create_run(runs_dir, run, stem or ready.config.recipe or find(ready.config.method).name)
    write_atomic(folder.path / "config.yaml", to_yaml(ready.config).encode())
    folder.update(recipe=ready.config.recipe, fingerprint=ready.manifest.fingerprint, total_steps=ready.resolved.facts.total_steps, step=0)
    with folder.working():
        mirror.push(folder.path)
        return _train(ready, folder, console, state)


# ---------------------------------------------------------------------------- the run itself


def _train(ready: Prepared, folder: RunFolder, console: Console, state: checkpoint.State | None) -> Outcome:
    config, facts = ready.config, ready.resolved.facts
    course = Course(facts.total_steps, facts.global_batch_size, ready.method.chance_loss())
    folder.update(**dataclasses.asdict(course))
    tracker = tracked(
        folder, tags={"recipe": config.recipe, "method": find(config.method).name, "data_fingerprint": ready.manifest.fingerprint}
    )
    start = checkpoint.last_step(folder.checkpoints)
    tracker.rewind(start)
    for line in introduction(ready, folder, start):
        console.print(line, highlight=False, soft_wrap=True)

    def train(screen: Screen, stop: Callable[[], bool]) -> Done:
        if config.train.worker_range[1]:
            return train_with_workers(ready, folder, state, screen=screen, stop=stop, news=tracker.wake, before=tracker.rewind)
        return work(ready, folder, state, screen=screen, report=tracker.log, stop=stop)

    return conduct(folder, course, tracker, console, train, extra_cpus=1 if config.train.worker_range[1] else 0)
