"""From a config to a finished, evaluated and registered run: `pretrain`, `resume` and `continue_run`."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from methods.parts.backbones import num_features
from methods.parts.contract import find
from methods.parts.errors import ConfigError
from pipeline import checkpoint
from pipeline.build import Prepared, prepare, prepare_resume
from pipeline.config import RunConfig, flatten, from_yaml, to_yaml
from pipeline.data.ray_data import default_tasks, start_ray
from pipeline.evaluate.final import Scores
from pipeline.export import registry
from pipeline.machine import choose_device
from pipeline.run_folder import RunFolder, command, create_run, write_atomic
from pipeline.shell import program
from pipeline.storage import mirror
from pipeline.tracking.run_tracker import EndStatus, Tracker
from pipeline.train.health import TrainingAborted
from pipeline.train.loop import Position
from pipeline.train.placement import placement_advice
from pipeline.train.progress import Display
from pipeline.train.ray_trainer import evaluate_in_task, train_with_workers
from pipeline.train.registration import register, tracking_uri
from pipeline.train.work import Evaluation, evaluate_and_export, train


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. `status` is finished, interrupted or failed."""

    folder: RunFolder
    status: str
    message: str = ""
    scores: Scores | None = None
    model: registry.Registered | None = None

    @property
    def recipe(self) -> str:
        return str(self.folder.state().get("recipe", ""))

    @property
    def tracking_uri(self) -> str:
        return tracking_uri(from_yaml(self.folder.config_text()), self.folder)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        scores = self.scores.to_dict() if self.scores else None
        model = {"uri": self.model.uri, "version": self.model.version} if self.model else None
        return self.folder.state() | {"folder": str(self.folder.path), "message": self.message, "scores": scores, "registered": model}


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
        longer = command("continue", folder.name, "--train.steps", "N", runs_dir=runs_dir)
        raise ConfigError(f"run={folder.name}: it is finished; `{longer}` starts a new phase")
    fresh = checkpoint.pointed_to(folder.checkpoints) is None
    config = from_yaml(folder.config_text())
    ready = prepare_resume(folder, given_weights(config, runs_dir) if fresh else None)
    with folder.working():
        return _run(ready, folder, console, None)


def last_state(folder: RunFolder) -> checkpoint.State:
    pointed = checkpoint.pointed_to(folder.checkpoints)
    if pointed is None:
        raise ConfigError(f"run={folder.name}: has no checkpoint yet; start again with pretrain")
    return checkpoint.load(pointed)


def _begin(ready: Prepared, *, runs_dir: Path, run: str | None, console: Console, state: Any, stem: str | None = None) -> Outcome:
    folder = create_run(runs_dir, run, stem or ready.config.recipe or find(ready.config.method).name)
    write_atomic(folder.path / "config.yaml", to_yaml(ready.config).encode())
    folder.update(recipe=ready.config.recipe, fingerprint=ready.dataset.fingerprint, total_steps=ready.resolved.facts.total_steps, step=0)
    with folder.working():
        mirror.push(folder.path)
        return _run(ready, folder, console, state)


# ---------------------------------------------------------------------------- the run itself


def _run(ready: Prepared, folder: RunFolder, console: Console, state: checkpoint.State | None) -> Outcome:
    """Train to the end, or until Ctrl-C or SIGTERM; then evaluate, register the backbone, and write down how it ended."""
    outcome = Outcome(folder, "failed", "ended unexpectedly")
    tracker = _open_tracker(ready, folder)
    try:
        start_ray(extra_cpus=1 if ready.config.train.worker_range[1] else 0)  # first: it installs a SIGTERM handler of its own
        start = checkpoint.last_step(folder.checkpoints)
        tracker.rewind(start)
        for line in run_summary(ready, folder, start):
            console.print(line, highlight=False, soft_wrap=True)
        with interruptible() as stop:
            step, evaluation = _train_and_evaluate(ready, folder, console, state, tracker, stop.is_set)
        if evaluation is None:
            outcome = Outcome(folder, "interrupted", f"stopped at step {step}; its checkpoint is whole")
            return outcome
        tracker.log(step, evaluation.scores.metrics())
        for picture in evaluation.pictures:
            tracker.artifact(folder.figures / picture)
        outcome = Outcome(folder, "finished", scores=evaluation.scores, model=register(folder, tracker, console))
        return outcome
    except (TrainingAborted, checkpoint.DiskFull) as error:
        outcome = Outcome(folder, "failed", str(error))
        return outcome
    except ConfigError as error:
        outcome = Outcome(folder, "failed", str(error))
        raise
    except KeyboardInterrupt:
        outcome = Outcome(folder, "interrupted", "stopped at once; the last checkpoint is whole")
        return outcome
    finally:
        ends: dict[str, EndStatus] = {"finished": "FINISHED", "interrupted": "KILLED"}
        folder.update(status=outcome.status, message=outcome.message, ended=time.time())
        unsent = tracker.close(ends.get(outcome.status, "FAILED"))
        with contextlib.suppress(OSError):
            mirror.push(folder.path, only="tracking.json")
        if unsent:
            later = command("sync", folder.name, runs_dir=folder.path.parent)
            console.print(f"{unsent} entries have not reached MLflow; they are kept. Later: {later}", soft_wrap=True)


