"""Start, resume and continue runs: training, evaluation, registration and the final status."""

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
from pipeline import checkpoint, phase
from pipeline.build import RunContext, prepare, prepare_resume
from pipeline.config import RunConfig, flatten, from_yaml, to_yaml
from pipeline.data.ray_data import default_tasks, start_ray
from pipeline.evaluate.final import Scores
from pipeline.export import registry
from pipeline.machine import choose_device
from pipeline.run_folder import RunFolder, command, create_run
from pipeline.shell import program
from pipeline.storage import mirror
from pipeline.storage.place import write_atomic
from pipeline.tracking.run_tracker import EndStatus, Tracker
from pipeline.train.health import TrainingAborted
from pipeline.train.loop import Position
from pipeline.train.placement import placement_advice
from pipeline.train.progress import Display
from pipeline.train.ray_trainer import evaluate_in_task, train_with_workers
from pipeline.train.registration import register, tracking_uri
from pipeline.train.work import Evaluation, evaluate_and_export, train


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The end of a run. `status` is finished, interrupted or failed."""

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
        """Return plain values for `--json`."""
        scores = self.scores.to_dict() if self.scores else None
        model = {"uri": self.model.uri, "version": self.model.version} if self.model else None
        return self.folder.state() | {"folder": str(self.folder.path), "message": self.message, "scores": scores, "registered": model}


# ---------------------------------------------------------------------------- start, continue, resume


def pretrain(config: RunConfig, *, runs_dir: Path, run: str | None, console: Console) -> RunResult:
    """Start a new run from random (or `backbone.init`) weights."""
    context = prepare(config, given_weights(config, runs_dir))
    return _begin(context, runs_dir=runs_dir, run=run, console=console, state=None)


def given_weights(config: RunConfig, runs_dir: Path) -> Callable[[nn.Module], None] | None:
    """Return a function that loads the weights of `backbone.init` into a new backbone; None without it."""
    reference = config.backbone.init
    if reference is None:
        return None
    return lambda backbone: registry.init_backbone(backbone, reference, runs_dir=runs_dir, uri=config.track.uri)


def continue_run(
    earlier: RunFolder, config: RunConfig, *, runs_dir: Path, run: str | None, console: Console, shorten: bool = False
) -> RunResult:
    """Start a new run from the full last state of another, with a new schedule.

    Args:
        shorten: compress the schedules of the earlier run into the steps of the new one, unless `train.steps_per_epoch` is another.

    Raises:
        ConfigError: the config has another backbone, method or optimizer, or the earlier run has no checkpoint.
    """
    saved = last_state(earlier)
    before = from_yaml(earlier.config_text())
    phase.require_continuable(config, before, earlier.name)
    context = prepare(before)
    facts = context.resolved.facts
    if shorten and config.train.steps_per_epoch == before.train.steps_per_epoch:
        config = phase.shortened(config, facts, context.resolved.checkpoint_every)
    passes = before.train.first_epoch - (-int(saved["position"]["step"]) // facts.steps_per_epoch)  # rounded up
    new = prepare(dataclasses.replace(config, train=dataclasses.replace(config.train, first_epoch=passes)))
    state = phase.fit_state(saved, context.method, new.method) | {"position": vars(Position())}
    return _begin(new, runs_dir=runs_dir, run=run, console=console, state=state, stem=f"{earlier.name}-continued")


def resume(folder: RunFolder, *, runs_dir: Path, console: Console) -> RunResult:
    """Resume a run with the same config and order of images, from its last checkpoint (or from the start if it has none).

    Raises:
        ConfigError: the run is finished, another process trains it, or its images have changed.
    """
    if folder.state().get("status") == "finished":
        longer = command("continue", folder.name, "--train.steps", "N", runs_dir=runs_dir)
        raise ConfigError(f"run={folder.name}: it is finished; `{longer}` starts a new phase")
    fresh = checkpoint.pointed_to(folder.checkpoints) is None
    config = from_yaml(folder.config_text())
    context = prepare_resume(folder, given_weights(config, runs_dir) if fresh else None)
    with folder.working():
        return _run(context, folder, console, None)


def last_state(folder: RunFolder) -> checkpoint.State:
    pointed = checkpoint.pointed_to(folder.checkpoints)
    if pointed is None:
        raise ConfigError(f"run={folder.name}: has no checkpoint yet; start again with pretrain")
    return checkpoint.load(pointed)


def _begin(context: RunContext, *, runs_dir: Path, run: str | None, console: Console, state: Any, stem: str | None = None) -> RunResult:
    folder = create_run(runs_dir, run, stem or context.config.recipe or find(context.config.method).name)
    write_atomic(folder.path / "config.yaml", to_yaml(context.config).encode())
    folder.update(
        recipe=context.config.recipe, fingerprint=context.dataset.fingerprint, total_steps=context.resolved.facts.total_steps, step=0
    )
    with folder.working():
        mirror.push(folder.path)
        return _run(context, folder, console, state)


# ---------------------------------------------------------------------------- a run


def _run(context: RunContext, folder: RunFolder, console: Console, state: checkpoint.State | None) -> RunResult:
    """Train to the end, or until Ctrl-C or SIGTERM. Then evaluate, register the backbone, and store the status."""
    result = RunResult(folder, "failed", "ended unexpectedly")
    tracker = _open_tracker(context, folder)
    try:
        start_ray(extra_cpus=1 if context.config.train.worker_range[1] else 0)  # before `interruptible`: Ray installs a SIGTERM handler
        start = checkpoint.last_step(folder.checkpoints)
        tracker.rewind(start)
        for line in run_summary(context, folder, start):
            console.print(line, highlight=False, soft_wrap=True)
        with interruptible() as stop:
            step, evaluation = _train_and_evaluate(context, folder, console, state, tracker, stop.is_set)
        if evaluation is None:
            result = RunResult(folder, "interrupted", f"stopped at step {step}; its checkpoint is whole")
            return result
        tracker.log(step, evaluation.scores.metrics())
        for picture in evaluation.pictures:
            tracker.artifact(folder.figures / picture)
        result = RunResult(folder, "finished", scores=evaluation.scores, model=register(folder, tracker, console))
        return result
    except (TrainingAborted, checkpoint.DiskFull) as error:
        result = RunResult(folder, "failed", str(error))
        return result
    except ConfigError as error:
        result = RunResult(folder, "failed", str(error))
        raise
    except KeyboardInterrupt:
        result = RunResult(folder, "interrupted", "stopped at once; the last checkpoint is whole")
        return result
    finally:
        ends: dict[str, EndStatus] = {"finished": "FINISHED", "interrupted": "KILLED"}
        folder.update(status=result.status, message=result.message, ended=time.time())
        unsent = tracker.close(ends.get(result.status, "FAILED"))
        with contextlib.suppress(OSError):
            mirror.push(folder.path, only="tracking.json")
        if unsent:
            later = command("sync", folder.name, runs_dir=folder.path.parent)
            console.print(f"{unsent} entries have not reached MLflow; they are kept. Later: {later}", soft_wrap=True)


def _train_and_evaluate(
    context: RunContext, folder: RunFolder, console: Console, state: checkpoint.State | None, tracker: Tracker, stop: Callable[[], bool]
) -> tuple[int, Evaluation | None]:
    """Return the last completed step, and the final evaluation; None if `stop` ended the run."""
    facts = context.resolved.facts
    display = Display(
        console,
        total_steps=facts.total_steps,
        start_step=checkpoint.last_step(folder.checkpoints),
        batch=facts.global_batch_size,
        chance=context.config.method.hints(facts).chance_loss,
    )
    cache: dict[Any, Any] = {}
    with display:
        if context.config.train.worker_range[1]:
            result = train_with_workers(
                context, folder, state, reporter=display, stop=stop, on_message=tracker.wake, on_attempt=tracker.rewind
            )
        else:
            result = train(context, folder, state, reporter=display, report=tracker.log, stop=stop, tasks=default_tasks(), cache=cache)
        if not result.complete:
            return result.step, None
        display.info("evaluating ...")
        if context.config.train.worker_range[1]:
            return result.step, evaluate_in_task(context, folder, stop=stop)
        return result.step, evaluate_and_export(context, folder, cache=cache)


def _open_tracker(context: RunContext, folder: RunFolder) -> Tracker:
    config, method = context.config, find(context.config.method).name
    return Tracker.open(
        folder.path,
        uri=config.track.uri,
        experiment=config.track.experiment,
        name=folder.name,
        params=lambda: flatten(config) | {"method": method},
        tags={"recipe": config.recipe, "method": method, "data_fingerprint": context.dataset.fingerprint},
    )


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C or SIGTERM sets, so that the loop stops after its step. A second signal raises KeyboardInterrupt."""
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


