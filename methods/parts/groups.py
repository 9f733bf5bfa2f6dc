"""Parameter groups that several papers share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from methods.parts.contract import ParamGroup
from methods.parts.vit import ViT


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


def param_groups_by_layer(
    backbone: ViT, *, decay: float, patch_lr_scale: float = 1.0, tokens: Sequence[nn.Parameter] = (), module: str = "backbone"
) -> list[ParamGroup]:
    """Return two groups, matrices and vectors, for each layer of a ViT; layer l of depth + 1 has decay^(depth + 1 - l) times the rate.

    Layer 0 holds the tokens, the positions and the patch projection, layer i + 1 block i, and the last one the final norm. Vectors
    (biases, norms, layer scales) neither decay nor adapt; tokens decay.

    Args:
        patch_lr_scale: a further factor for the patch projection.
        tokens: parameters of layer 0 that are not the backbone's own, such as a mask token; they decay.
    """
    depth = len(backbone.blocks)
    sorted_: dict[tuple[int, bool, bool], list[nn.Parameter]] = {(0, False, False): list(tokens)} if tokens else {}
    for name, p in backbone.named_parameters():
        if p.requires_grad:
            part, *rest = name.split(".")
            layer = int(rest[0]) + 1 if part == "blocks" else depth + 1 if part in ("norm", "fc_norm") else 0
            sorted_.setdefault((layer, part == "patch_embed", p.ndim <= 1), []).append(p)
    return [
        ParamGroup(
            params=params,
            name=f"{'patch_embed' if patches else f'layer_{layer}'}_{'vectors' if vectors else 'matrices'}",
            lr_scale=decay ** (depth + 1 - layer) * (patch_lr_scale if patches else 1.0),
            decay=not vectors,
            adapt=not vectors,
            module=module,
        )
        for (layer, patches, vectors), params in sorted_.items()
    ]
