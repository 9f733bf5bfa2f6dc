"""Settings of a run: frozen dataclasses, overrides by dotted name, YAML. `pipeline.resolve` derives numbers from them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from methods.parts.backbones import BackboneConfig
from methods.parts.contract import MethodConfig, find, to_dict
from methods.parts.errors import RENAMED, require, unknown_key
from methods.parts.fields import SearchRange, at_least, below_one, check_limits, fraction, positive
from methods.parts.views import ROLES_BY_NAME, ViewsConfig

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of the images, and how they are loaded."""

    #: folder, Parquet or tars, local or s3:// or gs://; hf://datasets/OWNER/NAME; cifar10; "patches[:pixels=32,per_photo=320,seed=0]";
    #: stream:FILE.py:FUNCTION, a Python function that yields the bytes of images without end
    path: str = "patches"
    image_column: str = "image"  # Parquet: the column of encoded bytes
    label_column: str = "label"  # Parquet: the column of labels; absent is fine
    held_out: float = below_one(0.1)  # fraction of labelled images kept from training for the online kNN, at most 5,000; 0 without labels
    max_bad_fraction: float = fraction(0.01)  # stop when a larger fraction of the images cannot be decoded
    mean: Triple = (0.485, 0.456, 0.406)  # normalisation, in [0, 1]
    std: Triple = (0.229, 0.224, 0.225)
    num_shards: int = at_least(1, 8)  # a global batch has equally many images of each; worker counts that divide it see the same batches
    images_per_task: int | None = at_least(1, None)  # images cut by one Ray Data task; None = 512 small or 128 large ones
    #: where colour, blur and normalisation are done: on the training device, or by the Ray Data tasks, which then send four times the bytes
    augment_on: Literal["device", "tasks"] = "device"
    #: bytes of views in Ray's object stores, ready or in flight; None = as much as these hold: 30 % of the memory. Tasks begin while
    #: their views are less than half of it
    buffer_bytes: int | None = at_least(2**26, None)

    def __post_init__(self) -> None:
        check_limits(self, "data.")
        require(self.augment_on in ("device", "tasks"), "data.augment_on", self.augment_on, "use device, or tasks (called workers before)")
        require(bool(self.path), "data.path", self.path, "give a folder, Parquet or tar files, a URI, or patches")
        require(all(s > 0 for s in self.std), "data.std", self.std, "use three positive numbers")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedules. The learning rate changes with every step: linear warm-up, then cosine or steps."""

    name: Literal["larc", "lars", "lars-classic", "sgd", "adamw"] = "larc"
    base_lr: float = positive(0.6, SearchRange(around=4, scale="log", reason="four times less and more than the recipe's"))
    lr_rule: Literal["none", "linear", "sqrt"] = "none"  # none: base_lr is the rate; else times (batch / 256) or its root
    zero_lr_epochs: float = at_least(0, 0.0)  # epochs at rate 0 before the warm-up begins, e.g. 1 where the first epoch has no loss
    warmup_epochs: float = at_least(0, 0.0, SearchRange(scale="choice", choices=(0, 0.5, 1, 5, 10), reason="longer for larger rates"))
    warmup_reaches_base: bool = True  # the last step of the warm-up has the base rate; False: the first step after it
    warmup_start_lr: float = 0.0  # scaled by lr_rule like base_lr
    final_lr: float = 0.0  # scaled likewise
    schedule: Literal["cosine", "steps"] = "cosine"
    #: length of the cosines of rate and weight decay, in runs; 1.25: training stops at 80 % of them
    schedule_stretch: float = at_least(1, 1.0)
    milestones: tuple[float, ...] = (0.6, 0.8)  # schedule steps: at these fractions of the run the rate falls to a tenth
    weight_decay: float = at_least(0, 1e-6, SearchRange(around=10, scale="log", reason="ten times less and more than the recipe's"))
    final_weight_decay: float | None = at_least(0, None)  # a cosine from weight_decay to it over the whole run; None = constant
    momentum: float = below_one(0.9)  # SGD, LARC, both LARS
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    trust_coefficient: float = 0.001  # LARC, both LARS
    clip_norm: float | None = positive(None)  # largest norm of the gradient; None = no clipping
    #: the norm of all gradients together, of each module (backbone, head) by itself (DINOv2), or of each parameter tensor (DINO)
    clip_scope: Literal["joint", "module", "tensor"] = "joint"

    def __post_init__(self) -> None:
        check_limits(self, "optim.")
        rising = all(0 < a < 1 for a in self.milestones) and list(self.milestones) == sorted(self.milestones)
        require(rising, "optim.milestones", self.milestones, "use rising fractions of the run, e.g. 0.6 0.8")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch size, workers, precision and checkpoints."""

    #: images per optimizer step over all workers
    global_batch_size: int = at_least(2, 256, SearchRange(scale="choice", choices=(64, 128, 256, 512), reason="rate by optim.lr_rule"))
    accumulation_steps: int = at_least(1, 1)  # micro-batches per optimizer step
    epochs: float = positive(100)  # passes over the training images
    steps: int | None = at_least(1, None)  # optimizer steps; given, it overrides epochs
    steps_per_epoch: int | None = at_least(1, None)  # unit of every length in epochs; None = one pass over the images; a stream: needs it
    #: 0 = in this process; N = N workers under Ray Train; LOW:HIGH = as many as fit. They must divide data.num_shards
    workers: int | str = 0
    #: ddp: every worker holds all weights; fsdp: its share of weights, gradients, optimizer state and teacher (methods of ViTs)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    accelerator: Literal["auto", "gpu", "cpu"] = "auto"  # of each worker; auto: a GPU if the cluster has one now, gpu: wait for one
    seed: int = 0
    first_epoch: tyro.conf.Suppress[int] = 0  # passes that an earlier phase has behind it; `continue` sets it
    #: bf16: autocast; auto: bf16 where the hardware multiplies it natively, else float32. float32 is IEEE everywhere, TF32 is never used
    precision: Literal["auto", "float32", "bf16"] = "auto"
    threads: int | None = at_least(1, None)  # torch threads of a worker; None = its share of the machine's cores, alone all but one
    gradient_checkpointing: bool = False  # ViTs: blocks keep their inputs only and are computed again in the backward pass
    compile: bool = False  # ViTs: torch.compile of the blocks; needs a C++ compiler, pays off in long runs on a GPU
    deterministic: bool = False  # on CPUs: bit-identical after a resume; pins the thread count
    checkpoint_every: int | None = at_least(1, None)  # steps; None = once an epoch, at least every 500 steps
    keep_every: int | None = at_least(1, None)  # also keep the checkpoint of every n-th step
    log_every: int = at_least(1, 10)  # steps between points in MLflow
    max_restarts: int = at_least(0, 3)  # losses of workers in a row without a new checkpoint, then the run gives up
    resource_timeout_s: float = at_least(0, 900.0)  # how long to wait for a cluster to grow, s
    progress_timeout_s: float = positive(1800.0)  # a run without a step for this time is stopped, s

    def __post_init__(self) -> None:
        check_limits(self, "train.")
        low, high = self.worker_range
        require(0 <= low <= high and (low > 0 or high == 0), "train.workers", self.workers, "use 0, a number, or a range such as 2:8")
        ordered = self.strategy == "ddp" or not self.deterministic
        require(ordered, "train.strategy", self.strategy, "sums gradients in an order of its own; use ddp with train.deterministic=True")

    @property
    def worker_range(self) -> tuple[int, int]:
        """Return the smallest and the largest number of workers."""
        parts = str(self.workers).split(":")
        require(len(parts) in (1, 2) and all(p.isdigit() for p in parts), "train.workers", self.workers, "use a number or LOW:HIGH")
        return int(parts[0]), int(parts[-1])


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Online and final kNN. Checkpoints and settings are chosen on held-out training images; the test split is read once, at the end."""

    path: str | None = None  # test images; None = the source's own test split, else the held-out images
    knn_every: int | None = at_least(1, None)  # steps between online kNN figures; None = about ten in a run
    #: what a search ranks runs by, measured like the online kNN: top-1 by kNN or by a linear probe, or without labels RankMe
    score: Literal["knn", "linear", "rankme"] | None = None
    knn_k: int = at_least(1, 20)
    knn_temperature: float = positive(0.07)
    knn_bank: int = at_least(1, 10_000)  # at most this many labelled training images vote in the final kNN
    online_bank: int = at_least(1, 4_000)  # and in the online kNN
    knn_queries: int = at_least(1, 2_000)  # at most this many held-out images are asked
    test_images: int = at_least(1, 10_000)  # at most this many images of the test split are asked
    lowshot_images: tuple[int, ...] = (1, 2, 5)  # images of each class that a low-shot classifier learns from
    lowshot_draws: int = at_least(1, 5)  # random choices of them
    size: int | None = None  # side of an evaluated image, pixels; None = that of the largest crop

    def __post_init__(self) -> None:
        check_limits(self, "evaluate.")
        few = self.lowshot_images
        require(bool(few) and min(few) >= 1, "evaluate.lowshot_images", few, "use numbers of 1 or more, e.g. 1 2 5")


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """MLflow."""

    uri: str | None = None  # tracking server; None = a SQLite file in the runs folder
    experiment: str = "manyviews"
    model_name: str | None = None  # name in the registry; None = the recipe's name
    register: bool = True  # register the backbone at the end


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run. Derived values come from `resolve`."""

    recipe: tyro.conf.Suppress[str] = ""  # the recipe this began as
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=dict)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    @property
    def evaluation_size(self) -> int:
        """Return the side of an evaluated image, pixels."""
        return self.evaluate.size or max(group.size for group in self.views.values() if group.count)

    def __post_init__(self) -> None:
        require(isinstance(self.method, MethodConfig), "method", self.method, "use a method's config")
        small = [n for n in self.views if self.views[n].count]
        require(not self.views or bool(small), "views", list(self.views), "give at least one group a count of 1 or more")


