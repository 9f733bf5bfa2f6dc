"""The contract between a method and the training loop. The loop never asks which method it runs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from methods.parts.drop_path import images_of_step
from methods.parts.errors import ConfigError
from methods.parts.fields import check_limits
from methods.parts.hints import Hints
from methods.parts.memory_bank import MemoryBank
from methods.parts.meters import Metrics
from methods.parts.views import Views, ViewsConfig

Outputs = dict[str, Any]
Masks = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's settings, frozen. Limits stand beside the fields (`methods.parts.fields`)."""

    phase_settings = frozenset[str]()  # settings that a new phase of a run may change: no earlier state depends on them

    def __init_subclass__(cls) -> None:
        if "__post_init__" in vars(cls):
            raise TypeError(f"{cls.__name__}.__post_init__ would skip the limits beside the fields; use check()")

    def __post_init__(self) -> None:
        check_limits(self, "method.")
        self.check()

    def check(self) -> None:
        """Raise ConfigError if settings do not fit together; each is within its own limits."""

    def settled(self, facts: RunFacts) -> Self:
        """Return these settings with those filled in that follow from the run; comments beside the defaults say which values do."""
        return self

    def hints(self, facts: RunFacts) -> Hints:
        """Return what a user is told of these settings in a run; they are settled."""
        return Hints()


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The numbers of a run that a method may know; they are settled before it is built."""

    global_batch_size: int
    steps_per_epoch: int
    total_steps: int
    num_images: int | None = None  # training images; None: an unbounded source
    num_ids: int | None = None  # ids run from 0 to num_ids - 1, those of held-out images among them; None: no end
    num_features: int | None = None  # width of the backbone's features; None: not known before it is built
    trained: bool = False  # the run begins with the weights of an earlier phase, or of `backbone.init`


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The position of a run. `step` counts completed optimizer steps, so the first step sees 0."""

    step: int
    total_steps: int
    steps_per_epoch: int
    micro_step: int = 0
    micro_steps: int = 1
    generator: torch.Generator | None = None  # the same on every rank
    reports: bool = True  # the loop reports the metrics of this step; if not, the method leaves them out

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.step // self.steps_per_epoch


@dataclass(kw_only=True)
class ParamGroup:
    """Parameters that the optimizer treats alike. The method declares it, the loop carries it out."""

    params: list[nn.Parameter]
    name: str = "all"
    lr_scale: float = 1.0  # multiplies the scheduled learning rate
    lr_constant: bool = False  # keep the base learning rate, without warm-up or decay
    decay: bool = True  # weight decay applies
    adapt: bool = True  # LARS / LARC trust ratio applies
    clip: bool = True  # counts in, and is scaled by, gradient clipping
    frozen_steps: int = 0  # gradients are dropped while step < frozen_steps
    module: str = ""  # groups of one module have one norm in clipping by module


@dataclass(kw_only=True)
class StepOutput:
    """The result of a step. `loss=None`: no backward pass, but the position advances. Metrics are detached scalars."""

    loss: Tensor | None
    metrics: Metrics = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)


