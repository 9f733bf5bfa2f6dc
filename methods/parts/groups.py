"""Parameter groups that several papers share."""

from __future__ import annotations

from torch import nn

from methods.parts.contract import ParamGroup


def param_groups_weight_decay(*networks: nn.Module, vector_lr_scale: float = 1.0) -> list[ParamGroup]:
    """Return the matrices of the networks and their vectors (biases, norms); vectors neither decay nor adapt.

    Args:
        vector_lr_scale: multiplies the learning rate of the vectors.
    """
    params = [p for network in networks for p in network.parameters() if p.requires_grad]
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    return [
        ParamGroup(params=matrices, name="matrices"),
        ParamGroup(params=vectors, name="vectors", decay=False, adapt=False, lr_scale=vector_lr_scale),
    ]
