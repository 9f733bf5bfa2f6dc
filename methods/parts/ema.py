"""An exponential moving average of a network's parameters (momentum encoder, target network, teacher)."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from methods.parts.contract import Method, Progress
from methods.parts.drop_path import without_drop_path
from methods.parts.schedules import cosine

N = TypeVar("N", bound=nn.Module)


def frozen_copy(network: N) -> N:
    """A copy without gradients, to be held beside the network and moved by `update`. Batch norm keeps its own statistics."""
    return copy.deepcopy(network).requires_grad_(False)


def teacher_of(network: N) -> N:
    """A frozen copy without stochastic depth."""
    return without_drop_path(frozen_copy(network))


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * network, parameters only, in one call for all of them."""
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in network.parameters()], 1 - momentum)


class MomentumTeacher(Method):
    """A method whose second network, the teacher, follows the first, the student: theta' <- m theta' + (1 - m) theta, once a step.

    Its config has `momentum`, m at the first step, and `final_momentum`, m at the last.
    """

    def momentum(self, progress: Progress) -> float:
        """m = m_1 - (m_1 - m_0) (cos(pi k / K) + 1) / 2 in step k of K."""
        return cosine(progress.step, progress.total_steps, self.config.momentum, self.config.final_momentum)

    def follow(self, teacher: nn.Module, student: nn.Module, progress: Progress) -> None:
        update(teacher, student, self.momentum(progress))
