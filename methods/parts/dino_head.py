"""The head of DINO and of the methods after it: a bottleneck, then scores with weight-normalised prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts.heads import mlp, trunc_normal_linears
from methods.parts.numerics import autocast_disabled, l2_normalize


class DINOHead(nn.Module):
    """`(B, in) -> (B, K)`: scores_k = g_k cos(v_k, z) with z = mlp(x), `(B, bottleneck)`.

    The MLP is Linear-GELU blocks, then a Linear; weights are drawn from a normal of std 0.02 truncated at +-2, biases are 0.
    The prototypes W_k = g_k v_k / ||v_k|| keep torch's own draw for v, and g begins at 1. Normalisation and prototypes
    are computed in float32 or better: at a temperature of 0.04 an error of bf16 in a cosine is 0.05 in the exponent.

    Args:
        num_prototypes: K.
        layers: Linears of the MLP.
        batch_norm: behind every Linear of the MLP but the last (for ResNets).
        unit_prototypes: g stays 1, so scores are cosines.
    """

    def __init__(
        self,
        in_features: int,
        num_prototypes: int,
        *,
        hidden_features: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        unit_prototypes: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = mlp(in_features, hidden_features, bottleneck, layers, norm=batch_norm, activation=nn.GELU)
        trunc_normal_linears(self.mlp)
        self.prototypes = Prototypes(bottleneck, num_prototypes, unit=unit_prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.project(x))

    def project(self, x: Tensor) -> Tensor:
        """Return z / ||z||: `(B, in) -> (B, bottleneck)`."""
        return l2_normalize(self.mlp(x))

    def scores(self, z: Tensor) -> Tensor:
        """Return the scores of projections: `(B, bottleneck) -> (B, K)`. They are linear: the mean score is the score of the mean."""
        with autocast_disabled(z):
            return self.prototypes(z)  # type: ignore[no-any-return]


class Prototypes(nn.Module):
    """Scores with weight-normalised rows, W_k = g_k v_k / ||v_k||: `(B, D) -> (B, K)`.

    It does to a Linear without bias what `torch.nn.utils.parametrizations.weight_norm` does. A module that torch has
    parametrized cannot be pickled, so it cannot be sent to a worker.

    Args:
        unit: g stays 1 and has no gradient.
    """

    def __init__(self, in_features: int, num_prototypes: int, *, unit: bool) -> None:
        super().__init__()
        self.lengths = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=not unit)  # g
        self.directions = nn.Parameter(nn.Linear(in_features, num_prototypes, bias=False).weight.detach())  # v, of any length

    def forward(self, z: Tensor) -> Tensor:
        # the one inner name of torch in this project: the kernel behind `parametrizations.weight_norm` has no public one
        return F.linear(z, torch._weight_norm(self.directions, self.lengths))
