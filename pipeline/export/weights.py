"""An exported backbone: `backbone.safetensors` (timm names, float32) and `backbone.json` (architecture, image size, normalisation).

`pipeline.export.write` writes them. The served model includes this file, so it imports torch, timm and safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.errors import ConfigError
from pipeline.export import SPEC, WEIGHTS

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """The content of `backbone.json`."""

    backbone: BackboneConfig
    size: int  # side of an embedded image, pixels
    mean: Triple  # normalisation, in [0, 1]
    std: Triple
    features: int  # width D of an embedding
    facts: dict[str, Any]  # method, recipe, data fingerprint, scores ...


def read_export(path: Path) -> tuple[dict[str, Tensor], ExportSpec]:
    """Read weights and description of an export: its folder, or a `.safetensors` file with the JSON of the same name beside it.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path if path.suffix == ".safetensors" else path / WEIGHTS
    try:
        tree = _tuples(json.loads(file.with_suffix(".json").read_text()))
        spec = ExportSpec(backbone=BackboneConfig(**_tuples(tree.pop("backbone"))), **tree)
        return load_file(file), spec
    except FileNotFoundError as error:
        raise ConfigError(f"model={path}: {Path(error.filename or file).name} is missing; an export has {WEIGHTS} and {SPEC}") from None
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ConfigError(f"model={path}: cannot be read as an export ({error}); export it again") from None


def _tuples(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}


def build_export(weights: Mapping[str, Tensor], spec: ExportSpec) -> nn.Module:
    """Build the backbone of an export, in evaluation mode."""
    backbone = build_backbone(spec.backbone)
    fill(backbone, weights, "model", wording(spec.backbone))
    return backbone.eval()


def load_export(path: Path) -> tuple[nn.Module, ExportSpec]:
    """Load the backbone of an export, in evaluation mode on the CPU, and its description, without running code from the files.

    Raises:
        ConfigError: a file is missing or damaged, or weights and description do not match.
    """
    weights, spec = read_export(path)
    return build_export(weights, spec), spec


def wording(config: BackboneConfig) -> str:
    """Return the settings of a backbone in one line, without defaults."""
    plain = BackboneConfig(name="")
    settings = {name: value for name, value in vars(config).items() if value != getattr(plain, name) and name not in ("init", "drop_path")}
    return "backbone " + " ".join(f"{name}={value}" for name, value in settings.items())


def fill(backbone: nn.Module, weights: Mapping[str, Tensor], key: str, saved: str) -> None:
    """Load all weights into a backbone.

    Args:
        key: the setting that names the weights, for the message.
        saved: the backbone of the weights, for the message.

    Raises:
        ConfigError: names or shapes differ; nothing is loaded.
    """
    own = backbone.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [f"{n} is {_shape(weights[n])}, not {_shape(own[n])}" for n in own if n in weights and weights[n].shape != own[n].shape]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for found, what in ((shapes, "of another shape"), (missing, "missing"), (extra, "unknown"))
        if found
    ]
    if problems:
        raise ConfigError(f"{key}: the weights ({saved}) do not fit this backbone: {'; '.join(problems)}; use the same backbone.* settings")
    backbone.load_state_dict(dict(weights))


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"
