"""One short training run of every method: settings, a small backbone, crops, and steps of plain gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import Method, Progress, RunFacts, find
from methods.parts.patch_masks import masked_patches
from methods.parts.views import ROLES_BY_NAME, Views
from tests.parity.common import Same
from tests.parity.dino_cases import Encoder

FOLDER = Path(__file__).parent / "reference"


class Body(nn.Module):
    """Linear, batch norm, ReLU: `(B, 6) -> (B, 10)`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 10
        self.linear = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()


def vit(width: float, **settings: Any) -> Callable[[], nn.Module]:
    """Two blocks of a fraction of 192 features, on 4 x 4 patches of 4 pixels."""
    config = BackboneConfig(name="vit_tiny_patch16_224", width=width, depth=(2,), image_size=16, patch_size=4, **settings)
    return lambda: build_backbone(config)


def matrix(size: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(size, size, bias=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    settings: dict[str, Any]
    crops: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=lambda: {"global": (2, (6,))})  # count, shape of each
    backbone: Callable[[], nn.Module] = Body
    replaced: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)  # modules simpler than the method's own
    fixed: tuple[str, ...] = ()  # parameters that keep the value they are made with
    batch: int = 8
    steps: int = 6
    steps_per_epoch: int = 3
    num_images: int = 24
    num_ids: int | None = None
    lr: float = 0.1

    def build(self, name: str) -> Method:
        entry = find(name)
        facts = RunFacts(
            global_batch_size=self.batch,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.steps,
            num_images=self.num_images,
            num_ids=self.num_ids,
        )
        method = entry.method(entry.config(**self.settings), self.backbone(), facts)
        for part, make in self.replaced.items():
            method.set_submodule(part, make())
        return method

    def progress(self, step: int) -> Progress:
        draw = torch.Generator().manual_seed(step)
        return Progress(step=step, total_steps=self.steps, steps_per_epoch=self.steps_per_epoch, generator=draw)

    def views(self, values: Mapping[str, Tensor], step: int) -> Views:
        """The crops of a step from `crops.GROUP` `(steps, V, B, ...)` and `ids` `(steps, B)`."""
        stacks = {group: values[f"crops.{group}"][step].flatten(0, 1) for group in self.crops}
        ids = values["ids"][step].long()
        counts, roles = {n: v for n, (v, _) in self.crops.items()}, {n: ROLES_BY_NAME.get(n, "global") for n in self.crops}
        return Views(stacks=stacks, counts=counts, image_ids=ids, labels=torch.full_like(ids, -1), roles=roles)


HEADS = {"projector_hidden": 7, "projection_dim": 5}
PREDICTOR = {**HEADS, "predictor_hidden": 16}
MASKED = {  # iBOT's kind
    "num_prototypes": 7, "num_patch_prototypes": 5, "shared_head": False, "projector_hidden": 9, "projection_dim": 4, "momentum": 0.8,
    "teacher_temperature": 0.05, "warmup_teacher_temperature_epochs": 0, "freeze_prototypes_epochs": 0, "patch_weight": 0.6,
}  # fmt: skip
PATCHES = {"global": (2, (3, 16, 16)), "local": (1, (3, 8, 8))}
PAIR = {"first": (1, (6,)), "second": (1, (6,))}

