"""What a trial does on its machine: in one process that serves many trials, or by a Ray Train group of its own.

Ray Tune carries pointers only: a trial's checkpoints lie in its run folder, where it also looks first when it starts again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from ray import tune

from methods.parts.errors import ConfigError
from pipeline import checkpoint
from pipeline.build import Prepared, prepare
from pipeline.config import RunConfig, to_yaml
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import Batch
from pipeline.data.sources.base import open_source
from pipeline.metrics_log import append_line, encode, parse, read_lines
from pipeline.run_folder import RunFolder, write_atomic, write_json
from pipeline.storage.place import Place
from pipeline.train.health import TrainingAborted
from pipeline.train.launch import given_weights
from pipeline.train.progress import NullReporter
from pipeline.train.ray_trainer import train_with_workers
from pipeline.train.work import batches, build_trainer, export_backbone, load_method
from tuning.sweep import Sweep, trial_config

STOP = ".stop"  # in the sweep's folder: all trials shall end with whole checkpoints
Result = dict[str, Any]


def settings_of(task: Mapping[str, Any]) -> tuple[Sweep, RunFolder, RunConfig]:
    """The sweep, folder and settings of a trial as Ray Tune hands it over."""
    sweep = Sweep(Path(task["sweep"]))
    facts = sweep.facts()
    if facts["cluster"]:
        os.environ.setdefault("RAY_ADDRESS", "auto")  # as in the driver: tasks are limited by resources, not by this machine
    config = trial_config(sweep.config(), facts, task["values"], task["seed"])
    folder = sweep.trial(task["number"]).run
    write_atomic(folder.path / "config.yaml", to_yaml(config).encode())
    return sweep, folder, config


def stopped(task: Mapping[str, Any]) -> bool:
    """Whether the sweep has been asked to end."""
    return (Path(task["sweep"]) / STOP).exists()


def words(error: BaseException) -> str:
    """An error in one line."""
    plain = isinstance(error, ConfigError | TrainingAborted | checkpoint.DiskFull)
    text = " ".join(str(error).split())
    return (text if plain else f"{type(error).__name__}: {text}")[:500]


# ---------------------------------------------------------------------------- in one process


class Life:
    """One trial from its start, or its last checkpoint, until it ends or is cut.

    Args:
        pointer: another trial's checkpoint to go on from (PBT), or its own.
        kept: open data and images that later trials of this process use again.
    """

    def __init__(self, task: Mapping[str, Any], pointer: Place | None, kept: dict[Any, Any]) -> None:
        self.began = time.monotonic()
        self.held = contextlib.ExitStack()
        sweep, self.folder, config = settings_of(task)
        self.held.enter_context(self.folder.working())
        fresh = pointer is None and checkpoint.pointed_to(self.folder.checkpoints) is None
        dataset: ImageDataset = kept.setdefault(config.data, None) or open_source(config.data)
        kept[config.data] = dataset
        weights = given_weights(config, sweep.path.parent) if fresh else None
        self.ready: Prepared = prepare(config, weights, dataset)
        kept[self.ready.config.data] = dataset
        self.total = self.ready.resolved.facts.total_steps
        self.folder.update(fingerprint=dataset.fingerprint, total_steps=self.total)
        self.screen = NullReporter(config.train.global_batch_size)
        self.trainer = build_trainer(
            self.ready,
            self.folder,
            None,
            screen=self.screen,
            report=lambda step, metrics: append_line(self.folder.path, encode(step, metrics)),
            stop=lambda: stopped(task),
            local_workers=task["concurrent"],
            pointer=pointer,
            kept=kept,
        )
        self.batches: Iterator[Batch] = batches(self.ready, self.trainer, task["tasks"])
        self.train_until_eval = self.trainer.train_until_eval(self.batches)
        self.assembled_s = time.monotonic() - self.began
        self.untrained_s = 0.0  # what measuring the untrained backbone took
        self.start_s: float | None = None  # from being handed the trial to its first step's end, without that
        self.measured: Mapping[str, float] = {}

    def advance(self) -> Result:
        """Train to the next measurement."""
        begin = time.monotonic()
        found = next(self.train_until_eval, None)
        step = self.trainer.position.step
        if found is None and step >= self.total and not self.measured:  # it had ended before, unknown to the sweep
            self.trainer.measure()
            found = self.trainer.measured
        self.measured = found or self.measured
        result: Result = {"step": step, "seconds": time.monotonic() - begin, "images": step * self.ready.config.train.global_batch_size}
        result["seconds"] += self.assembled_s
        self.assembled_s = 0.0
        if step == 0:
            self.untrained_s = time.monotonic() - begin
        elif self.start_s is None and self.screen.first_step_at is not None:
            self.start_s = self.screen.first_step_at - self.began - self.untrained_s
            result["start_seconds"] = self.start_s
        if "score" in self.measured:
            result["score"] = float(self.measured["score"])
        if step >= self.total:
            self.trainer.writer.wait()
            export_backbone(self.ready, self.folder)
            self.leave("finished", "")
            return result | {"state": "finished"}
        if found is None:
            self.leave("interrupted", f"stopped at step {step}; its checkpoint is whole")
            return result | {"state": "interrupted"}
        return result | {"state": "running"}

    def leave(self, status: str, message: str) -> None:
        """End the data pipeline, let go of the folder and of the memory."""
        try:
            self.trainer.writer.wait()
        except checkpoint.DiskFull as error:
            status, message = "failed", str(error)
        self.train_until_eval.close()  # type: ignore[attr-defined]
        self.batches.close()  # type: ignore[attr-defined]
        self.folder.update(status=status, message=message, ended=time.time())
        self.held.close()
        del self.trainer, self.ready
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class InProcess(tune.Trainable):
    """A process that trains one trial after another; Ray Tune hands it the next one by `reset_config`, also after a cut.

    A step is the training between two measurements of the score. Errors end a trial, not the process.
    """

    kept: ClassVar[dict[Any, Any]] = {}

    def setup(self, config: dict[str, Any]) -> None:
        self.task = config
        self.pointer: Place | None = None
        self.life: Life | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.leave()
        self.setup(new_config)
        return True

    def step(self) -> Result:
        try:
            if self.life is None and stopped(self.task):
                result: Result = {"state": "interrupted"}
            else:
                self.life = self.life or Life(self.task, self.pointer, self.kept)
                result = self.life.advance()
        except Exception as error:
            folder = Sweep(Path(self.task["sweep"])).trial(self.task["number"]).run
            if self.life is not None:
                with contextlib.suppress(Exception):
                    self.life.leave("failed", words(error))
            folder.update(status="failed", message=words(error), ended=time.time())
            result = {"state": "failed", "error": words(error)}
        if result["state"] != "running":
            self.life = None
        return result | {"done": result["state"] != "running"}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        if self.life is not None:
            self.life.trainer.writer.wait()
        folder = Sweep(Path(self.task["sweep"])).trial(self.task["number"]).run
        write_json(Path(checkpoint_dir) / "pointer.json", {"folder": str(checkpoint.pointed_to(folder.checkpoints) or "")})

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        folder = json.loads((Path(checkpoint_dir) / "pointer.json").read_text())["folder"]
        self.pointer = Place(folder) if folder else None

    def leave(self) -> None:
        if self.life is not None:
            self.life.leave("interrupted", "cut by the search")
            self.life = None

    def cleanup(self) -> None:
        self.leave()


# ---------------------------------------------------------------------------- by a group of workers


def by_group(task: dict[str, Any]) -> None:
    """A trial by its own Ray Train group. What it measures is reported as soon as it is written."""
    begin, offset = time.monotonic(), 0
    last: Result = {}
    if stopped(task):
        tune.report({"state": "interrupted"})
        return
    try:
        sweep, folder, config = settings_of(task)
        with folder.working():
            fresh = checkpoint.pointed_to(folder.checkpoints) is None
            ready = prepare(config, given_weights(config, sweep.path.parent) if fresh else None)
            facts = ready.resolved.facts
            folder.update(fingerprint=ready.dataset.fingerprint, total_steps=facts.total_steps)
            offset = folder.metrics.stat().st_size if folder.metrics.exists() else 0

            def on_message() -> None:
                nonlocal offset, begin
                lines = read_lines(folder.metrics, offset)
                offset += sum(map(len, lines))
                for point in filter(None, map(parse, lines)):
                    if "score" in point["metrics"]:
                        now = time.monotonic()
                        last.update(step=point["step"], score=float(point["metrics"]["score"]), seconds=now - begin)
                        last["images"] = point["step"] * facts.global_batch_size
                        begin = now
                        if point["step"] < facts.total_steps:
                            tune.report(dict(last, state="running"))

            done = train_with_workers(
                ready,
                folder,
                None,
                screen=NullReporter(facts.global_batch_size),
                stop=lambda: stopped(task),
                on_message=on_message,
                on_attempt=lambda step: None,
            )
            if done.complete:
                load_method(ready, folder)
                export_backbone(ready, folder)
            status = "finished" if done.complete else "interrupted"
            folder.update(status=status, message="" if done.complete else f"stopped at step {done.step}; its checkpoint is whole")
        if done.complete and "score" not in last:  # it had ended before, unknown to the sweep
            last.update(step=done.step, score=folder.state().get("score"), images=done.step * facts.global_batch_size, seconds=0.0)
        tune.report(dict(last, state=status))
    except Exception as error:
        Sweep(Path(task["sweep"])).trial(task["number"]).run.update(status="failed", message=words(error), ended=time.time())
        tune.report({"state": "failed", "error": words(error)})
