"""The training loop: device, precision, accumulation, clipping, optimizer, logging, checkpoints and online kNN, the same for
every method.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from methods.parts.contract import Method, Progress, StepOutput
from methods.parts.distributed import all_gather_objects, all_reduce_max, all_reduce_sum, average_gradients, rank, world_size
from methods.parts.hints import Hints
from methods.parts.norms import average_statistics
from pipeline import checkpoint
from pipeline.config import RunConfig
from pipeline.data.augment import augment_views
from pipeline.data.loader import Batch, DecodeFailure
from pipeline.evaluate.clusters import Clusters
from pipeline.resolve import Resolved
from pipeline.run_folder import RunFolder
from pipeline.train.health import HealthMonitor, TrainingAborted, check_finite
from pipeline.train.optim import prepare_step, scheduled_lr, scheduled_weight_decay
from pipeline.train.progress import ProgressReporter
from pipeline.train.sharding import Sharding

Report = Callable[[int, Mapping[str, float]], None]


@dataclass
class Position:
    """The part of a checkpoint beside the method and the optimizer."""

    step: int = 0  # completed optimizer steps
    best_knn: float = -1.0  # the best `score` if one is measured
    best_step: int = -1
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)  # path and reason of every image that could not be decoded, by id


@dataclass
class Trainer:
    """One worker of a run; the only one without a process group. Rank 0 measures, reports and saves for all.

    Args:
        online: returns the measurements of the evaluation backbone, such as `knn`, top-1 on held-out training images; None if nothing
            can be measured, and on other ranks. `score`, or else `knn`, chooses the best checkpoint.
        online_clusters: returns the method's clusters of some training images; None if it has no clusters, and on other ranks.
        report: records the metrics of a step.
        stop: called on every worker; True on any of them ends the run with a checkpoint.
        ask_every: steps between two calls of `stop` and between exchanges of bad images; `stop` may wait for all workers.
    """

    config: RunConfig
    resolved: Resolved
    method: Method
    optimizer: Optimizer
    folder: RunFolder
    device: torch.device
    precision: torch.dtype
    reporter: ProgressReporter
    report: Report
    images: int  # of the whole source
    sharding: Sharding | None = None  # of the method, with FSDP
    online: Callable[[torch.nn.Module], Mapping[str, float]] | None = None
    online_clusters: Callable[[Method], Clusters] | None = None
    stop: Callable[[], bool] = lambda: False
    ask_every: int = 1
    position: Position = field(default_factory=Position)
    saved_step: int | None = None  # of the last checkpoint, which is whole after `writer.wait`; the same on every rank
    last_knn: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)  # last

    def __post_init__(self) -> None:
        self.writer = checkpoint.CheckpointWriter(self.folder.checkpoints, self.config.train.keep_every)
        self.forward: nn.Module = self.method
        if world_size() > 1 and not self.config.train.deterministic and self.sharding is None:
            devices = None if self.device.type == "cpu" else [self.device]
            self.forward = DistributedDataParallel(self.method, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def run(self, batches: Iterator[Batch]) -> None:
        """Train until the last step, or until `stop`.

        Raises:
            TrainingAborted, checkpoint.DiskFull: as in `train_until_eval`.
        """
        try:
            for _ in self.train_until_eval(batches):
                pass
        finally:
            self.writer.wait()  # also before an error, whose message names the last good checkpoint

    @property
    def hints(self) -> Hints:
        """What the method's settings say of this run."""
        return self.config.method.hints(self.resolved.facts)

    def train_until_eval(self, batches: Iterator[Batch]) -> Iterator[Mapping[str, float]]:
        """Train as `run` does, and yield the metrics of every measurement, one before the first step included.

        A caller that stops early closes the generator, and the batches.

        Raises:
            TrainingAborted: a loss that is not finite, or too many images that cannot be decoded.
            checkpoint.DiskFull: a checkpoint could not be written.
        """
        total = self.resolved.facts.total_steps
        monitor = HealthMonitor(self.hints, patience_steps=min(2 * self.resolved.facts.steps_per_epoch, total // 2))
        outputs: list[StepOutput] = []  # since the last log
        bad: list[DecodeFailure] = []  # since the last exchange
        stopping = False
        measures = bool(all_reduce_max(torch.tensor(int(bool(self.online or self.online_clusters)))))
        if self.position.step == 0:
            if measures:
                self.measure(monitor)
            yield self.measured
        self.method.train()
        for batch in batches:
            outputs.append(self.step(batch))
            bad += batch.bad
            step = self.position.step
            save, measure = self.saves(step), measures and self.measures(step)
            if save or measure or step % self.ask_every == 0:
                stopping, found = exchange(self.stop(), bad)
                self.record_bad_images(found)
                bad = []
                save = save or stopping
            if save or measure or step % self.config.train.log_every == 0:
                metrics = self.flush(outputs)
                outputs = []
                for warning in monitor.warnings(step, metrics):
                    self.reporter.info(f"[yellow]warning:[/yellow] {warning}")
                if save or measure:
                    average_statistics(self.method)
                improved = measure and bool(all_reduce_max(torch.tensor(int(self.measure(monitor)))))
                if save or improved:
                    self.save(best=improved)
                if measure and not stopping:
                    yield self.measured
            else:
                self.reporter.update(step)
            if stopping:
                return

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` completed steps."""
        return step % self.resolved.checkpoint_every == 0 or step == self.resolved.facts.total_steps

    def measures(self, step: int) -> bool:
        """Return whether the online evaluation is due after `step` completed steps."""
        return step % self.resolved.knn_every == 0 or step == self.resolved.facts.total_steps

    def step(self, batch: Batch) -> StepOutput:
        """Make one optimizer step over one global batch."""
        config, facts = self.config.train, self.resolved.facts
        due = self.position.step + config.first_epoch * facts.steps_per_epoch
        if batch.step != due:
            raise RuntimeError(f"the loader gave the batch of step {batch.step}, but that of step {due} is due; please report this")
        done = self.position.step + 1
        start = Progress(
            step=self.position.step,
            total_steps=facts.total_steps,
            steps_per_epoch=facts.steps_per_epoch,
            reports=done % config.log_every == 0 or self.saves(done) or self.measures(done),
        )
        progress = self.seeded(start, 0)  # `start_epoch` may draw random numbers
        if progress.step % facts.steps_per_epoch == 0:
            self.method.start_epoch(progress)
        self.method.before_step(progress)
        has_loss = self.method.has_loss(progress)
        forward = self.forward if has_loss else self.method  # DDP expects a backward pass after each forward pass
        micro_outputs: list[StepOutput] = []
        for i, part in enumerate(batch.split(config.accumulation_steps)):
            progress = self.seeded(progress, i)
            views = augment_views(part, self.config.views, self.config.data.mean, self.config.data.std, self.device)
            with self.maybe_no_sync(unless=i == config.accumulation_steps - 1):
                mixed = torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not torch.float32)
                with mixed, torch.set_grad_enabled(has_loss):
                    masks = self.method.draw_masks(views, progress)
                    output = forward(views, progress, masks)
                if output.loss is not None:
                    (output.loss / config.accumulation_steps).backward()
                    output.loss = output.loss.detach()
            micro_outputs.append(output)
        if micro_outputs[-1].loss is not None:
            if config.deterministic:
                average_gradients(self.method.parameters())
            optim = self.config.optim
            norm = prepare_step(self.optimizer, self.resolved, progress.step, optim.clip_norm, optim.clip_scope)
            if norm is not None and progress.reports:
                micro_outputs[-1].metrics["gradient_norm"] = norm
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step([o.outputs for o in micro_outputs], progress)
        self.position.step += 1
        if self.position.step % facts.steps_per_epoch == 0:
            self.method.end_epoch(progress)
        return merge_outputs(micro_outputs)

    def maybe_no_sync(self, unless: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context in which DDP averages gradients only if `unless`."""
        ddp = isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if ddp and not unless else contextlib.nullcontext()  # type: ignore[union-attr,operator]

    def seeded(self, progress: Progress, micro_step: int) -> Progress:
        """Seed torch, for drop path and masks, and a generator that is the same on all ranks, from (seed, step, micro-step)."""
        key = (self.config.train.seed, progress.step, micro_step)
        torch.manual_seed(_seed(*key, f"rank {rank()}"))
        generator = torch.Generator().manual_seed(_seed(*key, "shared"))
        micro_steps = self.config.train.accumulation_steps
        return Progress(**{**vars(progress), "micro_step": micro_step, "micro_steps": micro_steps, "generator": generator})

    def flush(self, outputs: list[StepOutput]) -> dict[str, float]:
        """Report the mean loss of the steps since the last log, and the mean of their metrics, over all workers."""
        step = self.position.step
        meters = [output.metrics for output in outputs if output.metrics]
        names = list(meters[-1]) if meters else []
        values: list[Tensor | float] = [o.loss for o in outputs if o.loss is not None]
        count = len(values)
        values += [m[name] for name in names for m in meters if name in m]
        numbers = mean_over_workers(to_host(values))
        losses = numbers[:count]
        check_finite(losses, step - len(losses) + 1, self.saved_step)
        metrics = {"loss": sum(losses) / len(losses)} if losses else {}
        left = iter(numbers[count:])
        for name in names:
            found = [next(left) for m in meters if name in m]
            metrics[name] = sum(found) / len(found)
        chance = self.hints.chance_loss
        if chance and "loss" in metrics:
            metrics["loss_chance"] = chance[0]
        metrics["lr"] = scheduled_lr(self.resolved, step - 1)
        if (decay := scheduled_weight_decay(self.resolved, step - 1)) is not None:
            metrics["weight_decay"] = decay
        self.reporter.update(step, loss=metrics.get("loss"))
        if self.reporter.images_per_s:  # 0 before the second step
            metrics["images_per_s"] = self.reporter.images_per_s
        metrics["bad_images"] = float(len(self.position.bad))
        self.report(step, metrics)
        return metrics

    def measure(self, monitor: HealthMonitor | None = None) -> bool:
        """Evaluate the evaluation backbone online, and the clusters if there is a monitor. All workers call it together.

        Returns:
            Whether the backbone is the best so far, on rank 0.
        """
        method = self.method if self.sharding is None else self.sharding.whole_method()
        best = method is not None and self.measure_backbone(method)
        if method is not None and monitor is not None:
            self.measure_clusters(method, monitor)
        return best

    def measure_backbone(self, method: Method) -> bool:
        if self.online is None:
            return False
        self.measured = self.online(method.evaluation_backbone())
        method.train()
        step = self.position.step
        self.last_knn = self.measured.get("knn")
        self.reporter.update(step, knn=self.last_knn)
        self.folder.update(**{key: self.measured[key] for key in ("knn", "score") if key in self.measured})
        self.report(step, self.measured)
        score = self.measured.get("score", self.last_knn)
        if score is None or score <= self.position.best_knn or step == 0:
            return False
        self.position.best_knn, self.position.best_step = score, step
        return True

    def measure_clusters(self, method: Method, monitor: HealthMonitor) -> None:
        """Report the sizes of the clusters and their agreement with labels, and warn of degenerate ones."""
        if self.online_clusters is None:
            return
        found = self.online_clusters(method)
        self.report(self.position.step, found.metrics())
        for warning in monitor.cluster_warnings(self.position.step, found.sizes):
            self.reporter.info(f"[yellow]warning:[/yellow] {warning}")

    def state(self) -> checkpoint.State:
        """Return the whole state of the run, without times and machine names; memory banks, and sharded tensors, on rank 0 only.

        Tensors that are not sharded are not copied, so the next step changes them; memory banks are copies. All workers call it together.
        """
        state = {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": vars(self.position),
            "threads": torch.get_num_threads(),
            "id_tables": {name: table.pieces() for name, table in self.method.memory_banks().items()},
        }
        return state if self.sharding is None else self.sharding.whole_state(state)

    def restore(self, state: checkpoint.State) -> None:
        """Load a `state`."""
        if self.sharding is not None:
            state = self.sharding.own_state(state, self.optimizer)
        restore_method(self.method, state)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # settings of the config, which may differ in a new phase
        self.position = Position(**state["position"])
        self.saved_step = self.position.step or None

    def save(self, best: bool = False) -> None:
        """Start to write a checkpoint, unless this step has one. It is whole after `writer.wait`. All workers call it together.

        Raises:
            checkpoint.DiskFull: the earlier checkpoint could not be written.
        """
        step = self.position.step
        if step == self.saved_step and not best:
            return
        self.writer.wait()  # before memory banks are gathered, so that memory holds one copy of the state
        state = self.state()
        if rank() == 0:
            note = partial(
                self.folder.record_checkpoint, step=step, total_steps=self.resolved.facts.total_steps, bad_images=self.bad_list()
            )
            self.writer.save(state, step=step, best=best, copied=self.sharding is not None, then=note)
        self.saved_step = step

    def bad_list(self) -> bytes:
        """Return a line of JSON for every image that could not be decoded."""
        return "".join(json.dumps(vars(DecodeFailure(i, *why))) + "\n" for i, why in self.position.bad.items()).encode()

    def record_bad_images(self, slots: Iterable[DecodeFailure]) -> None:
        """Count images that could not be decoded. The next checkpoint lists them in the run's folder.

        Raises:
            TrainingAborted: there are more than `data.max_bad_fraction`.
        """
        new = [slot for slot in slots if slot.id not in self.position.bad]
        if not new:
            return
        self.position.bad |= {slot.id: (slot.path, slot.reason) for slot in new}
        count, images = len(self.position.bad), self.images
        if count > self.config.data.max_bad_fraction * images:
            if rank() == 0:
                self.folder.bad_images.write(self.bad_list())
            raise TrainingAborted(
                f"{count} of {images} images cannot be decoded, more than data.max_bad_fraction={self.config.data.max_bad_fraction:g} "
                f"allows (first: {new[0].path}: {new[0].reason}); they are listed in {self.folder.bad_images}. "
                "Repair or remove them, or allow more"
            )


def restore_method(method: Method, state: checkpoint.State) -> None:
    """Load a method and its memory banks from a checkpoint."""
    method.load_state_dict(state["method"])
    for name, table in method.memory_banks().items():
        table.load(state["id_tables"][name])


def exchange(stop: bool, bad: list[DecodeFailure]) -> tuple[bool, list[DecodeFailure]]:
    """Exchange among all workers whether to stop, and the images that could not be decoded."""
    if world_size() == 1:
        return stop, bad
    flags = all_reduce_sum(torch.tensor([int(stop), len(bad)]))
    return bool(flags[0]), [slot for part in all_gather_objects(bad) for slot in part] if flags[1] else []


def to_host(values: list[Tensor | float]) -> list[float]:
    """Return scalars as floats; those on a device are copied together."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    numbers = iter(torch.stack([tensor.detach().float() for tensor in tensors]).tolist() if tensors else [])
    return [next(numbers) if isinstance(value, Tensor) else float(value) for value in values]


def mean_over_workers(values: list[float]) -> list[float]:
    """Return the mean over workers of every element; each worker gives as many."""
    if world_size() == 1:
        return values
    mean: list[float] = (all_reduce_sum(torch.tensor(values, dtype=torch.float64)) / world_size()).tolist()
    return mean


def merge_outputs(parts: list[StepOutput]) -> StepOutput:
    """Return the mean loss and metrics of the micro-batches of a step."""
    if len(parts) == 1:
        return StepOutput(loss=parts[0].loss, metrics=parts[0].metrics)
    losses = [p.loss for p in parts if p.loss is not None]
    metrics: dict[str, Any] = {}
    for name in parts[-1].metrics:
        values = [p.metrics[name] for p in parts if name in p.metrics]
        metrics[name] = sum(values[1:], start=values[0]) / len(values)
    return StepOutput(loss=torch.stack(losses).mean() if losses else None, metrics=metrics)


def _seed(*key: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
