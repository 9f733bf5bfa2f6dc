"""The training loop. It owns device, precision, accumulation, clipping, the optimizer, logging, checkpoints and online
kNN, and never asks which method it runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from methods.parts.contract import Method, Progress, StepOutput
from methods.parts.distributed import all_gather_objects, all_reduce_max, all_reduce_sum, average_gradients, rank, world_size
from methods.parts.norms import average_statistics
from pipeline.config import Resolved, RunConfig
from pipeline.evaluate.clusters import Clusters
from pipeline.ingest.photometric import finish_views
from pipeline.ingest.stream import BadSlot, Batch
from pipeline.runs import RunFolder
from pipeline.train import checkpoint
from pipeline.train.display import Screen
from pipeline.train.guards import Guards, TrainingStopped, check_finite
from pipeline.train.optim import prepare_step, scheduled_lr, scheduled_weight_decay

Report = Callable[[int, Mapping[str, float]], None]


@dataclass
class Position:
    """What a checkpoint holds beside the method and the optimizer."""

    step: int = 0  # completed optimizer steps
    best_knn: float = -1.0  # or the best `score`, where one is measured
    best_step: int = -1
    bad: dict[int, str] = field(default_factory=dict)  # id of every image that could not be decoded -> reason


@dataclass
class Trainer:
    """One worker of a run; the only one, unless there is a process group. Rank 0 measures, reports and saves for all.

    Args:
        online: maps the evaluation backbone to what is measured of it, such as `knn`, top-1 on held-out training images; None where
            nothing can be measured, and on other ranks. `score`, or else `knn`, chooses the best checkpoint.
        online_clusters: maps the method to where it puts some training images, or None if it has no clusters and on other ranks.
        report: takes `(step, metrics)`; the sink decides where they go.
        stop: asked after every step; True on any worker ends the run with a whole checkpoint.
    """

    config: RunConfig
    resolved: Resolved
    method: Method
    optimizer: Optimizer
    folder: RunFolder
    device: torch.device
    precision: torch.dtype
    display: Screen
    report: Report
    images: int  # of the whole source
    online: Callable[[torch.nn.Module], Mapping[str, float]] | None = None
    online_clusters: Callable[[Method], Clusters] | None = None
    stop: Callable[[], bool] = lambda: False
    position: Position = field(default_factory=Position)
    saved_step: int | None = None
    last_knn: float | None = None
    uploads: checkpoint.Uploads = field(default_factory=checkpoint.Uploads)
    measured: Mapping[str, float] = field(default_factory=dict)  # last

    def __post_init__(self) -> None:
        self.forward: nn.Module = self.method
        if world_size() > 1 and not self.config.train.deterministic:
            devices = None if self.device.type == "cpu" else [self.device]
            self.forward = DistributedDataParallel(self.method, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def run(self, batches: Iterator[Batch]) -> None:
        """Train until the last step, or until `stop`.

        Raises:
            TrainingStopped, checkpoint.DiskFull: as in `stretches`.
        """
        for _ in self.stretches(batches):
            pass

    def stretches(self, batches: Iterator[Batch]) -> Iterator[Mapping[str, float]]:
        """Train as `run` does, and pause wherever something is measured, with what was found; before the first step too.

        A caller that does not go on closes the generator; the batches are its own to close.

        Raises:
            TrainingStopped: a loss that is no number, or too many images that cannot be decoded.
            checkpoint.DiskFull: a checkpoint could not be written.
        """
        total, every = self.resolved.facts.total_steps, self.resolved.checkpoint_every
        guards = Guards(self.method, patience_steps=min(2 * self.resolved.facts.steps_per_epoch, total // 2))
        outputs: list[StepOutput] = []  # since the last point
        measures = bool(all_reduce_max(torch.tensor(int(bool(self.online or self.online_clusters)))))
        if self.position.step == 0:
            self.measure()
            self.measure_clusters(guards)
            yield self.measured
        self.method.train()
        for batch in batches:
            outputs.append(self.step(batch))
            stopping, bad = agreed(self.stop(), batch.bad)
            self.note_bad(bad)
            step = self.position.step
            save = step % every == 0 or step == total or stopping
            measure = measures and (step % self.resolved.knn_every == 0 or step == total)
            if save or measure or step % self.config.train.log_every == 0:
                metrics = self.flush(outputs)
                outputs = []
                for warning in guards.warnings(step, metrics):
                    self.display.say(f"[yellow]warning:[/yellow] {warning}")
                if save or measure:
                    average_statistics(self.method)
                improved = measure and bool(all_reduce_max(torch.tensor(int(self.measure()))))
                if measure:
                    self.measure_clusters(guards)
                if save or improved:
                    self.save(best=improved)
                if measure and not stopping:
                    yield self.measured
            else:
                self.display.update(step)
            if stopping:
                return

    def step(self, batch: Batch) -> StepOutput:
        """One optimizer step over one global batch."""
        config, facts = self.config.train, self.resolved.facts
        due = self.position.step + config.first_epoch * facts.steps_per_epoch
        if batch.step != due:
            raise RuntimeError(f"the stream gave the batch of step {batch.step}, but that of step {due} is due; please report this")
        start = Progress(step=self.position.step, total_steps=facts.total_steps, steps_per_epoch=facts.steps_per_epoch)
        progress = self.seeded(start, 0)  # the start of an epoch may draw too
        if progress.step % facts.steps_per_epoch == 0:
            self.method.start_epoch(progress)
        self.method.before_step(progress)
        learns = self.method.learns(progress)
        forward = self.forward if learns else self.method  # DDP waits for a backward pass after each of its forwards
        micro_outputs: list[StepOutput] = []
        for i, part in enumerate(batch.split(config.accumulation_steps)):
            progress = self.seeded(progress, i)
            views = finish_views(part, self.config.views, self.config.data.mean, self.config.data.std, self.device)
            with self.gradients_stay(unless=i == config.accumulation_steps - 1):
                mixed = torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not torch.float32)
                with mixed, torch.set_grad_enabled(learns):
                    masks = self.method.draw_masks(views, progress)
                    output = forward(views, progress, masks)
                if output.loss is not None:
                    (output.loss / config.accumulation_steps).backward()
                    output.loss = output.loss.detach()
            micro_outputs.append(output)
        if micro_outputs[-1].loss is not None:
            if self.forward is self.method:
                average_gradients(self.method.parameters())
            optim = self.config.optim
            norm = prepare_step(self.optimizer, self.resolved, progress.step, optim.clip_norm, optim.clip_scope)
            if norm is not None:
                micro_outputs[-1].metrics["gradient_norm"] = norm
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step([o.outputs for o in micro_outputs], progress)
        self.position.step += 1
        if self.position.step % facts.steps_per_epoch == 0:
            self.method.end_epoch(progress)
        return joined(micro_outputs)

    def gradients_stay(self, unless: bool) -> contextlib.AbstractContextManager[None]:
        """DDP averages gradients in the last micro-batch only."""
        ddp = isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if ddp and not unless else contextlib.nullcontext()  # type: ignore[union-attr,operator]

    def seeded(self, progress: Progress, micro_step: int) -> Progress:
        """Seed torch for drop path and masks, and a generator that all ranks share, from (seed, step, micro-step)."""
        key = (self.config.train.seed, progress.step, micro_step)
        torch.manual_seed(_seed(*key, f"rank {rank()}"))
        generator = torch.Generator().manual_seed(_seed(*key, "shared"))
        micro_steps = self.config.train.accumulation_steps
        return Progress(**{**vars(progress), "micro_step": micro_step, "micro_steps": micro_steps, "generator": generator})

    def flush(self, outputs: list[StepOutput]) -> dict[str, float]:
        """Means over the steps since the last point and over the workers; checked, shown and reported."""
        step = self.position.step
        losses = mean_over_workers([float(o.loss) for o in outputs if o.loss is not None])
        check_finite(losses, step - len(losses) + 1, self.saved_step)
        metrics = {"loss": sum(losses) / len(losses)} if losses else {}
        names = list(outputs[-1].metrics)
        every = [[float(o.metrics[name]) for o in outputs if name in o.metrics] for name in names]
        metrics |= dict(zip(names, mean_over_workers([sum(values) / len(values) for values in every]), strict=True))
        chance = self.method.chance_loss()
        if chance and "loss" in metrics:
            metrics["loss_chance"] = chance[0]
        metrics["lr"] = scheduled_lr(self.resolved, step - 1)
        if (decay := scheduled_weight_decay(self.resolved, step - 1)) is not None:
            metrics["weight_decay"] = decay
        self.display.update(step, loss=metrics.get("loss"))
        if self.display.images_per_s:  # it takes two steps to tell
            metrics["images_per_s"] = self.display.images_per_s
        metrics["bad_images"] = float(len(self.position.bad))
        self.report(step, metrics)
        return metrics

    def measure(self) -> bool:
        """Online kNN of the evaluation backbone, and the like. True if it is the best so far, on rank 0."""
        if self.online is None:
            return False
        self.measured = self.online(self.method.evaluation_backbone())
        self.method.train()
        step = self.position.step
        self.last_knn = self.measured.get("knn")
        self.display.update(step, knn=self.last_knn)
        self.folder.update(**{key: self.measured[key] for key in ("knn", "score") if key in self.measured})
        self.report(step, self.measured)
        score = self.measured.get("score", self.last_knn)
        if score is None or score <= self.position.best_knn or step == 0:
            return False
        self.position.best_knn, self.position.best_step = score, step
        return True

    def measure_clusters(self, guards: Guards) -> None:
        """Sizes of the clusters and their agreement with labels."""
        if self.online_clusters is None:
            return
        found = self.online_clusters(self.method)
        self.report(self.position.step, found.metrics())
        for warning in guards.cluster_warnings(self.position.step, found.sizes):
            self.display.say(f"[yellow]warning:[/yellow] {warning}")

    def state(self) -> checkpoint.State:
        """The whole state of the run, free of clocks and machine names. All workers ask together."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": vars(self.position),
            "threads": torch.get_num_threads(),
            "id_tables": {name: table.pieces() for name, table in self.method.id_tables().items()},
        }

    def restore(self, state: checkpoint.State) -> None:
        """The inverse of `state`."""
        self.method.load_state_dict(state["method"])
        for name, table in self.method.id_tables().items():
            table.load(state["id_tables"][name])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # the config is the truth: a new phase may have another weight decay
        self.position = Position(**state["position"])
        self.saved_step = self.position.step or None

    def save(self, best: bool = False) -> None:
        step = self.position.step
        if step == self.saved_step and not best:
            return
        state = self.state()
        if rank() == 0:
            self.uploads.wait()  # what is being sent must not be pruned
            checkpoint.save(self.folder.checkpoints, state, step=step, best=best, keep_every=self.config.train.keep_every)
            self.folder.keep(step=step, total_steps=self.resolved.facts.total_steps)
            self.uploads.begin(self.folder.path, step, self.config.train.keep_every)
        self.saved_step = step

    def note_bad(self, slots: Iterable[BadSlot]) -> None:
        """List images that could not be decoded; stop when there are too many."""
        new = [slot for slot in slots if slot.id not in self.position.bad]
        if not new:
            return
        self.position.bad |= {slot.id: slot.reason for slot in new}
        if rank() == 0:
            with open(self.folder.bad_images, "a") as file:
                file.writelines(json.dumps(vars(slot)) + "\n" for slot in new)
        count, images = len(self.position.bad), self.images
        if count > self.config.data.max_bad_fraction * images:
            raise TrainingStopped(
                f"{count} of {images} images cannot be decoded, more than data.max_bad_fraction={self.config.data.max_bad_fraction:g} "
                f"allows (first: {new[0].path}: {new[0].reason}); they are listed in {self.folder.bad_images}. "
                "Repair or remove them, or allow more"
            )


def agreed(stop: bool, bad: list[BadSlot]) -> tuple[bool, list[BadSlot]]:
    """What one worker knows, all know: whether to stop, and the images that could not be decoded."""
    if world_size() == 1:
        return stop, bad
    flags = all_reduce_sum(torch.tensor([int(stop), len(bad)]))
    return bool(flags[0]), [slot for part in all_gather_objects(bad) for slot in part] if flags[1] else []


def mean_over_workers(values: list[float]) -> list[float]:
    """Element by element; every worker brings as many."""
    if world_size() == 1:
        return values
    mean: list[float] = (all_reduce_sum(torch.tensor(values, dtype=torch.float64)) / world_size()).tolist()
    return mean


def joined(parts: list[StepOutput]) -> StepOutput:
    """One output for the step: mean loss and metrics of its micro-batches."""
    losses = [p.loss for p in parts if p.loss is not None]
    metrics: dict[str, Any] = {}
    for name in parts[-1].metrics:
        values = [torch.as_tensor(p.metrics[name], dtype=torch.float64) for p in parts if name in p.metrics]
        metrics[name] = torch.stack(values).mean()
    return StepOutput(loss=torch.stack(losses).mean() if losses else None, metrics=metrics)


def _seed(*key: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
