"""Cross entropy with soft targets: its value and gradient are those of the definition, whatever the groups of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from methods.parts import soft_targets
from methods.parts.soft_targets import cross_entropy_sum


@pytest.fixture(params=[1, 3, 100])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(soft_targets, "chunk_rows", lambda x: request.param)
    yield request.param


def drawn(targets: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    return [torch.rand(7, 5, dtype=torch.float64).softmax(1) for _ in range(targets)], torch.randn(7, 5, dtype=torch.float64)


@pytest.mark.parametrize("targets", [1, 2, 3])
def test_value_and_gradient_are_those_of_the_definition(targets: int, rows: int) -> None:
    codes, scores = drawn(targets)
    literal = 0.0
    for q in codes:
        for i in range(7):
            p = torch.exp(scores[i] / 0.3) / torch.exp(scores[i] / 0.3).sum()
            literal -= float((q[i] * p.log()).sum()) / 7
    scores.requires_grad_()
    assert cross_entropy_sum(codes, scores, 0.3).item() == pytest.approx(literal, abs=1e-12)
    assert torch.autograd.gradcheck(lambda s: 2.5 * cross_entropy_sum(codes, s, 0.3), scores)


def test_scores_far_apart_stay_finite_and_untouched() -> None:
    codes, scores = drawn(2)
    scores = (scores * 1e4).float().requires_grad_()
    before = scores.detach().clone()
    loss = cross_entropy_sum([q.float() for q in codes], scores, 0.1)
    loss.backward()
    assert bool(loss.isfinite()) and bool(scores.grad.isfinite().all())
    assert torch.equal(scores.detach(), before)