class Method(nn.Module):
    """Base of every method: networks, state and loss.

    Everything that must survive a restart is a parameter or a persistent buffer made in `__init__`, so that
    `state_dict()` is complete before step 0. State of every image is in `memory_banks()`. A method works the same without
    a process group. `forward` is `training_step`, with drop path that follows the images. A step reads no value of a tensor
    (`.item()`, `bool(tensor)`, boolean masks, shapes that depend on values): it would wait for the device.
    """

    paper: ClassVar[str] = ""  # "Authors year, arXiv:number"
    # given: the loss needs the whole batch at once, and this is advised in the place of micro-batches; settings may decide in `__init__`
    whole_batch_remedy: str = ""
    sync_batchnorm: bool = True  # statistics of batch norm are those of all workers' batches together
    needs_full_epochs: ClassVar[bool] = False  # state of every image by id: the source has an end, and an epoch is a whole pass over it
    shards: ClassVar[bool] = False  # FSDP may shard it: a step reaches weights inside `forward` only, and hooks handle shares (`own_shard`)
    has_clusters: ClassVar[bool] = False  # `cluster_scores` is there
    reconstructs: ClassVar[bool] = False  # `reconstruct` is there
    hides_patches: ClassVar[bool] = False  # `hidden_patches` is there

    config: Any  # the method's own frozen config

    def __init_subclass__(cls) -> None:
        cls.has_clusters = cls.cluster_scores is not Method.cluster_scores
        cls.reconstructs = cls.reconstruct is not Method.reconstruct
        cls.hides_patches = cls.hidden_patches is not Method.hidden_patches

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return the paper's crops. A recipe copies them to `config.views`, and only that is read."""
        raise NotImplementedError

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        """Return the loss of one micro-batch on one worker.

        Args:
            masks: as from `draw_masks`; None = draw them.
        """
        raise NotImplementedError

    def forward(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        with images_of_step(views.image_ids, progress.generator):
            return self.training_step(views, progress, masks)

    def has_loss(self, progress: Progress) -> bool:
        """Return whether this step has a gradient; if not, `training_step` is called without one and returns `loss=None`."""
        return True

    def draw_masks(self, views: Views, progress: Progress) -> Masks | None:
        """Draw the random masks of this micro-batch; None for methods without masks."""
        return None

    def start_epoch(self, progress: Progress) -> None:
        """Run before the first step of an epoch."""

    def before_step(self, progress: Progress) -> None:
        """Run once before the forward passes of an optimizer step."""

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        """Run once after the optimizer step; `outputs` holds one entry per micro-batch."""

    def end_epoch(self, progress: Progress) -> None:
        """Run after the last step of an epoch."""

    def param_groups(self) -> list[ParamGroup]:
        """Return every trained parameter once, in groups that the optimizer treats alike."""
        return [ParamGroup(params=[p for p in self.parameters() if p.requires_grad])]

    def memory_banks(self) -> dict[str, MemoryBank]:
        """Return the state by image id, by name: the same objects at every call. It is saved and restored with the rest, in pieces."""
        return {}

    def evaluation_backbone(self) -> nn.Module:
        """Return the network that is evaluated and registered, `(B, 3, H, W) -> (B, D)`: `self.backbone` unless a method has another."""
        return self.get_submodule("backbone")

    def cluster_scores(self, images: Tensor) -> Tensor:
        """Score finished images with the prototypes or centres: `(B, 3, H, W) -> (B, K)`, higher is nearer.

        An image's cluster is its highest score. Where there are several heads, the scores are those of the first. It is for
        methods with clusters only. It is called in evaluation mode, without gradient and on one worker alone, so it must not
        gather.
        """
        raise NotImplementedError

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return finished images with masked pixels NaN, and their reconstruction: `(B, 3, H, W) -> (B, 2, 3, H, W)`.

        It is for methods that predict masked patches only. It is called like `cluster_scores`.
        """
        raise NotImplementedError

    def hidden_patches(self, views: Views, masks: Masks) -> dict[int, Tensor]:
        """Return the patches that masks of `draw_masks` hide, row by row of the patches: `(B, N)` bool by the crop's position in `crops`.

        It is for methods with masks only. Crops that no mask belongs to are left out.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Registered:
    name: str
    method: type[Method]
    config: type[MethodConfig]


_registry: dict[str, Registered] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str, config: type[MethodConfig]) -> Callable[[M], M]:
    """Register the decorated method under `name`, with its config class."""

    def add(method: M) -> M:
        _registry[name] = Registered(name, method, config)
        return method

    return add


def registered() -> dict[str, Registered]:
    """Return every method, sorted by name. Every file of `methods/` is imported to find them."""
    import methods

    for module in pkgutil.iter_modules(methods.__path__):
        if not module.ispkg:
            importlib.import_module(f"methods.{module.name}")
    return dict(sorted(_registry.items()))


def find(key: str | MethodConfig) -> Registered:
    """Return the registered method of a name, or of a config value.

    Raises:
        ConfigError: no method has that name or config class.
    """
    known = registered()
    for entry in known.values():
        if entry.name == key or entry.config is type(key):
            return entry
    raise ConfigError(f"method={key}: unknown; known methods are {', '.join(known)}")


def to_dict(config: MethodConfig) -> dict[str, Any]:
    """Return a method's settings with its registry name under `name`."""
    return {"name": find(config).name} | {f.name: getattr(config, f.name) for f in fields(config)}
