"""Checks before a run: open the data, resolve the numbers, build the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from methods.parts.backbones import build_backbone
from methods.parts.contract import Method, RunFacts, find, registered
from methods.parts.errors import ConfigError, require
from methods.parts.vit import ViT, enable_gradient_checkpointing, require_whole_patches, vits
from pipeline.config import RunConfig, from_yaml
from pipeline.data.decode import BadImage, decode
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import TrainLoader
from pipeline.data.sources.base import absolute_source, open_source, open_test
from pipeline.resolve import Resolved, resolve
from pipeline.run_folder import RunFolder

LOOKED_AT = 200  # images that are decoded to say why there are too few; more would keep the answer waiting


@dataclasses.dataclass(frozen=True)
class RunContext:
    """A run that has passed all checks: its config, loader, resolved numbers and method."""

    config: RunConfig
    loader: TrainLoader
    resolved: Resolved
    method: Method

    @property
    def dataset(self) -> ImageDataset:
        return self.loader.dataset


def prepare(config: RunConfig, start_from: Callable[[nn.Module], None] | None = None, dataset: ImageDataset | None = None) -> RunContext:
    """Open the data, resolve the numbers and build the method.

    Args:
        start_from: loads weights into the new backbone.
        dataset: the data if it is open already.

    Raises:
        ConfigError: a setting, path or name that cannot work.
    """
    config = with_absolute_paths(config)
    dataset = dataset or open_source(config.data)
    if config.evaluate.path is not None:
        open_test(config.data, config.evaluate.path)
    training = dataset.num_training(config.data.held_out)
    resolved = resolve(config, training, None if training is None else len(dataset), lambda: _left_out(dataset))
    sampler = dataset.make_sampler(
        seed=config.train.seed,
        held_out=config.data.held_out,
        global_batch=config.train.global_batch_size,
        num_shards=config.data.num_shards,
        images_per_task=resolved.window,
        steps_per_epoch=resolved.facts.steps_per_epoch,
    )
    facts, data = resolved.facts, config.data
    config = dataclasses.replace(config, method=config.method.settled(facts))
    loader = TrainLoader(
        dataset,
        sampler,
        config.views,
        config.train.seed,
        facts.total_steps,
        step_offset=config.train.first_epoch * facts.steps_per_epoch,
        normalisation=(data.mean, data.std) if data.augment_on == "tasks" else None,
        buffer_bytes=data.buffer_bytes,
    )
    return RunContext(config, loader, resolved, build_method(config, facts, start_from))


def _left_out(dataset: ImageDataset) -> str:
    """Return in words how many files are no images, and how many of the first images cannot be decoded; empty if none."""
    tried = range(len(dataset))[:LOOKED_AT]
    bad = 0
    for sample in dataset.read(tried):
        try:
            decode(sample.image)
        except BadImage:
            bad += 1
    first = "the first " if len(tried) < len(dataset) else ""
    others = len(dataset.skipped)
    counts = {f"of {first}{len(tried)} images {bad} cannot be read": bad, f"other files that are no images: {others}": others}
    text = "; ".join(sentence for sentence, count in counts.items() if count)
    return f" ({text})" if text else ""


def prepare_resume(folder: RunFolder, start_from: Callable[[nn.Module], None] | None = None) -> RunContext:
    """Prepare a run that is resumed, with its config and its images.

    Raises:
        ConfigError: as `prepare`; or the images have changed.
    """
    context = prepare(from_yaml(folder.config_text()), start_from)
    if folder.state().get("fingerprint") not in (None, context.dataset.fingerprint):
        raise ConfigError(
            f"data.path={context.config.data.path}: the images have changed since the run began; restore them, or use continue"
        )
    return context


def build_method(config: RunConfig, facts: RunFacts, start_from: Callable[[nn.Module], None] | None = None) -> Method:
    """Return the method with a newly initialised backbone; the same seed gives the same weights.

    Args:
        start_from: loads weights into the backbone before the method is built, which may copy it.
    """
    entry = find(config.method)
    torch.manual_seed(config.train.seed)
    backbone = build_backbone(config.backbone)
    for name, group in config.views.items():
        if group.count:
            require_whole_patches(backbone, f"views.{name}.size", group.size)
    if config.evaluate.size is not None:
        require_whole_patches(backbone, "evaluate.size", config.evaluate.size)
    if config.train.gradient_checkpointing:
        enable_gradient_checkpointing(backbone)  # also in copies that the method makes
    if config.train.compile:
        vits(backbone, "train.compile")  # compiled in each worker, because pickling drops compiled code
    if start_from is not None:
        start_from(backbone)
    method: Method = entry.method(config.method.settled(facts), backbone, facts)  # type: ignore[call-arg]
    if config.train.accumulation_steps > 1 and method.whole_batch_remedy:
        raise ConfigError(
            f"train.accumulation_steps={config.train.accumulation_steps}: {entry.name} needs the whole batch at once; "
            f"use 1 ({method.whole_batch_remedy})"
        )
    if config.train.strategy == "fsdp":
        require_shardable(config, method)
    return method.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def require_shardable(config: RunConfig, method: Method) -> None:
    """Check that FSDP can train the method; one worker has nothing to shard, but the same config must work on several.

    Raises:
        ConfigError: the method, its backbone or the optimizer needs whole tensors.
    """
    entry, key = find(config.method), "train.strategy"
    names = ", ".join(name for name, other in registered().items() if other.method.shards)
    require(method.shards, key, "fsdp", f"{entry.name} needs whole weights on every worker; use ddp, or one of {names}")
    vit = any(isinstance(module, ViT) for module in method.modules())
    require(vit, key, "fsdp", f"shards the blocks of a ViT, and {config.backbone.name} has none; use ddp")
    remedy = f"optim.name={config.optim.name} needs the norms of whole tensors; use ddp, or optim.name=adamw"
    require(config.optim.name in ("adamw", "sgd"), key, "fsdp", remedy)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with absolute paths, because workers have another current folder."""
    data = dataclasses.replace(config.data, path=absolute_source(config.data.path))
    path = config.evaluate.path
    evaluate = dataclasses.replace(config.evaluate, path=path and absolute_source(path))
    return dataclasses.replace(config, data=data, evaluate=evaluate)


def untrained(config: RunConfig, resolved: Resolved) -> nn.Module:
    """Return the randomly initialised backbone of the run's seed."""
    return build_method(config, resolved.facts).evaluation_backbone()
