"""Projection heads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import nn


def mlp(
    in_features: int,
    hidden_features: int,
    out_features: int,
    layers: int = 2,
    *,
    hidden_bias: bool = True,
    bias: bool = True,
    final_norm: bool = False,
    activation: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """Linear-BN-ReLU blocks, then a Linear: `(B, in) -> (B, out)`. One layer is a plain Linear. Framework default init.

    Args:
        hidden_bias: biases in the blocks' Linears; the batch norm behind each takes them out again.
        bias: a bias in the last Linear.
        final_norm: batch norm without scale and shift behind the last Linear.
        activation: instead of ReLU.
    """
    widths = [in_features] + [hidden_features] * (layers - 1)
    blocks: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        blocks += [nn.Linear(narrow, wide, bias=hidden_bias), nn.BatchNorm1d(wide), activation() if activation else nn.ReLU(inplace=True)]
    last = [nn.BatchNorm1d(out_features, affine=False)] if final_norm else []
    return nn.Sequential(*blocks, nn.Linear(widths[-1], out_features, bias=bias), *last)
