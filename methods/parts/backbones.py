"""Backbones by timm name, with a stem for small images. State-dict names stay timm's own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts.drop_path import follow_images
from methods.parts.errors import ConfigError, require
from methods.parts.fields import at_least, below_one, check_limits, positive
from methods.parts.selective_kernels import select_kernels
from methods.parts.vit import Positions, ViT, require_whole_patches, vit_settings, xavier


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A timm backbone without its classifier. `timm.list_models()` has the names."""

    name: str = "resnet50"
    #: ResNets: imagenet = 7x7 and max-pool, to 1/4 of the side; for small images 3x3: strided or pooled to 1/2, or full size
    stem: Literal["imagenet", "strided", "pooled", "full"] = "imagenet"
    #: multiplies the channels of a ResNet's stem and stages (below 1 the stem is three 3x3 convs) or the width of a ViT
    width: float = positive(1.0)
    selective_kernels: bool = False  # ResNets with bottlenecks: SimCLR v2's blocks, stem of three 3x3 convs and pooled shortcuts
    depth: tuple[int, ...] | None = None  # ResNets: blocks per stage; ViTs: one number of blocks; None = the model's own
    drop_path: float = below_one(0.0)  # stochastic depth rate
    #: image: each image drops paths by chance, at a rate that rises from 0 with depth; subset (ViTs): every path works on a part of the
    #: batch only, at the same rate in all blocks, which saves the time of what is dropped (DINOv2)
    drop_path_mode: Literal["image", "subset"] = "image"
    image_size: int | None = None  # ViTs: side the position table is made for; None = the model's own
    patch_size: int | None = None  # ViTs: None = the model's own
    heads: int | None = at_least(1, None)  # ViTs: attention heads of each block; None = the model's own (MoCo v3's ViT-S: 12)
    #: ViTs: a table that is learned and, on another grid, resized as in timm, or as in DINO; or one that is fixed (MoCo v3)
    positions: Positions = "learned"
    registers: int = at_least(0, 0)  # ViTs: tokens beside CLS that no patch stands for (arXiv:2309.16588)
    layer_scale: float | None = positive(None)  # ViTs: first value of the learned scale of each branch, e.g. 1e-5; None = without
    swiglu: bool = False  # ViTs: SwiGLU instead of the MLP in each block (DINOv2's largest)
    xavier: bool = False  # ViTs: MoCo v3's first weights; False = timm's
    init: str | None = None  # start from these weights: a .safetensors file, a run, or models:/NAME@ALIAS; None = random

    def __post_init__(self) -> None:
        check_limits(self, "backbone.")


def build_backbone(config: BackboneConfig) -> nn.Module:
    """Return an untrained backbone, `(B, 3, H, W) -> (B, num_features)`.

    A stem other than `imagenet` keeps small images large: the first convolution is 3x3 (or the first of three 3x3), with
    stride 2 if `strided`, else 1; only `pooled` keeps the max-pool.

    Raises:
        ConfigError: an unknown name, or a setting that this architecture does not have.
    """
    settings: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path and config.drop_path_mode == "image" else {}
    if config.image_size is not None:
        settings["img_size"] = config.image_size
    if config.patch_size is not None:
        settings["patch_size"] = config.patch_size
    try:
        if timm.models.is_model_in_modules(config.name, ["vision_transformer", "deit"]):
            return _vit(config, settings)
        return _other(config, settings)
    except (RuntimeError, TypeError, AssertionError) as error:
        close = timm.list_models(f"*{config.name[:5]}*")[:5]
        near = f"near names: {', '.join(close)}" if close else "timm.list_models() has the names"
        raise ConfigError(f"backbone.name={config.name}: timm cannot build it ({error}); {near}") from None


def _vit(config: BackboneConfig, settings: dict[str, Any]) -> nn.Module:
    _refuse(config, "has no ResNet stem", stem="use imagenet (for a ViT set backbone.patch_size)")
    _refuse(config, "is a ViT", selective_kernels="leave it out")
    if config.depth is not None:
        require(len(config.depth) == 1, "backbone.depth", config.depth, "a ViT has one number of blocks, e.g. 12")
        settings["depth"] = config.depth[0]
    with torch.random.fork_rng(devices=[]):  # what is drawn here must not change the weights below
        plain = timm.create_model(config.name, num_classes=0, depth=1)
    settings |= vit_settings(plain, width=config.width, heads=config.heads, registers=config.registers, swiglu=config.swiglu)
    if config.layer_scale is not None:
        settings["init_values"] = config.layer_scale
    model: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=0, dynamic_img_size=True, **settings)
    if not ViT.fits(model):
        _refuse(config, "is no plain ViT with a CLS token", positions="leave it out", xavier="leave it out", drop_path_mode="use image")
        return model
    vit = ViT(model, config.positions, subset_drop_path=config.drop_path if config.drop_path_mode == "subset" else 0.0)
    if config.image_size is not None:
        require_whole_patches(vit, "backbone.image_size", config.image_size)
    if config.xavier:
        xavier(vit)
    return vit