CASES: dict[str, Case] = {
    "barlow-twins": Case(settings=HEADS, lr=0.01),
    "byol": Case(settings={**PREDICTOR, "momentum": 0.8}, crops=PAIR, lr=0.05),
    "coke": Case(
        settings={
            "projector_hidden": 7, "projection_dim": 4, "num_clusters": (4, 6), "dual_learning_rate": 0.5, "predictor_weight": 0.5,
            "averaging_start_epoch": 2, "averaging_labels": 2, "temperature": 0.2,
        },
        crops={"global": (2, (6,)), "local": (1, (6,))},
        replaced={"predictor": matrix(4)},
        steps=12,
        lr=0.0,
    ),
    "deepcluster-v2": Case(
        settings={"num_prototypes": 4, "heads": 3, "projection_dim": 5},
        crops={"global": (2, (5,)), "local": (1, (5,))},
        backbone=lambda: Same(5),
        replaced={"projector": matrix(5)},
        batch=6,
        steps=12,
        steps_per_epoch=4,
        num_ids=26,
        lr=0.5,
    ),
    "dino": Case(
        settings={
            "num_prototypes": 7, "projector_hidden": 9, "projection_dim": 4, "momentum": 0.8, "teacher_temperature": 0.07,
            "warmup_teacher_temperature_epochs": 2, "unit_prototypes": False, "freeze_prototypes_epochs": 0,
        },
        crops={"global": (2, (3, 1, 1)), "local": (2, (3, 1, 1))},
        backbone=Encoder,
        batch=4,
    ),
    "dinov2": Case(settings=MASKED, crops=PATCHES, backbone=vit(0.0625), batch=3, steps=3, lr=0.05),
    "ibot": Case(settings=MASKED, crops=PATCHES, backbone=vit(0.0625), batch=2, steps=3, lr=0.05),
    "mae": Case(
        settings={"decoder_width": 8, "decoder_depth": 2, "decoder_heads": 2},
        crops={"global": (1, (3, 16, 16))},
        backbone=vit(0.125, positions="sincos", xavier=True),
        fixed=("backbone.pos_embed",),
        batch=4,
        steps=3,
    ),
    "moco": Case(settings={"projection_dim": 5, "queue_length": 11, "temperature": 0.3, "momentum": 0.8, "bn_groups": 2}),
    "moco-v3": Case(settings={**HEADS, "projector_layers": 2, "temperature": 0.3, "momentum": 0.6}),
    "msn": Case(
        settings={
            "projector_hidden": 12, "projection_dim": 6, "num_prototypes": 10, "mask_ratio": 0.3, "momentum": 0.6, "temperature": 0.2,
        },
        crops={"target": (1, (3, 16, 16)), "random": (1, (3, 16, 16)), "focal": (2, (3, 8, 8))},
        backbone=vit(0.0625),
        batch=4,
        steps=4,
        lr=0.01,
    ),
    "nnclr": Case(settings={**PREDICTOR, "temperature": 0.4, "support_set_size": 11}),
    "simclr": Case(settings={"projection_dim": 5, "temperature": 0.4, "memory_size": 11, "memory_momentum": 0.8}),
    "simsiam": Case(settings=PREDICTOR),
    "swav": Case(
        settings={**HEADS, "num_prototypes": 6, "queue_length": 16, "queue_start_epoch": 0, "freeze_prototypes_epochs": 0},
        crops={"global": (2, (6,)), "local": (3, (6,))},
        lr=0.2,
    ),
    "vicreg": Case(settings=HEADS, lr=0.01),
}  # fmt: skip


def train(name: str, values: Mapping[str, Tensor]) -> list[float]:
    """The losses of the method itself in the type of `values`; NaN in a step without one."""
    case = CASES[name]
    torch.manual_seed(0)
    method = case.build(name).to(values[f"crops.{next(iter(case.crops))}"].dtype)
    start = {key.removeprefix("start."): value for key, value in values.items() if key.startswith("start.")}
    missing = method.load_state_dict(start, strict=False)
    assert not missing.unexpected_keys and not set(missing.missing_keys) & ({n for n, _ in method.named_parameters()} - set(case.fixed))
    optimizer = torch.optim.SGD([p for group in method.param_groups() for p in group.params], lr=case.lr)
    losses = []
    for step in range(case.steps):
        at = case.progress(step)
        if step % case.steps_per_epoch == 0:
            method.start_epoch(at)
        method.before_step(at)
        masks = [values["keep"][step].long()] if "keep" in values else None
        if "masked" in values:
            masks = masked_patches(values["masked"][step] != 0, 40, torch.device("cpu"))
        out = method(case.views(values, step), at, masks)
        optimizer.zero_grad()
        if out.loss is not None:
            out.loss.backward()
            optimizer.step()
        method.after_step([out.outputs], at)
        if (step + 1) % case.steps_per_epoch == 0:
            method.end_epoch(at)
        losses.append(float("nan") if out.loss is None else out.loss.item())
    return losses
