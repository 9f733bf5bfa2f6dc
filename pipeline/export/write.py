"""Writing of exports, which `pipeline.export.weights` reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from methods.parts.backbones import BackboneConfig, num_features
from pipeline.export import SPEC, WEIGHTS
from pipeline.export.weights import ExportSpec, Triple
from pipeline.run_folder import write_json
from pipeline.storage.place import write_atomic


def export(
    backbone: nn.Module,
    backbone_config: BackboneConfig,
    folder: Path,
    *,
    size: int,
    mean: Triple,
    std: Triple,
    facts: dict[str, Any],
) -> Path:
    """Write a backbone that can be used without its run. Return the folder.

    Args:
        size: side of embedded images, pixels.
        facts: plain values that describe the run.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: _plain(value) for name, value in backbone.state_dict().items()}
    write_atomic(folder / WEIGHTS, save(weights))
    config = dataclasses.replace(backbone_config, init=None)
    spec = ExportSpec(backbone=config, size=size, mean=mean, std=std, features=num_features(backbone), facts=facts)
    write_json(folder / SPEC, dataclasses.asdict(spec))
    return folder


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).clone(memory_format=torch.contiguous_format)
