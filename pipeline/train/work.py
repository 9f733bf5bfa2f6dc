"""The work of one process: train as the only worker or as one of several, then evaluate, draw figures and export."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import nn

from methods.parts.contract import find
from methods.parts.distributed import rank, world_size
from methods.parts.norms import convert_sync_batchnorm
from methods.parts.vit import compile_blocks
from pipeline import checkpoint
from pipeline.build import RunContext, untrained
from pipeline.data.loader import Batch
from pipeline.evaluate.final import Scores, final_scores
from pipeline.evaluate.online import Online
from pipeline.export import registry
from pipeline.figures.run_figures import run_figures
from pipeline.machine import choose_device, keep_freed_memory, memory_advice, set_precision, set_threads
from pipeline.run_folder import RunFolder, write_json
from pipeline.storage import mirror
from pipeline.storage.place import Place
from pipeline.train.health import TrainingAborted
from pipeline.train.loop import Report, Trainer, restore_method
from pipeline.train.optim import build_optimizer
from pipeline.train.progress import ProgressReporter
from pipeline.train.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The last completed step of training, and whether it was the last one of the run.

    `preempted` are the ids of preempted nodes, if training ended because of them.
    """

    step: int
    complete: bool
    preempted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Final scores of a run, and the file names of its figures."""

    scores: Scores
    pictures: list[str]


def train(
    context: RunContext,
    folder: RunFolder,
    state: checkpoint.State | None,
    *,
    reporter: ProgressReporter,
    report: Report,
    stop: Callable[[], bool],
    tasks: int | None = None,
    broadcast: Callable[[Any], Any] = lambda value: value,
    **how: Any,
) -> TrainResult:
    """Train to the end, or until `stop`.

    Args:
        tasks, broadcast: see `TrainLoader.batches`.

    The others are those of `build_trainer`.

    Raises:
        TrainingAborted: a loss that is not finite, too many bad images, or too little memory.
        checkpoint.DiskFull: a checkpoint could not be written.
    """
    try:
        trainer = build_trainer(context, folder, state, reporter=reporter, report=report, stop=stop, **how)
        with contextlib.closing(batches(context, trainer, tasks, broadcast)) as own_batches:
            trainer.run(own_batches)
    except torch.OutOfMemoryError as error:
        raise TrainingAborted(memory_advice(error, context.config)) from error
    return TrainResult(trainer.position.step, trainer.position.step >= context.resolved.facts.total_steps)


def build_trainer(
    context: RunContext,
    folder: RunFolder,
    state: checkpoint.State | None,
    *,
    reporter: ProgressReporter,
    report: Report,
    stop: Callable[[], bool],
    ask_every: int = 1,
    device: torch.device | None = None,
    local_workers: int = 1,
    pointer: Place | None = None,
    cache: dict[Any, Any] | None = None,
) -> Trainer:
    """Return a trainer in the state of the run's last checkpoint.

    Args:
        state: start of a run without a checkpoint; None = the weights of `context`.
        ask_every: steps between two calls of `stop`.
        device: None = the best one of this process.
        local_workers: workers on this machine, which share its cores.
        pointer: a checkpoint, possibly of another run, that replaces the run's own.
        cache: evaluation images, for later runs and evaluations of this process.

    Raises:
        ConfigError: `evaluate.score` cannot be measured, or another thread count than a deterministic run began with.
    """
    config, resolved = context.config, context.resolved
    own = pointer or checkpoint.pointed_to(folder.checkpoints)
    sharded = config.train.strategy == "fsdp" and world_size() > 1
    state = checkpoint.load(own, mapped=sharded) if own else state
    chosen, precision = choose_device(config)
    device = device or chosen
    set_precision(device, config.train.deterministic)
    set_threads(config, state, local_workers)
    if device.type == "cpu":
        keep_freed_memory()
    if world_size() > 1 and context.method.sync_batchnorm:
        convert_sync_batchnorm(context.method, device)
    method = context.method
    sharding = Sharding(method, device, precision) if sharded else None
    method.to(device)
    if config.train.compile:
        compile_blocks(method)
    trainer = Trainer(
        config=config,
        resolved=resolved,
        method=method,
        optimizer=build_optimizer(config.optim, method.param_groups()),
        folder=folder,
        device=device,
        precision=precision,
        reporter=reporter,
        report=report,
        sharding=sharding,
        images=len(context.dataset) if resolved.facts.num_images else resolved.facts.total_steps * resolved.facts.global_batch_size,
        stop=stop,
        ask_every=ask_every,
    )
    if rank() == 0:
        online = Online(config, context.dataset, device, precision, trainer.record_bad_images, cache)
        trainer.online = online.measure if online.measures else None
        trainer.online_clusters = online.clusters if method.has_clusters else None
    if state is not None:
        trainer.restore(state)
        if own is None or pointer is not None:  # the state of another run becomes this run's first checkpoint
            trainer.saved_step = None
            trainer.save()
    return trainer


def batches(
    context: RunContext, trainer: Trainer, tasks: int | None = None, broadcast: Callable[[Any], Any] = lambda value: value
) -> Generator[Batch]:
    """Return the batches of this worker from the trainer's step on."""
    return context.loader.batches(
        trainer.position.step,
        rank=rank(),
        world_size=world_size(),
        tasks=tasks,
        broadcast=broadcast,
        micro_batches=context.config.train.accumulation_steps,
        device=trainer.device,
    )


