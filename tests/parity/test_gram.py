"""Gram anchoring of DINOv2's later phases: the loss of a step, the Gram teacher's refreshes, and a resume between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.dinov2 import DINOv2, DINOv2Config
from methods.parts.contract import RunFacts
from pipeline.config import OptimConfig
from pipeline.train.optim import build_optimizer
from tests.parity.ibot_cases import FACTS, assert_equal_steps, crops, dinov2, progress

GRAM = {"gram_weight": 1.5, "gram_refresh_steps": 2, "gram_refreshes": 2}
SETTINGS: dict[str, Any] = {**GRAM, "momentum": 0.5, "freeze_prototypes_epochs": 0}


def literal_gram(student: Tensor, anchors: Tensor) -> Tensor:
    """The mean squared difference of cosines, crop by crop and pair by pair."""

    def cosine(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum() / (x * x).sum().sqrt() / (y * y).sum().sqrt()

    terms = [
        (cosine(own[i], own[j]) - cosine(held[i], held[j])) ** 2
        for own, held in zip(student, anchors, strict=True) for i in range(len(own)) for j in range(len(own))
    ]  # fmt: skip
    return torch.stack(terms).mean()


def step(method: DINOv2, optimizer: torch.optim.Optimizer, k: int) -> None:
    method.before_step(progress(k))
    out = method(crops(k), progress(k))
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    method.after_step([out.outputs], progress(k))


def adam(method: DINOv2) -> torch.optim.Optimizer:
    return build_optimizer(OptimConfig(name="adamw", base_lr=0.01, weight_decay=0.1), method.param_groups())


@pytest.mark.parametrize("scale", [1, 2])
def test_a_step_adds_the_difference_of_cosines_to_the_loss(scale: int) -> None:
    """All patches of the masked crops count; the gradient flows into the student alone."""
    method, plain = dinov2(**SETTINGS, gram_scale=scale), dinov2(**{**SETTINGS, "gram_weight": 0.0})
    method.before_step(progress())
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.1)  # the Gram teacher stays behind
    plain.load_state_dict({name: value for name, value in method.state_dict().items() if not name.startswith("gram_teacher.")})
    views = crops(0, batch=2)
    masks = method.draw_masks(views, progress())
    images = views.stacks["global"]
    assert method.gram_teacher is not None
    held = method.gram_teacher.tokens(images if scale == 1 else F.interpolate(images, scale_factor=2.0, mode="bicubic")).patches
    if scale == 2:
        grid = held.reshape(len(held), 8, 8, -1).movedim(-1, 1)
        held = F.interpolate(grid, size=(4, 4), mode="bicubic", antialias=False).movedim(1, -1).reshape(len(held), 16, -1)
    student = method.backbone.tokens(images, masked=masks[0], mask_token=method.mask_token).patches
    # the plain loss with the weights of `method`, so that one graph holds both terms
    weights = {name: p for name, p in method.named_parameters() if not name.startswith("gram_teacher.")}
    want = torch.func.functional_call(plain, weights, (views, progress(), masks)).loss
    want = want + 1.5 * literal_gram(student, held.detach())
    out = method(views, progress(), masks)
    assert out.metrics["gram"].item() > 1e-4
    assert_equal_steps(method, want, out.loss)
    assert all(p.grad is None for p in method.gram_teacher.parameters())


def test_the_gram_teacher_is_the_teacher_at_the_start_and_at_each_refresh() -> None:
    method = dinov2(**SETTINGS)
    optimizer, teachers = adam(method), []
    assert method.gram_teacher is not None
    for k in range(8):
        teachers.append({name: value.clone() for name, value in method.evaluation_backbone().state_dict().items()})
        step(method, optimizer, k)
        held = min(k // 2, 2) * 2  # steps 0, 2 and 4, not 6
        for name, value in method.gram_teacher.state_dict().items():
            assert torch.equal(value, teachers[held][name]), (k, name)
    assert not torch.equal(teachers[4]["pos_embed"], teachers[6]["pos_embed"])


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resume_between_or_at_refreshes_changes_no_bit(stop: int) -> None:
    whole, first = dinov2(**SETTINGS), dinov2(**SETTINGS)
    optimizer, other = adam(whole), adam(first)
    for k in range(6):
        step(whole, optimizer, k)
    for k in range(stop):
        step(first, other, k)
    again = dinov2(**SETTINGS)
    again.load_state_dict(first.state_dict())
    third = adam(again)
    third.load_state_dict(other.state_dict())
    for k in range(stop, 6):
        step(again, third, k)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_without_weight_there_is_no_copy_and_the_loss_is_the_same() -> None:
    method, plain = dinov2(**{**SETTINGS, "gram_weight": 0.0}), dinov2()
    assert method.gram_teacher is None and list(method.state_dict()) == list(plain.state_dict())
    assert method(crops(), progress()).loss.item() == plain(crops(), progress()).loss.item()


def test_a_first_phase_is_warned() -> None:
    warned = [sentence for sentence in DINOv2Config(gram_weight=2).hints(FACTS).warnings if sentence.startswith("method.gram_weight=2 ")]
    assert len(warned) == 1
    later = RunFacts(**{**vars(FACTS), "trained": True})
    assert not any("gram" in sentence for sentence in DINOv2Config(gram_weight=2).hints(later).warnings)
    assert not any("gram" in sentence for sentence in DINOv2Config().hints(FACTS).warnings)
