"""Numbers derived from settings and the size of the data: learning rates, steps, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from methods.parts.contract import RunFacts, find
from methods.parts.errors import ConfigError, require
from pipeline.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The numbers derived from a config and the size of the data. All counts are per run or per step."""

    facts: RunFacts
    lr: float
    start_lr: float
    final_lr: float
    warmup_steps: int
    zero_lr_steps: int = 0
    warmup_reaches_base: bool = True
    milestones: tuple[float, ...] | None = None  # None = cosine
    weight_decays: tuple[float, float] | None = None  # at the first step, and after the last; None = constant
    schedule_stretch: float = 1.0  # of the cosines, in runs
    chunk: int  # images of one shard in one global batch
    window: int  # images one task cuts: a whole number of chunks
    checkpoint_every: int
    knn_every: int

    @property
    def cosine_steps(self) -> int:
        """Return the length of the cosine schedules in steps, warm-up included."""
        return int(self.schedule_stretch * self.facts.total_steps)


def resolve(config: RunConfig, num_images: int | None, num_ids: int | None = None, left_out: Callable[[], str] = str) -> Resolved:
    """Derive the numbers of a run over `num_images` training images; None = a source without end.

    Args:
        num_ids: images of the whole source, held-out ones included; None = nothing is held out.
        left_out: returns how many images do not count, for the message about too few images.

    Raises:
        ConfigError: the batch is larger than the data or no multiple of the shards, or `train.steps_per_epoch` is missing or
            not supported by the method.
    """
    batch, num_shards = config.train.global_batch_size, config.data.num_shards
    steps_per_epoch = _steps_per_epoch(config, num_images)
    if num_images is not None and batch > num_images:
        remedy = f"use {max(num_shards, num_images // num_shards * num_shards)} or fewer, or smaller data.num_shards"
        images = f"{num_images} training image{'s' * (num_images != 1)}"
        raise ConfigError(f"train.global_batch_size={batch}: larger than the {images}{left_out()}; {remedy}")
    if batch % num_shards:
        low = batch // num_shards * num_shards
        near = f"{low} or {low + num_shards}" if low else str(num_shards)
        raise ConfigError(
            f"train.global_batch_size={batch}: not a multiple of data.num_shards={num_shards}; use {near}, or another number of shards"
        )
    low, high = config.train.worker_range
    if high and not any(low <= w <= high for w in divisors(num_shards)):
        near = ", ".join(str(w) for w in divisors(num_shards))
        raise ConfigError(
            f"train.workers={config.train.workers}: does not divide data.num_shards={num_shards}; use one of {near}, or others"
        )
    chunk = batch // num_shards
    require(
        chunk % config.train.accumulation_steps == 0,
        "train.accumulation_steps",
        config.train.accumulation_steps,
        f"does not divide the {chunk} images that each of the {num_shards} shards gives to a batch",
    )
    total = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    scale = {"none": 1.0, "linear": batch / 256, "sqrt": math.sqrt(batch / 256)}[config.optim.lr_rule]
    largest = max((g.size for g in config.views.values() if g.count), default=224)
    wanted = config.data.images_per_task or (128 if largest > 64 else 512)
    return Resolved(
        facts=RunFacts(
            global_batch_size=batch,
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            num_images=num_images,
            num_ids=num_images if num_ids is None else num_ids,
            trained=config.train.first_epoch > 0 or config.backbone.init is not None,
        ),
        lr=config.optim.base_lr * scale,
        start_lr=config.optim.warmup_start_lr * scale,
        final_lr=config.optim.final_lr * scale,
        warmup_steps=min(total, round(config.optim.warmup_epochs * steps_per_epoch)),
        # a continued run has its idle passes behind it
        zero_lr_steps=min(total, max(0, round((config.optim.zero_lr_epochs - config.train.first_epoch) * steps_per_epoch))),
        warmup_reaches_base=config.optim.warmup_reaches_base,
        milestones=config.optim.milestones if config.optim.schedule == "steps" else None,
        weight_decays=None if config.optim.final_weight_decay is None else (config.optim.weight_decay, config.optim.final_weight_decay),
        schedule_stretch=config.optim.schedule_stretch,
        chunk=chunk,
        window=chunk * max(1, min(steps_per_epoch, round(wanted / chunk))),
        checkpoint_every=config.train.checkpoint_every or min(500, steps_per_epoch),
        knn_every=config.evaluate.knn_every or max(1, total // 10),
    )


def _steps_per_epoch(config: RunConfig, num_images: int | None) -> int:
    given = config.train.steps_per_epoch
    if num_images is None:
        entry = find(config.method)
        if entry.method.needs_full_epochs:
            words = f"has no end, but {entry.name} keeps something for every image; use a folder, Parquet or tars"
            raise ConfigError(f"data.path={config.data.path}: {words}")
        require(
            given is not None,
            "train.steps_per_epoch",
            given,
            f"{config.data.path} has no end, so it must be given: the unit of schedules in epochs, e.g. 1000",
        )
        return int(given or 0)
    one_pass = num_images // config.train.global_batch_size
    if given is not None and given != one_pass and (entry := find(config.method)).method.needs_full_epochs:
        remedy = f"use {one_pass}, or leave it out"
        raise ConfigError(f"train.steps_per_epoch={given}: {entry.name} works in whole passes over the images; {remedy}")
    return given or one_pass


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]
