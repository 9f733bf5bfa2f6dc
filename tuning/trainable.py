"""What a trial does: in a process that serves many trials, or by a group of workers of its own.

Ray Tune carries pointers only: a trial's checkpoints lie in its run folder. A trial starts from the pointer to another trial's state (PBT),
else from its own last checkpoint, else fresh.
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
from pipeline.build import RunContext, prepare
from pipeline.config import RunConfig, to_yaml
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import Batch
from pipeline.data.sources.base import open_source
from pipeline.metrics_log import append_line, encode, parse, read_lines
from pipeline.run_folder import RunFolder, write_json
from pipeline.storage.place import Place, write_atomic
from pipeline.train.health import TrainingAborted
from pipeline.train.launch import given_weights
from pipeline.train.progress import NullReporter
from pipeline.train.ray_trainer import train_with_workers
from pipeline.train.work import batches, build_trainer, export_backbone, load_method
from tuning.sweep import Sweep, Trial

Result = dict[str, Any]


def read_trial(task: Mapping[str, Any], name: str) -> tuple[Sweep, Trial]:
    """Return the sweep and the trial of a task. PBT copies tasks from one trial to another, so the trial's name tells which it is."""
    sweep = Sweep.read(Path(task["sweep"]))
    return sweep, sweep.trial(name)


