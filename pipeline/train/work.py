"""What one worker does with a run, in the driver's own process or under Ray Train: train, then evaluate and export on rank 0."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from methods.parts.contract import find
from methods.parts.distributed import rank, world_size
from methods.parts.norms import synchronized
from methods.parts.vit import compile_blocks
from pipeline import registry
from pipeline.evaluate.clusters import Clusters
from pipeline.evaluate.online import Online
from pipeline.evaluate.protocols import final_scores
from pipeline.gallery import run_figures
from pipeline.ingest.stream import Batch
from pipeline.runs import RunFolder, write_atomic, write_json
from pipeline.train import checkpoint
from pipeline.train.display import Screen
from pipeline.train.done import Done
from pipeline.train.loop import Position, Report, Trainer
from pipeline.train.optim import build_optimizer
from pipeline.train.prepare import Prepared, choose_device, keep_freed_memory, set_threads, untrained


def work(
    ready: Prepared,
    folder: RunFolder,
    state: checkpoint.State | None,
    *,
    screen: Screen,
    report: Report,
    stop: Callable[[], bool],
    device: torch.device | None = None,
    local_workers: int = 1,
    tasks: int | None = None,
    evaluate: bool = True,
) -> Done:
    """Train to the end, or until `stop`; then, on rank 0, evaluate, draw and export.

    Args:
        tasks: windows cut at the same time for this worker; see `Stream.batches`.
        evaluate: False = only export at the end, as a trial of a search does: the test split is not read.

    The others are those of `assemble`.

    Raises:
        TrainingStopped: a loss that is no number, or too many bad images.
        checkpoint.DiskFull: a checkpoint could not be written.
    """
    trainer, online = assemble(ready, folder, state, screen=screen, report=report, stop=stop, device=device, local_workers=local_workers)
    try:
        with contextlib.closing(batches(ready, trainer.position.step, tasks)) as stream:
            trainer.run(stream)
    except BaseException:
        with contextlib.suppress(checkpoint.DiskFull):
            trainer.uploads.wait()  # the checkpoint that the message speaks of
        raise
    trainer.uploads.wait()
    done = Done(trainer.position.step, trainer.position.step >= ready.resolved.facts.total_steps)
    if not done.complete:
        return done
    final = trainer.state()
    if rank() > 0:
        return done
    folder.update(state_sha256=checkpoint.state_hash(final))
    method = trainer.method
    if not evaluate:
        exported(ready, folder, method.evaluation_backbone(), done.step, trainer.last_knn)
        return done
    screen.say("evaluating ...")
    clusters = online.clusters(method) if method.has_clusters else None
    return evaluated(done, ready, folder, method.evaluation_backbone(), report, trainer.last_knn, clusters, trainer.device)


def assemble(
    ready: Prepared,
    folder: RunFolder,
    state: checkpoint.State | None,
    *,
    screen: Screen,
    report: Report,
    stop: Callable[[], bool],
    device: torch.device | None = None,
    local_workers: int = 1,
    pointer: Path | None = None,
    kept: dict[Any, Any] | None = None,
) -> tuple[Trainer, Online]:
    """A trainer at the step from which the run goes on, and what measures its backbone.

    Args:
        state: what to start from where the run has no checkpoint yet; None = the weights that `ready` holds.
        device: None = this process's best.
        local_workers: workers on this machine, which share its cores.
        pointer: a checkpoint, of another run perhaps, from which to go on whatever the run has itself.
        kept: images of earlier runs in this process, for the next.

    Raises:
        ConfigError: `evaluate.score` cannot be measured, or another thread count than a deterministic run began with.
    """
    config, resolved = ready.config, ready.resolved
    own = pointer or checkpoint.pointed_to(folder.checkpoints)
    state = checkpoint.load(own) if own else state
    chosen, precision = choose_device(config)
    device = device or chosen
    set_threads(config, state, local_workers)
    if device.type == "cpu":
        keep_freed_memory()
    if world_size() > 1 and ready.method.sync_batchnorm:
        synchronized(ready.method, device)
    method = ready.method.to(device)
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
        display=screen,
        report=report,
        images=len(ready.manifest) if resolved.facts.num_images else resolved.facts.total_steps * resolved.facts.global_batch_size,
        stop=stop,
    )
    online = Online(config, ready.manifest, device, precision, trainer.note_bad, kept)
    if rank() == 0:
        trainer.online = online.measure if online.measures else None
        trainer.online_clusters = online.clusters if method.has_clusters else None
    if state is not None:
        trainer.restore(state)
        if own is None or pointer is not None:  # a continued run owns its beginning, and so does one that takes over another's state
            trainer.saved_step = None
            trainer.save()
    if rank() == 0:
        keep_listed_bad(folder, trainer.position)
    return trainer, online


def batches(ready: Prepared, start: int, tasks: int | None = None) -> Generator[Batch]:
    """This worker's batches from completed step `start` on."""
    return ready.stream.batches(start, rank=rank(), world_size=world_size(), tasks=tasks)


def evaluated(
    done: Done,
    ready: Prepared,
    folder: RunFolder,
    backbone: nn.Module,
    report: Report,
    last_knn: float | None,
    clusters: Clusters | None,
    device: torch.device,
) -> Done:
    """Final evaluation, pictures and export of a complete run."""
    config = ready.config
    scores = final_scores(config, ready.manifest, backbone, untrained(config, ready.resolved), device)
    write_json(folder.path / "evaluation.json", scores.to_dict())
    pictures = run_figures(ready, folder, backbone, scores, clusters, device)
    report(done.step, scores.metrics())
    exported(ready, folder, backbone, done.step, last_knn, scores.tags())
    checkpoint.send(folder.path, done.step, config.train.keep_every)
    return dataclasses.replace(done, scores=scores, pictures=[picture.name for picture in pictures])


def exported(
    ready: Prepared, folder: RunFolder, backbone: nn.Module, step: int, last_knn: float | None, tags: Mapping[str, str] | None = None
) -> None:
    """The backbone as a model that `evaluate`, `embed` and the registry take."""
    config = ready.config
    facts: dict[str, Any] = {
        "method": find(config.method).name,
        "recipe": config.recipe,
        "run": folder.name,
        "data_fingerprint": ready.manifest.fingerprint,
        "steps": step,
        "knn_held_out": last_knn,
    }
    facts |= tags or {}
    registry.export(
        backbone, config.backbone, folder.model, size=config.evaluation_size, mean=config.data.mean, std=config.data.std, facts=facts
    )


def keep_listed_bad(folder: RunFolder, position: Position) -> None:
    """After a restart the list of bad images holds just those of the checkpoint; later ones are found again."""
    if folder.bad_images.exists():
        lines = [line for line in folder.bad_images.read_text().splitlines() if json.loads(line)["id"] in position.bad]
        write_atomic(folder.bad_images, "".join(line + "\n" for line in lines).encode())
