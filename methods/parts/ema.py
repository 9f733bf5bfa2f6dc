"""An exponential moving average of a network's parameters (momentum encoder, target network, teacher)."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

N = TypeVar("N", bound=nn.Module)


def frozen_copy(network: N) -> N:
    """A copy without gradients, to be held beside the network and moved by `update`. Batch norm keeps its own statistics."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * network, parameters only, in one call for all of them."""
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in network.parameters()], 1 - momentum)
