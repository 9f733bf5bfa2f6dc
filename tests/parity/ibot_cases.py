"""What the tests of iBOT and DINOv2 share: a tiny ViT, crops, and networks that give what the test says."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from methods.dinov2 import DINOv2, DINOv2Config
from methods.ibot import IBOT, IBOTConfig
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import Progress, RunFacts
from methods.parts.views import Views
from methods.parts.vit import Tokens, ViT

SIDE, PATCH = 16, 4  # pixels: a grid of 4 x 4 patches
TOTAL, EPOCH = 12, 3
FACTS = RunFacts(global_batch_size=4, steps_per_epoch=EPOCH, total_steps=TOTAL)
ROLES = {"global": "global", "local": "local"}
SMALL = {"num_prototypes": 7, "projector_hidden": 9, "projection_dim": 4}
M = TypeVar("M", bound=IBOT)


def vit(**settings: Any) -> ViT:
    plain = {"width": 0.125, "depth": (2,), "image_size": SIDE, "patch_size": PATCH}
    backbone = build_backbone(BackboneConfig(name="vit_tiny_patch16_224", **{**plain, **settings}))
    assert isinstance(backbone, ViT)
    return backbone


def seasoned(method: M) -> M:
    """The method with weights away from their first values, its teacher near its student."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (*method.backbone.parameters(), method.mask_token, *(p for head in method.heads() for p in head.mlp.parameters())):
            p.add_(torch.randn_like(p) * 0.3)
        for mine, his in zip(method.teacher.parameters(), method.student().parameters(), strict=True):
            mine.copy_(his + 0.1 * torch.randn_like(his) * his.requires_grad)
    return method


def ibot(facts: RunFacts = FACTS, backbone: dict[str, Any] | None = None, **settings: Any) -> IBOT:
    torch.manual_seed(0)
    return seasoned(IBOT(IBOTConfig(**{**SMALL, **settings}), vit(**backbone or {}), facts).double())


def dinov2(facts: RunFacts = FACTS, backbone: dict[str, Any] | None = None, **settings: Any) -> DINOv2:
    torch.manual_seed(0)
    return seasoned(DINOv2(DINOv2Config(**{**SMALL, **settings}), vit(**backbone or {}), facts).double())


def progress(step: int = 0, seed: int = 0) -> Progress:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return Progress(step=step, total_steps=TOTAL, steps_per_epoch=EPOCH, generator=generator)


def crops(seed: int = 0, batch: int = 4, small: int = 3, first: int = 0) -> Views:
    draw = torch.Generator().manual_seed(seed)
    stacks = {"global": torch.randn(2 * batch, 3, SIDE, SIDE, dtype=torch.float64, generator=draw)}
    if small:
        stacks["local"] = torch.randn(small * batch, 3, SIDE // 2, SIDE // 2, dtype=torch.float64, generator=draw)
    ids = first + torch.arange(batch)
    return Views(stacks=stacks, counts={"global": 2, "local": small}, image_ids=ids, labels=torch.full_like(ids, -1), roles=ROLES)


def rows_of(views: Views, rows: slice) -> Views:
    """The same crops of some of the images."""
    stacks = {name: torch.cat([crop[rows] for crop in stack.chunk(views.counts[name])]) for name, stack in views.stacks.items()}
    return Views(stacks=stacks, counts=views.counts, image_ids=views.image_ids[rows], labels=views.labels[rows], roles=ROLES)


def assert_equal_steps(method: IBOT, want: Tensor, loss: Tensor) -> None:
    """The loss and the gradients of every parameter are those of `want`; leaves the gradients for the optimizer."""
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(want, [method.get_parameter(name) for name in names], allow_unused=True)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)
    loss.backward()
    for name, gradient in zip(names, gradients, strict=True):
        ours = method.get_parameter(name).grad
        assert ours is not None, name
        torch.testing.assert_close(ours, torch.zeros_like(ours) if gradient is None else gradient, rtol=0, atol=1e-9, msg=name)


class GivenViT(ViT):
    """A ViT that gives the tokens it holds, for crops of one value each: 0 global, 1 local."""

    def __init__(self, cls: Tensor, patches: Tensor, local: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.given = (cls, patches, local)

    def tokens(self, images: Tensor, **masks: Any) -> Tokens:
        cls, patches, _ = self.given
        return Tokens(cls=cls, registers=cls[:, None, :0], patches=patches, raw_patches=patches)

    def forward(self, images: Tensor) -> Tensor:
        assert self.given[2] is not None
        return self.given[2]


class Passing(nn.Module):
    """A head whose scores are its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    project = scores = forward


def given(method: M, student: tuple[Tensor, Tensor, Tensor | None], teacher: tuple[Tensor, Tensor]) -> M:
    """The method with these scores of CLS `(G B, K)`, patches `(G B, N, K2)`, and of the student's local crops."""
    method.backbone, method.head, method.patch_head = GivenViT(*student), Passing(), Passing()
    for name, module in {"backbone": GivenViT(*teacher), "head": Passing(), "patch_head": Passing()}.items():
        method.teacher.add_module(name, module)
    return method