def _other(config: BackboneConfig, settings: dict[str, Any]) -> nn.Module:
    only = ("heads", "positions", "registers", "layer_scale", "swiglu", "xavier", "drop_path_mode")
    _refuse(config, "is no ViT", **dict.fromkeys(only, "leave it out, or use a ViT, e.g. vit_small_patch16_224"))
    if config.width != 1 or config.selective_kernels:
        stages = (64, 128, 256, 512)
        settings["channels"] = tuple(max(8, round(c * config.width / 8) * 8) for c in stages)
        settings |= {"stem_type": "deep", "stem_width": max(4, round(32 * config.width / 4) * 4)}
        settings |= {"avg_down": True} if config.selective_kernels else {}
    if config.depth is not None:
        settings["layers"] = config.depth
    backbone: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=0, **settings)
    follow_images(backbone)
    if config.selective_kernels:
        select_kernels(backbone)
    elif config.width > 1:  # timm widens a stem of three convolutions only
        _one_convolution(backbone, 7, 2)
    if config.stem != "imagenet":
        _small_stem(backbone, config)
    if not torch.cuda.is_available():  # a hook is a call of Python in every step, and breaks the graph of torch.compile
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d) and max(module.stride) > 1:
                module.register_forward_pre_hook(_fill_up_tiny_map)
    return backbone


def _refuse(config: BackboneConfig, why: str, **remedies: str) -> None:
    """Raise ConfigError if a setting that this kind of backbone does not have is not at its default."""
    defaults = {f.name: f.default for f in fields(config)}
    for name, remedy in remedies.items():
        value = getattr(config, name)
        require(value == defaults[name], f"backbone.{name}", value, f"{config.name} {why}; {remedy}")


def _fill_up_tiny_map(conv: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Add zeros to the right and below a map smaller than the stride; the convolution's own padding would add them too.

    On CPUs with AMX, oneDNN leaves part of the bf16 weight gradient of such a map uninitialised (torch 2.14: 3x3,
    stride 2, on 1x1 pixels), and training ends in NaN.
    """
    assert isinstance(conv, nn.Conv2d)
    (x,) = inputs
    if isinstance(conv.padding, str):
        return None
    missing = [max(0, stride - side) for stride, side in zip(conv.stride, x.shape[-2:], strict=True)]
    centred = tuple(2 * int(pad) + 1 for pad in conv.padding) == conv.kernel_size
    if x.device.type != "cpu" or not any(missing) or not centred:
        return None
    return (F.pad(x, (0, missing[1], 0, missing[0])),)


def _small_stem(backbone: nn.Module, config: BackboneConfig) -> None:
    conv = getattr(backbone, "conv1", None)
    if conv is None or not hasattr(backbone, "maxpool"):
        raise ConfigError(
            f"backbone.stem={config.stem}: {config.name} has no ResNet stem; use imagenet (for a ViT set backbone.patch_size)"
        )
    stride = 2 if config.stem == "strided" else 1
    if isinstance(conv, nn.Sequential):
        first = conv[0]
        assert isinstance(first, nn.Conv2d)
        first.stride = (stride, stride)
    else:
        _one_convolution(backbone, 3, stride)
    if config.stem != "pooled":
        backbone.maxpool = nn.Identity()


def _one_convolution(backbone: nn.Module, size: int, stride: int) -> None:
    """Replace the stem by one convolution, as wide as the norm that follows."""
    backbone.conv1 = nn.Conv2d(3, backbone.bn1.num_features, size, stride=stride, padding=size // 2, bias=False)  # type: ignore[union-attr,arg-type]
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")


def num_features(backbone: nn.Module) -> int:
    """Return the width D of the features, as timm states it."""
    return int(backbone.num_features)  # type: ignore[arg-type]
