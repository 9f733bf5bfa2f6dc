"""The contract between a method and the training loop. The loop never asks which method it runs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from methods.parts.drop_path import images_of_step
from methods.parts.errors import ConfigError
from methods.parts.fields import check_limits
from methods.parts.memory_bank import MemoryBank
from methods.parts.views import Views, ViewsConfig

Metrics = dict[str, "Tensor | float"]
Outputs = dict[str, Any]
Masks = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's settings, frozen. Limits stand beside the fields (`methods.parts.fields`).

    What depends on several settings is checked in a `__post_init__` that calls this one first.
    """

    def __post_init__(self) -> None:
        check_limits(self, "method.")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a method may know of the run it serves, settled before it is built."""

    global_batch_size: int
    steps_per_epoch: int
    total_steps: int
    num_images: int | None = None  # training images; None: an unbounded source
    num_ids: int | None = None  # ids run from 0 to num_ids - 1, those of held-out images among them; None: no end


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands. `step` counts completed optimizer steps, so the first step sees 0."""

    step: int
    total_steps: int
    steps_per_epoch: int
    micro_step: int = 0
    micro_steps: int = 1
    generator: torch.Generator | None = None  # the same on every rank
    reports: bool = True  # the loop reports the metrics of this step; if not, the method leaves them out

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch


@dataclass(kw_only=True)
class ParamGroup:
    """Parameters treated alike by the optimizer. The loop carries this out; the method only declares it."""

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
    """`loss=None` means: no backward pass, but the position advances. Metrics are detached scalars; none if nothing is reported."""

    loss: Tensor | None
    metrics: Metrics = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)


class Method(nn.Module):
    """One self-supervised method: networks, state and loss.

    Everything that must survive a restart is a parameter or a persistent buffer made in `__init__`, so that
    `state_dict()` is complete before step 0; what is held for every image is in `memory_banks()`. It works the same without
    a process group. `forward` is `training_step`, with drop path that follows the images. A step reads no value of a tensor
    (`.item()`, `bool(tensor)`, boolean masks, shapes that depend on values): it would wait for the device.
    """

    paper: ClassVar[str] = ""  # "Authors year, arXiv:number"
    # may the batch be cut into micro-batches? A method whose settings decide says so in `__init__`
    accumulation: Literal["exact", "refuse"] = "exact"
    accumulation_remedy: str = ""
    sync_batchnorm: bool = True  # statistics of batch norm are those of all workers' batches together
    needs_dense_ids: ClassVar[bool] = False
    needs_full_epochs: ClassVar[bool] = False

    config: Any  # the method's own frozen config

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """The paper's crops; a recipe copies them to `config.views`, which alone is read."""
        raise NotImplementedError

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        raise NotImplementedError

    def forward(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        with images_of_step(views.image_ids, progress.generator):
            return self.training_step(views, progress, masks)

    def has_loss(self, progress: Progress) -> bool:
        """Whether this step has a gradient; if not, `training_step` is called without one and gives `loss=None`."""
        return True

    def draw_masks(self, views: Views, progress: Progress) -> Masks | None:
        """Random masks for this micro-batch; None for methods without masks."""
        return None

    def start_epoch(self, progress: Progress) -> None:
        """Before the first step of an epoch."""

    def before_step(self, progress: Progress) -> None:
        """Once before the forward pass(es) of an optimizer step."""

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        """Once after the optimizer step; `outputs` holds one entry per micro-batch."""

    def end_epoch(self, progress: Progress) -> None:
        """After the last step of an epoch."""

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(params=[p for p in self.parameters() if p.requires_grad])]

    def memory_banks(self) -> dict[str, MemoryBank]:
        """State by image id, by name; the same objects at every call. Saved and restored with the rest, in pieces."""
        return {}

    def evaluation_backbone(self) -> nn.Module:
        """The network that is evaluated and registered, `(B, 3, H, W) -> (B, D)`; `self.backbone` unless a method has another."""
        return self.get_submodule("backbone")

    def cluster_scores(self, images: Tensor) -> Tensor:
        """Scores of finished images with the prototypes or centres: `(B, 3, H, W) -> (B, K)`, higher is nearer.

        Those of the first head, where there are several. An image's cluster is its highest score. For methods with
        clusters only; called in evaluation mode, without gradient and on one worker alone, so nothing may be gathered.
        """
        raise NotImplementedError

    @property
    def has_clusters(self) -> bool:
        return type(self).cluster_scores is not Method.cluster_scores

    def reconstruct(self, images: Tensor) -> Tensor:
        """What is seen of finished images, masked pixels NaN, and what is made of it: `(B, 3, H, W) -> (B, 2, 3, H, W)`.

        For methods that paint masked patches only; called like `cluster_scores`.
        """
        raise NotImplementedError

    @property
    def reconstructs(self) -> bool:
        return type(self).reconstruct is not Method.reconstruct

    def chance_loss(self) -> tuple[float, str] | None:
        """The loss of a method that has learned nothing and how to write it, e.g. `(ln K, "ln K")`."""
        return None

    def hints(self) -> str:
        """What to try, in one sentence, when the loss stays at `chance_loss`."""
        return ""

    def config_warnings(self, facts: RunFacts) -> Iterable[str]:
        """Sentences of advice on settings that will work badly together; shown before training."""
        return ()


@dataclass(frozen=True)
class Registered:
    name: str
    method: type[Method]
    config: type[MethodConfig]


_registry: dict[str, Registered] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str, config: type[MethodConfig]) -> Callable[[M], M]:
    """Class decorator: make a method known under `name` with its config class."""

    def add(method: M) -> M:
        _registry[name] = Registered(name, method, config)
        return method

    return add


def registered() -> dict[str, Registered]:
    """Every method, found by importing every file of `methods/`; sorted by name."""
    import methods

    for module in pkgutil.iter_modules(methods.__path__):
        if not module.ispkg:
            importlib.import_module(f"methods.{module.name}")
    return dict(sorted(_registry.items()))


def find(key: str | MethodConfig) -> Registered:
    """The registered method of a name, or of a config value.

    Raises:
        ConfigError: no method of that name, or no method with that config class.
    """
    known = registered()
    for entry in known.values():
        if entry.name == key or entry.config is type(key):
            return entry
    raise ConfigError(f"method={key}: unknown; known methods are {', '.join(known)}")


def to_dict(config: MethodConfig) -> dict[str, Any]:
    """A method's settings with its registry name under `name`."""
    return {"name": find(config).name} | {f.name: getattr(config, f.name) for f in fields(config)}