def run_summary(context: RunContext, folder: RunFolder, start: int) -> list[str]:
    """Return lines with rich markup about a run that starts from step `start`."""
    device, precision = choose_device(context.config)
    config, facts = context.config, context.resolved.facts
    dataset = context.dataset
    labels = f"{len(dataset.class_names)} classes" if dataset.class_names else "no labels"
    size = sum(p.numel() for p in context.method.evaluation_backbone().parameters()) / 1e6
    lines: list[str] = []
    add = lambda key, text: lines.append(f"[bold]{key:9}[/bold] {text}")  # noqa: E731
    add("run", str(folder.path))
    training = "" if facts.num_images is None else f"{facts.num_images:,} training images of "
    add("data", f"{config.data.path}: {training}{dataset.describe()}, {labels}")
    for path, reason in dataset.skipped[:3]:
        add("", f"skipped {path}: {reason}")
    if len(dataset.skipped) > 3:
        add("", f"... and {len(dataset.skipped) - 3} more files skipped; `{program()} doctor --data.path` lists them")
    for name, group in config.views.items():
        if group.count:
            add("views", f"{name}: {group.describe()}")
    kind = str(precision).removeprefix("torch.")
    where = f"{config.train.workers} workers ({config.train.strategy})" if config.train.worker_range[1] else f"{kind} on {device.type}"
    add("model", f"{find(config.method).name}, {config.backbone.name} ({size:.1f} M parameters), {where}")
    epochs = f"{facts.total_steps / facts.steps_per_epoch:.3g} epochs"
    if facts.num_images is not None:
        epochs = f"{facts.total_steps * facts.global_batch_size / facts.num_images:.3g} passes over the data"
    begin = f" from step {start}" if start else ""
    add("plan", f"{facts.total_steps:,} steps of {facts.global_batch_size} images{begin} ({epochs})")
    facts = dataclasses.replace(facts, num_features=num_features(context.method.evaluation_backbone()))
    for sentence in [*config.method.hints(facts).warnings, *placement_advice(config)]:
        add("[yellow]advice[/yellow]   ", sentence)
    return lines
