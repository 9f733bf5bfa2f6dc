"""A backbone outside its run: `backbone.safetensors` (plain timm names, float32) beside `backbone.json` (how to build and feed it).

`pipeline.export.write` writes them; the served model uses this file too: nothing here needs more than torch, timm and safetensors.
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
    """What `backbone.json` says."""

    backbone: BackboneConfig
    size: int  # side of an embedded image, pixels
    mean: Triple  # normalisation, in [0, 1]
    std: Triple
    features: int  # width D of an embedding
    facts: dict[str, Any]  # method, recipe, data fingerprint, scores ...: for people


def read_export(path: Path) -> tuple[dict[str, Tensor], ExportSpec]:
    """Weights and description of an export: its folder, or a `.safetensors` file with the JSON of the same name beside it.

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
    """The backbone of an export, in evaluation mode."""
    backbone = build_backbone(spec.backbone)
    fill(backbone, weights, "model", wording(spec.backbone))
    return backbone.eval()


def load_export(path: Path) -> tuple[nn.Module, ExportSpec]:
    """The backbone of an export, in evaluation mode on the CPU, with its description; nothing in the files can run code.

    Raises:
        ConfigError: a file is missing, damaged, or does not fit the other.
    """
    weights, spec = read_export(path)
    return build_export(weights, spec), spec


def wording(config: BackboneConfig) -> str:
    """A backbone's settings in a line, without those that have their default."""
    plain = BackboneConfig(name="")
    settings = {name: value for name, value in vars(config).items() if value != getattr(plain, name) and name not in ("init", "drop_path")}
    return "backbone " + " ".join(f"{name}={value}" for name, value in settings.items())


def fill(backbone: nn.Module, weights: Mapping[str, Tensor], key: str, saved: str) -> None:
    """Load weights, all or none.

    Raises:
        ConfigError: `key` cannot work, because names or shapes differ; `saved` says what the weights were made for.
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
