"""Projection and prediction heads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import nn


def mlp(
    in_features: int,
    hidden_features: int,
    out_features: int,
    layers: int = 2,
    *,
    norm: bool = True,
    hidden_bias: bool = True,
    bias: bool = True,
    final_norm: Literal["affine", "scale", "plain"] | None = None,
    activation: Callable[[], nn.Module] | None = None,
    std: float | None = None,
) -> nn.Sequential:
    """Return Linear-BN-ReLU blocks, then a Linear: `(B, in) -> (B, out)`. One layer is a plain Linear.

    Args:
        norm: batch norm in the blocks.
        hidden_bias: biases in the blocks' Linears; a batch norm behind one subtracts its bias again.
        bias: a bias in the last Linear.
        final_norm: batch norm behind the last Linear: with scale and shift, with scale only, or with neither.
        activation: instead of ReLU.
        std: weights are drawn from a normal of this std; None = torch's own draw.
    """
    widths = [in_features] + [hidden_features] * (layers - 1) + [out_features]
    modules: list[nn.Module] = []
    for i, (narrow, wide) in enumerate(pairwise(widths), start=1):
        linear = nn.Linear(narrow, wide, bias=hidden_bias if i < layers else bias)
        if std is not None:
            nn.init.normal_(linear.weight, std=std)
        modules.append(linear)
        if i < layers:
            modules += [*([nn.BatchNorm1d(wide)] if norm else []), activation() if activation else nn.ReLU(inplace=True)]
    if final_norm is not None:
        last = nn.BatchNorm1d(out_features, affine=final_norm != "plain")
        if final_norm == "scale":
            last.bias = None  # type: ignore[assignment]
        modules.append(last)
    return nn.Sequential(*modules)


def trunc_normal_linears(network: nn.Module) -> None:
    """Draw the weights of every Linear from a normal of std 0.02, truncated at +-2; set biases to 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