# ---------------------------------------------------------------------------- overrides by dotted name


def override(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return a copy with settings changed by dotted name. They are validated after all are changed.

    `override(config, {"method.temperature": 0.2, "views.local.count": 4})`

    Raises:
        ConfigError: an unknown key (the message gives the full path and the nearest names) or a value out of range.
    """
    known = flatten(config)
    changes = {key: value for given, value in changes.items() for key in keys_meant(config, given)}
    for key in changes:
        if key not in known:
            raise unknown_key(key, known)
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return length_given(_apply(config, tree), set(changes))


def keys_meant(config: RunConfig, key: str) -> list[str]:
    """Return the settings that a dotted name stands for. `views.global.KEY` and `views.local.KEY` work in every recipe.

    Where no group has that name, they are the groups with the role `local`, and all others. The number of crops is each group's own.
    """
    group, _, leaf = key.removeprefix("views.").partition(".")
    if not key.startswith("views.") or group in config.views or group not in ("global", "local"):
        return [key]
    meant = [f"views.{name}.{leaf}" for name, views in config.views.items() if (views.role == "local") == (group == "local")]
    return meant if meant and (leaf != "count" or len(meant) == 1) else [key]


def length_given(config: RunConfig, given: set[str]) -> RunConfig:
    """Return the config without `train.steps` if `train.epochs` was given alone."""
    if "train.epochs" in given and "train.steps" not in given:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=None))
    return config


def _apply(value: Any, tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if isinstance(value, dict):
        return {k: _apply(v, tree[k]) if k in tree else v for k, v in value.items()}
    return dataclasses.replace(value, **{k: _apply(getattr(value, k), sub) for k, sub in tree.items()})


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its dotted name, in order."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", config)
    return flat


# ---------------------------------------------------------------------------- YAML


def to_yaml(config: RunConfig) -> str:
    """Return the whole config as YAML; the method includes its registry name."""
    tree = dataclasses.asdict(config) | {"method": to_dict(config.method)}
    text: str = yaml.safe_dump(_plain(tree), sort_keys=False)
    return text


def from_yaml(text: str) -> RunConfig:
    """Parse the result of `to_yaml`, of earlier versions too.

    Raises:
        ConfigError: an unknown key or a method that is not installed.
    """
    tree = yaml.safe_load(text)
    for old, new in RENAMED.items():
        (section, key), (_, name) = old.split("."), new.split(".")
        if key in tree.get(section, {}):
            tree[section][name] = tree[section].pop(key)
    if tree.get("data", {}).get("augment_on") == "workers":  # its name before
        tree["data"]["augment_on"] = "tasks"
    for name, group in tree.get("views", {}).items():
        group.setdefault("role", ROLES_BY_NAME.get(name, "global"))
    method = dict(tree.pop("method"))
    entry = find(method.pop("name"))
    config: RunConfig = _build(RunConfig, tree, "")
    return dataclasses.replace(config, method=_build(entry.config, method, "method."))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _build(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise unknown_key(path + key, [path + k for k in hints])
        return kind(**{k: _build(hints[k], v, f"{path}{k}.") for k, v in value.items()})
    if origin is dict:
        return {k: _build(arguments[1], v, f"{path}{k}.") for k, v in value.items()}
    if origin is tuple and value is not None:
        return tuple(value)
    if origin in (typing.Union, types.UnionType):
        inner = next((a for a in arguments if typing.get_origin(a) is tuple), None)
        return value if inner is None or value is None else tuple(value)
    return value


def absolute(path: str | Path) -> str:
    """Return an absolute path, because workers have another current folder."""
    return str(Path(path).expanduser().resolve())
