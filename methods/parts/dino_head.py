"""The head of DINO's family: a bottleneck, then scores with weight-normalised prototypes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from methods.parts.numerics import full_precision, l2_normalize, promote


class DINOHead(nn.Module):
    """`(B, in) -> (B, K)`: scores_k = g_k cos(v_k, z) with z = mlp(x), `(B, bottleneck)`.

    The MLP is Linear-GELU blocks, then a Linear; weights are drawn from a normal of std 0.02 cut at two units, biases are 0.
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
        widths = [in_features] + [hidden_features] * (layers - 1)
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            blocks += [nn.Linear(narrow, wide), *([nn.BatchNorm1d(wide)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*blocks, nn.Linear(widths[-1], bottleneck))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.prototypes: nn.Module = weight_norm(nn.Linear(bottleneck, num_prototypes, bias=False))
        with torch.no_grad():
            self.lengths.fill_(1.0)
        self.lengths.requires_grad_(not unit_prototypes)

    @property
    def lengths(self) -> nn.Parameter:
        """g, `(K, 1)`."""
        return self.prototypes.get_parameter("parametrizations.weight.original0")

    @property
    def directions(self) -> nn.Parameter:
        """v, `(K, bottleneck)`, rows of any length."""
        return self.prototypes.get_parameter("parametrizations.weight.original1")

    def forward(self, x: Tensor) -> Tensor:
        z = promote(self.mlp(x))
        with full_precision(z):
            return self.prototypes(l2_normalize(z))  # type: ignore[no-any-return]