def write_config(sweep: Sweep, trial: Trial, values: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a trial, and write them into its folder."""
    if sweep.facts["cluster"]:
        os.environ.setdefault("RAY_ADDRESS", "auto")  # as in the driver: tasks are limited by resources, not by this machine
    config = sweep.trial_config(values, trial.seed)
    write_atomic(trial.folder / "config.yaml", to_yaml(config).encode())
    return config


def recorded(trial: Trial) -> Result:
    """Return the last result of a trial that had ended before Ray Tune's snapshot knew of it."""
    return {"state": trial.status, "step": trial.step, "error": trial.error} | ({} if trial.score is None else {"score": trial.score})


def error_line(error: BaseException) -> str:
    """Return an error in one line."""
    plain = isinstance(error, ConfigError | TrainingAborted | checkpoint.DiskFull)
    text = " ".join(str(error).split())
    return (text if plain else f"{type(error).__name__}: {text}")[:500]


# ---------------------------------------------------------------------------- in one process


class TrialSession:
    """One trial from its start until it ends or is cut.

    Args:
        pointer: what `TrialProcess.save_checkpoint` wrote; None = none.
        cache: open data and images, for later trials of this process too.
    """

    def __init__(self, task: Mapping[str, Any], name: str, pointer: Mapping[str, Any] | None, cache: dict[Any, Any]) -> None:
        self.began = time.monotonic()
        sweep, trial = read_trial(task, name)
        self.folder = trial.run
        self.held = contextlib.ExitStack()
        self.held.enter_context(self.folder.working())
        config = write_config(sweep, trial, task["trial"]["values"])
        other = resolve_pointer(pointer, self.folder)
        fresh = other is None and checkpoint.pointed_to(self.folder.checkpoints) is None
        dataset: ImageDataset = cache.get(config.data) or open_source(config.data)
        self.ready: RunContext = prepare(config, given_weights(config, sweep.path.parent) if fresh else None, dataset)
        cache[config.data] = cache[self.ready.config.data] = dataset
        self.total = self.ready.resolved.facts.total_steps
        self.folder.update(fingerprint=dataset.fingerprint, total_steps=self.total)
        self.screen = NullReporter(config.train.global_batch_size)
        self.trainer = build_trainer(
            self.ready,
            self.folder,
            None,
            reporter=self.screen,
            report=lambda step, metrics: append_line(self.folder.path, encode(step, metrics)),
            stop=lambda: sweep.stopping,
            local_workers=task["concurrent"],
            pointer=other,
            cache=cache,
        )
        self.took_over: Result = {}
        if pointer is not None and other is not None:
            self.trainer.writer.wait()
            self.folder.update(took_over=pointer["folder"])
            self.took_over = {"took_over": {"trial": pointer["trial"], "step": self.trainer.position.step}}
        self.batches: Iterator[Batch] = batches(self.ready, self.trainer, task["tasks"])
        self.train_until_eval = self.trainer.train_until_eval(self.batches)
        self.unreported_s = time.monotonic() - self.began  # of training, but for that of `advance`
        self.untrained_s = 0.0  # what measuring the untrained backbone took
        self.start_s: float | None = None  # from being handed the trial to its first step's end, without that
        self.measured: Mapping[str, float] = {}

    def advance(self) -> Result:
        """Train to the next measurement."""
        begin = time.monotonic()
        found = next(self.train_until_eval, None)
        step = self.trainer.position.step
        if found is None and step >= self.total and not self.measured:  # it was killed between its last checkpoint and its end
            self.trainer.measure()
            found = self.trainer.measured
        self.measured = found or self.measured
        result: Result = {"state": "running", "step": step, "images": step * self.ready.config.train.global_batch_size, **self.took_over}
        result["seconds"] = time.monotonic() - begin + self.unreported_s
        self.unreported_s, self.took_over = 0.0, {}
        if step == 0:
            self.untrained_s = time.monotonic() - begin
        elif self.start_s is None and self.screen.first_step_at is not None:
            self.start_s = result["start_seconds"] = self.screen.first_step_at - self.began - self.untrained_s
        if found is None and step < self.total:
            self.close("interrupted", f"stopped at step {step}; its checkpoint is whole")
            return result | {"state": "interrupted"}
        if "score" in self.measured:
            result["score"] = float(self.measured["score"])
        if step >= self.total:
            self.trainer.writer.wait()
            export_backbone(self.ready, self.folder)
            self.close("finished", "")
            return result | {"state": "finished"}
        return result

    def close(self, status: str, message: str) -> None:
        """End the data pipeline, and let go of the folder and of the memory."""
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


def resolve_pointer(pointer: Mapping[str, Any] | None, folder: RunFolder) -> Place | None:
    """Return the checkpoint of another trial to go on from, or None = the trial's own `last`.

    A pointer to the trial's own checkpoint is ignored, because `last` is as new or newer; so is one that the trial has gone on from before.
    """
    if not pointer or not pointer["folder"] or pointer["trial"] == folder.name or pointer["folder"] == folder.state().get("took_over"):
        return None
    return Place(pointer["folder"])


class TrialProcess(tune.Trainable):
    """A process that trains one trial after another; Ray Tune hands it the next one by `reset_config`, also after a cut.

    A step is the training between two measurements of the score. Errors end a trial, not the process.
    """

    cache: ClassVar[dict[Any, Any]] = {}

    def setup(self, config: dict[str, Any]) -> None:
        self.task = config
        self.pointer: dict[str, Any] | None = None
        self.session: TrialSession | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> Result:
        sweep, trial = read_trial(self.task, self.trial_name)
        if trial.has_ended:
            return recorded(trial) | {"done": True}
        if self.session is None and sweep.stopping:
            time.sleep(0.2)  # Ray Tune asks for the next step until the driver ends the search
            return {"state": "interrupted"}
        try:
            self.session = self.session or TrialSession(self.task, self.trial_name, self.pointer, self.cache)
            result = self.session.advance()
        except Exception as error:
            result = {"state": "failed", "error": error_line(error)}
            if self.session is not None:
                with contextlib.suppress(Exception):
                    self.session.close("failed", error_line(error))
            trial.run.update(status="failed", message=error_line(error), ended=time.time())
        if result["state"] != "running":
            self.session = None
        return result | {"done": result["state"] in ("finished", "failed")}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        if self.session is not None:
            self.session.trainer.writer.wait()
        _, trial = read_trial(self.task, self.trial_name)
        folder = checkpoint.pointed_to(trial.run.checkpoints)
        write_json(Path(checkpoint_dir) / "pointer.json", {"trial": trial.run.name, "folder": str(folder or "")})

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        self.pointer = json.loads((Path(checkpoint_dir) / "pointer.json").read_text())

    def cleanup(self) -> None:
        if self.session is not None:
            self.session.close("interrupted", "cut by the search")
            self.session = None


# ---------------------------------------------------------------------------- by a group of workers


def train_group(task: dict[str, Any]) -> None:
    """Train a trial by its own Ray Train group. A measurement is reported as soon as it is written."""
    sweep, trial = read_trial(task, tune.get_context().get_trial_name())
    folder, last, begin = trial.run, Result(), time.monotonic()
    if trial.has_ended:
        tune.report(recorded(trial))
        return
    try:
        with folder.working():
            config = write_config(sweep, trial, task["trial"]["values"])
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
                reporter=NullReporter(facts.global_batch_size),
                stop=lambda: sweep.stopping,
                on_message=on_message,
                on_attempt=lambda step: None,
            )
            if done.complete:
                load_method(ready, folder)
                export_backbone(ready, folder)
            status = "finished" if done.complete else "interrupted"
            folder.update(status=status, message="" if done.complete else f"stopped at step {done.step}; its checkpoint is whole")
    except Exception as error:
        folder.update(status="failed", message=error_line(error), ended=time.time())
        tune.report({"state": "failed", "error": error_line(error)})
        return
    if done.complete and "score" not in last:  # it was killed between its last checkpoint and its end
        last.update(step=done.step, images=done.step * facts.global_batch_size, seconds=0.0)
        last |= {key: value for key, value in folder.state().items() if key == "score" and value is not None}
    while status == "interrupted":  # Ray Tune takes a function that returns for a finished trial
        tune.report({"state": "interrupted"})
        time.sleep(0.5)
    tune.report(dict(last, state=status))
