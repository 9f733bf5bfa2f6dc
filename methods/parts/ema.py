"""An exponential moving average of a network's parameters (momentum encoder, target network, teacher)."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from methods.parts.contract import Method, Progress
from methods.parts.distributed import own_shard
from methods.parts.drop_path import without_drop_path
from methods.parts.schedules import cosine

N = TypeVar("N", bound=nn.Module)


def frozen_copy(network: N) -> N:
    """Return a copy without gradients, to be moved by `update`. Its batch norm has statistics of its own."""
    return copy.deepcopy(network).requires_grad_(False)


def teacher_of(network: N) -> N:
    """Return a frozen copy without drop path."""
    return without_drop_path(frozen_copy(network))


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """Update in place: average <- momentum * average + (1 - momentum) * network, parameters only."""
    averages, values = ([own_shard(p.detach()) for p in net.parameters()] for net in (average, network))
    torch._foreach_lerp_(averages, values, 1 - momentum)


class MomentumTeacher(Method):
    """Base of methods whose teacher follows the student: theta' <- m theta' + (1 - m) theta, once a step.

    The config has `momentum`, m at the first step, and `final_momentum`, m at the last.
    """

    def momentum(self, progress: Progress) -> float:
        """Return m = m_1 - (m_1 - m_0) (cos(pi k / K) + 1) / 2 of step k of K."""
        return cosine(progress.step, progress.total_steps, self.config.momentum, self.config.final_momentum)

    def follow(self, teacher: nn.Module, student: nn.Module, progress: Progress) -> None:
        """Update the teacher with the momentum of this step."""
        update(teacher, student, self.momentum(progress))