# ---------------------------------------------------------------------------- after training


def evaluate_and_export(context: RunContext, folder: RunFolder, *, cache: dict[Any, Any] | None = None) -> Evaluation:
    """Evaluate a complete run, whose weights are in `context`; draw its figures and export its backbone."""
    config, method = context.config, context.method
    device, precision = choose_device(config)
    method.to(device)
    backbone = method.evaluation_backbone()
    scores = final_scores(config, context.dataset, backbone, untrained(config, context.resolved), device)
    write_json(folder.path / "evaluation.json", scores.to_dict())
    clusters = Online(config, context.dataset, device, precision, cache=cache).clusters(method) if method.has_clusters else None
    pictures = run_figures(context, folder, backbone, scores, clusters, device)
    export_backbone(context, folder, scores.tags())
    mirror.push(folder.path)
    return Evaluation(scores, [picture.name for picture in pictures])


def evaluate_checkpoint(context: RunContext, run: str) -> Evaluation:
    """Evaluate and export a complete run in another process, from the last checkpoint of the folder or URI `run`."""
    runs_dir, _, name = run.rpartition("/")
    folder = RunFolder(mirror.local_copy(runs_dir) / name)
    mirror.pull(folder.path)
    set_threads(context.config, None)
    load_method(context, folder)
    return evaluate_and_export(context, folder)


def load_method(context: RunContext, folder: RunFolder) -> None:
    """Load the run's last checkpoint into the method of `context`."""
    pointed = checkpoint.pointed_to(folder.checkpoints)
    assert pointed is not None, "a run has a checkpoint of its last step"
    restore_method(context.method, checkpoint.load(pointed))


def export_backbone(context: RunContext, folder: RunFolder, tags: Mapping[str, str] | None = None) -> None:
    """Export the backbone of a complete run for `evaluate`, `embed` and the registry."""
    config = context.config
    facts: dict[str, Any] = {
        "method": find(config.method).name,
        "recipe": config.recipe,
        "run": folder.name,
        "data_fingerprint": context.dataset.fingerprint,
        "steps": context.resolved.facts.total_steps,
        "knn_held_out": folder.state().get("knn"),
    }
    facts |= tags or {}
    backbone: nn.Module = context.method.evaluation_backbone()
    registry.export(
        backbone, config.backbone, folder.model, size=config.evaluation_size, mean=config.data.mean, std=config.data.std, facts=facts
    )