def _train_and_evaluate(
    ready: Prepared, folder: RunFolder, console: Console, state: checkpoint.State | None, tracker: Tracker, stop: Callable[[], bool]
) -> tuple[int, Evaluation | None]:
    """The last completed step, and what was found at the end; None if `stop` came before."""
    facts = ready.resolved.facts
    display = Display(
        console,
        total_steps=facts.total_steps,
        start_step=checkpoint.last_step(folder.checkpoints),
        batch=facts.global_batch_size,
        chance=ready.config.method.hints(facts).chance_loss,
    )
    kept: dict[Any, Any] = {}
    with display:
        if ready.config.train.worker_range[1]:
            result = train_with_workers(ready, folder, state, screen=display, stop=stop, on_message=tracker.wake, on_attempt=tracker.rewind)
        else:
            result = train(ready, folder, state, screen=display, report=tracker.log, stop=stop, tasks=default_tasks(), kept=kept)
        if not result.complete:
            return result.step, None
        display.say("evaluating ...")
        if ready.config.train.worker_range[1]:
            return result.step, evaluate_in_task(ready, folder, stop=stop)
        return result.step, evaluate_and_export(ready, folder, kept=kept)


def _open_tracker(ready: Prepared, folder: RunFolder) -> Tracker:
    config, method = ready.config, find(ready.config.method).name
    return Tracker.open(
        folder.path,
        uri=config.track.uri,
        experiment=config.track.experiment,
        name=folder.name,
        params=lambda: flatten(config) | {"method": method},
        tags={"recipe": config.recipe, "method": method, "data_fingerprint": ready.dataset.fingerprint},
    )


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask the loop to stop after the current step; a second one stops at once."""
    stop = threading.Event()

    def ask(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in earlier.items():
            signal.signal(s, handler)


def run_summary(ready: Prepared, folder: RunFolder, start: int) -> list[str]:
    """What is about to happen from step `start` on, in a few lines with rich's markup."""
    device, precision = choose_device(ready.config)
    config, facts = ready.config, ready.resolved.facts
    dataset = ready.dataset
    labels = f"{len(dataset.class_names)} classes" if dataset.class_names else "no labels"
    size = sum(p.numel() for p in ready.method.evaluation_backbone().parameters()) / 1e6
    lines: list[str] = []
    say = lambda key, text: lines.append(f"[bold]{key:9}[/bold] {text}")  # noqa: E731
    say("run", str(folder.path))
    training = "" if facts.num_images is None else f"{facts.num_images:,} training images of "
    say("data", f"{config.data.path}: {training}{dataset.describe()}, {labels}")
    for path, reason in dataset.skipped[:3]:
        say("", f"skipped {path}: {reason}")
    if len(dataset.skipped) > 3:
        say("", f"... and {len(dataset.skipped) - 3} more files skipped; `{program()} doctor --data.path` lists them")
    for name, group in config.views.items():
        if group.count:
            say("views", f"{name}: {group.describe()}")
    kind = str(precision).removeprefix("torch.")
    where = f"{config.train.workers} workers" if config.train.worker_range[1] else f"{kind} on {device.type}"
    say("model", f"{find(config.method).name}, {config.backbone.name} ({size:.1f} M parameters), {where}")
    epochs = f"{facts.total_steps / facts.steps_per_epoch:.3g} epochs"
    if facts.num_images is not None:
        epochs = f"{facts.total_steps * facts.global_batch_size / facts.num_images:.3g} passes over the data"
    begin = f" from step {start}" if start else ""
    say("plan", f"{facts.total_steps:,} steps of {facts.global_batch_size} images{begin} ({epochs})")
    facts = dataclasses.replace(facts, num_features=num_features(ready.method.evaluation_backbone()))
    for sentence in [*config.method.hints(facts).warnings, *placement_advice(config)]:
        say("[yellow]advice[/yellow]   ", sentence)
    return lines
