"""Evaluation of an exported backbone, as at the end of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from methods.parts.backbones import build_backbone
from methods.parts.errors import ConfigError
from methods.parts.views import CropGroup
from pipeline.config import DataConfig, EvaluateConfig, RunConfig, from_yaml
from pipeline.data.ray_data import start_ray
from pipeline.data.sources.base import open_source
from pipeline.evaluate.final import Scores, final_scores
from pipeline.evaluate.probes import PROTOCOLS, Probes, ProbeScores
from pipeline.export import registry
from pipeline.machine import set_precision


def config_of(export: Path) -> RunConfig:
    """Return the settings for an export: those of its run, or the size and normalisation of a registered model."""
    saved = export.parent / "config.yaml"
    if saved.is_file():
        return from_yaml(saved.read_text())
    _, spec = registry.read_export(export)
    return RunConfig(
        data=DataConfig(mean=spec.mean, std=spec.std),
        views={"global": CropGroup(size=spec.size)},
        backbone=spec.backbone,
        evaluate=EvaluateConfig(size=spec.size),
    )


def evaluate(export: Path, config: RunConfig, protocols: Sequence[str] = ("knn",)) -> tuple[Scores | None, list[ProbeScores]]:
    """Evaluate an export and an untrained backbone of the same architecture: kNN, with raw pixels as baseline, and other protocols.

    Raises:
        ConfigError: images without labels of two classes.
    """
    dataset = open_source(config.data)
    backbone, _ = registry.load_export(export)
    torch.manual_seed(config.train.seed)
    untrained = build_backbone(config.backbone)
    start_ray()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_precision(device)
    backbone = backbone.to(device)
    scores = final_scores(config, dataset, backbone, untrained, device) if "knn" in protocols else None
    if scores is not None and not scores.rows:
        raise ConfigError(f"data.path={config.data.path}: {scores.protocol}")
    others = [name for name in protocols if name != "knn"]
    probes = Probes(config, dataset, backbone, untrained, device) if others else None
    return scores, [PROTOCOLS[name](probes) for name in others if probes]
