"""The vision transformers: tokens, positions, masks, dropped patches, resolutions; timm's names and timm's values."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath, resample_abs_pos_embed
from torch import Tensor, nn

from methods.parts import ema
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.drop_path import without_drop_path
from methods.parts.errors import ConfigError
from methods.parts.views import Views
from methods.parts.vit import (
    ViT,
    compile_blocks,
    enable_gradient_checkpointing,
    freeze_patch_projection,
    new_mask_token,
    require_vit,
    require_whole_patches,
    resize_grid,
    sincos_table,
)
from pipeline.export.weights import load_export
from pipeline.export.write import export

SMALL = {"name": "vit_tiny_patch16_224", "width": 0.125, "depth": (3,), "image_size": 32, "patch_size": 8}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def vit(**settings: Any) -> ViT:
    """A small ViT, D = 24, 3 heads, 4 x 4 patches of 8 pixels, with weights far from those of the start."""
    torch.manual_seed(0)
    network = require_vit(build_backbone(BackboneConfig(**{**SMALL, **settings})), "this test").eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * (0.3 if "token" in name or "pos_embed" in name else 0.1))
    return network


def images(side: int = 32, count: int = 3) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(side))


# ---------------------------------------------------------------------------- timm's own


@pytest.mark.parametrize("settings", [{}, {"registers": 2}, {"layer_scale": 0.1}, {"swiglu": True}])
def test_names_and_values_are_those_of_timm(settings: dict) -> None:
    own = vit(**settings)
    arguments: dict[str, Any] = {"embed_dim": 24, "depth": 3, "img_size": 32, "patch_size": 8, "dynamic_img_size": True, "num_classes": 0}
    arguments |= {"reg_tokens": 2, "no_embed_class": True} if "registers" in settings else {}
    arguments |= {"init_values": 0.1} if "layer_scale" in settings else {}
    if "swiglu" in settings:
        arguments |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 128.5 / 24}
    plain = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    plain.load_state_dict(own.state_dict())  # strict
    assert type(plain) is not ViT and own.num_features == 24
    for side in (32, 16, 48):
        torch.testing.assert_close(own(images(side)), plain(images(side)), **CLOSE)
        torch.testing.assert_close(own.forward_features(images(side)), plain.forward_features(images(side)), **CLOSE)


def test_tokens_are_those_behind_the_final_norm() -> None:
    network = vit(registers=2)
    found, whole = network.tokens(images()), network.forward_features(images())
    torch.testing.assert_close(found.cls, whole[:, 0])
    torch.testing.assert_close(found.cls, network(images()))
    torch.testing.assert_close(found.registers, whole[:, 1:3])
    torch.testing.assert_close(found.patches, whole[:, 3:])
    assert found.patches.shape == (3, 16, 24)


def test_the_last_layers_are_normed() -> None:
    network = vit()
    layers = network.layers(images(), 2)
    timms = network.get_intermediate_layers(images(), 2, return_prefix_tokens=True, norm=True)
    for own, (patches, prefix) in zip(layers, timms, strict=True):
        torch.testing.assert_close(own.patches, patches)
        torch.testing.assert_close(own.cls, prefix[:, 0])
    torch.testing.assert_close(layers[-1].cls, network(images()))


def test_it_is_copied_and_pickled_like_any_module() -> None:
    network = vit(positions="learned-offset")
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert isinstance(twin, ViT)
        with torch.no_grad():
            twin.pos_embed.add_(1)
        assert not torch.allclose(twin(images(16)), network(images(16)))
        with torch.no_grad():
            twin.pos_embed.copy_(network.pos_embed)
        torch.testing.assert_close(twin(images(16)), network(images(16)))


# ---------------------------------------------------------------------------- masks and dropped patches


def test_dropped_patches_equal_fewer_tokens_by_hand() -> None:
    network = vit(registers=1)
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    x = network.with_positions(network.patch_embed(images()))
    rows = torch.stack([torch.cat([x[b, :2], x[b, 2:][keep[b]]]) for b in range(3)])
    want = network.norm(network.blocks(rows))
    found = network.tokens(images(), keep=keep)
    torch.testing.assert_close(found.cls, want[:, 0])
    torch.testing.assert_close(found.patches, want[:, 2:])
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(network.tokens(images(), keep=everything).patches, network.tokens(images()).patches)


def test_masked_patches_lose_their_content_and_keep_their_position() -> None:
    network = vit()
    token = new_mask_token(network)
    assert token.shape == (24,) and not token.any()
    token.data.normal_()
    masked = torch.rand(3, 16) < 0.4
    found = network.tokens(images(), masked=masked, mask_token=token)
    content = network.patch_embed(images()).flatten(1, 2)
    content[masked] = token.detach()
    x = torch.cat([network.cls_token.expand(3, -1, -1), content], dim=1) + network.pos_embed
    torch.testing.assert_close(found.patches, network.norm(network.blocks(x))[:, 1:])
    found.cls.sum().backward()
    assert token.grad is not None and token.grad.abs().sum() > 0
    other = images()
    for b, patch in masked.nonzero().tolist():  # what lies under the mask is not seen
        other[b, :, patch // 4 * 8 : patch // 4 * 8 + 8, patch % 4 * 8 : patch % 4 * 8 + 8] = 9
    torch.testing.assert_close(network.tokens(other, masked=masked, mask_token=token).cls, found.cls)
    nothing = torch.zeros(3, 16, dtype=torch.bool)
    torch.testing.assert_close(network.tokens(images(), masked=nothing, mask_token=token).cls, network(images()))


# ---------------------------------------------------------------------------- resolutions and positions


def test_one_forward_for_each_resolution_equals_one_for_each_crop() -> None:
    network, calls = vit(), []
    network.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    stacks = {"a": images(32, 6), "b": images(32, 3), "c": images(16, 12), "d": images(24, 0)}
    views = Views(stacks=stacks, counts={"a": 2, "b": 1, "c": 4, "d": 0}, image_ids=torch.arange(3), labels=torch.arange(3))
    found = views.map_crops(network).split(3)
    assert calls == [(9, 3, 32, 32), (12, 3, 16, 16)]
    assert len(found) == 7
    for own, crop in zip(found, views.crops, strict=True):
        torch.testing.assert_close(own, network(crop), **CLOSE)


def cubic(x: float) -> float:
    """Keys's kernel with a = -3/4."""
    a, x = -0.75, abs(x)
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize(("old", "new"), [(14, 6), (4, 7), (5, 3)])
def test_positions_with_an_offset_equal_the_formula(old: int, new: int) -> None:
    """Pixel i of the result is read at (i + 1/2) M / (h + 0.1) - 1/2; edges are repeated."""
    table = torch.randn(1, 2, old, old, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(j, 0), old - 1)] += cubic(at - j)
    want = np.einsum("ia,jb,cab->cij", weights, weights, table[0].numpy())
    np.testing.assert_allclose(resize_grid(table, new, new, offset=0.1)[0].numpy(), want, atol=1e-12)


def test_positions_of_both_kinds_on_another_grid() -> None:
    plain, offset = vit(), vit(positions="learned-offset")
    for h, w in ((2, 2), (6, 6), (3, 5)):
        timms = resample_abs_pos_embed(plain.pos_embed, new_size=[h, w], old_size=[4, 4], num_prefix_tokens=1)
        assert torch.equal(plain.position_table(h, w), timms)
        assert not torch.allclose(offset.position_table(h, w), timms, atol=0.01)
        assert torch.equal(offset.position_table(h, w)[:, 0], offset.pos_embed[:, 0])  # CLS
    assert plain.position_table(4, 4) is plain.pos_embed
    torch.testing.assert_close(plain(images()), offset(images()))
    assert not torch.allclose(plain(images(16)), offset(images(16)), atol=1e-3)
    assert plain.double().position_table(2, 2).dtype == torch.float64


def test_fixed_positions_equal_the_formula() -> None:
    table = sincos_table(3, 5, 8)
    for row in range(3):
        for column in range(5):
            omega = [1.0, 10000**-0.5]
            want = [np.sin(row * o) for o in omega] + [np.cos(row * o) for o in omega]
            want += [np.sin(column * o) for o in omega] + [np.cos(column * o) for o in omega]
            np.testing.assert_allclose(table[row * 5 + column].numpy(), want, atol=1e-7)
    network = vit(positions="sincos")
    torch.testing.assert_close(network.pos_embed[0, 1:], sincos_table(4, 4, 24))
    assert not network.pos_embed[0, 0].any() and not network.pos_embed.requires_grad
    assert set(network.state_dict()) == set(vit().state_dict())
    with pytest.raises(ConfigError, match=r"backbone\.positions=sincos: the width 6"):
        sincos_table(2, 2, 6)


# ---------------------------------------------------------------------------- how they are made


def test_first_weights_of_moco_v3() -> None:
    network = require_vit(build_backbone(BackboneConfig(**SMALL, xavier=True)), "this test")
    d = 24
    bounds = {
        "blocks.0.attn.qkv": 6 / (d + d),
        "blocks.0.attn.proj": 6 / (d + d),
        "blocks.1.mlp.fc1": 6 / (5 * d),
        "patch_embed.proj": 6 / (3 * 64 + d),
    }
    for name, square in bounds.items():
        module = network.get_submodule(name)
        bound = square**0.5
        assert 0.95 * bound < float(module.weight.detach().abs().max()) <= bound and not module.bias.any()
        assert float(module.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert 0 < float(network.cls_token.detach().abs().max()) < 1e-4


def test_settings_of_the_blocks() -> None:
    network = build_backbone(BackboneConfig(name="vit_small_patch16_224", heads=12, depth=(2,), drop_path=0.2, layer_scale=1e-5))
    assert network.blocks[0].attn.num_heads == 12 and network.embed_dim == 384 and len(network.blocks) == 2
    assert float(network.blocks[0].ls1.gamma[0].detach()) == pytest.approx(1e-5)
    assert [m.drop_prob for m in network.modules() if isinstance(m, DropPath)][-1] == pytest.approx(0.2)
    teacher = without_drop_path(ema.frozen_copy(network)).train()
    assert torch.equal(teacher(images(224, 2)), teacher(images(224, 2)))
    assert [m.drop_prob for m in network.modules() if isinstance(m, DropPath)][-1] == pytest.approx(0.2)
    for name, hidden in (("vit_small_patch16_224", 1024), ("vit_base_patch16_224", 2048)):
        fused = build_backbone(BackboneConfig(name=name, depth=(1,), swiglu=True)).blocks[0].mlp
        assert (fused.fc1.out_features, fused.fc2.in_features) == (2 * hidden, hidden)


def test_frozen_patch_projection() -> None:
    network = vit().train()
    freeze_patch_projection(network)
    network(images()).sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is None} == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    freeze_patch_projection(nn.Linear(2, 2))  # nothing to freeze


@pytest.mark.parametrize("path", ["forward", "tokens"])
def test_gradient_checkpointing_gives_the_same_gradients(path: str) -> None:
    plain = vit(drop_path=0.3).train()
    saving = copy.deepcopy(plain)
    enable_gradient_checkpointing(nn.Sequential(saving))
    for network in (plain, saving):
        torch.manual_seed(1)
        out = network(images()) if path == "forward" else network.tokens(images()).cls
        (out**2).sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_blocks_keep_names_and_values() -> None:
    network = vit()
    want, names = network(images()), list(network.state_dict())
    used = []

    def backend(graph: Any, inputs: Any) -> Any:
        used.append(graph)
        return graph.forward

    compile_blocks(nn.Sequential(network), backend=backend)
    torch.testing.assert_close(network(images()), want)
    assert used and list(network.state_dict()) == names


def test_attention_of_cls_by_hand() -> None:
    network = vit(registers=1)
    found = network.cls_attention(images())
    inputs: list[Tensor] = []
    network.blocks[-1].attn.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    network(images())
    weight, bias = network.blocks[-1].attn.qkv.weight, network.blocks[-1].attn.qkv.bias
    for head in range(3):
        own = slice(8 * head, 8 * head + 8)
        q = inputs[0] @ weight[:24][own].T + bias[:24][own]
        k = inputs[0] @ weight[24:48][own].T + bias[24:48][own]
        want = (q[:, 0, None] * k).sum(-1).div(8**0.5).softmax(-1)[:, 2:]
        torch.testing.assert_close(found[:, head], want)
    assert found.shape == (3, 3, 16) and bool((found.sum(-1) < 1).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SMALL, "image_size": 30}, r"backbone\.image_size=30: not a multiple of .* patches of 8 pixels; use 24 or 32"),
        ({**SMALL, "heads": 5, "width": 1.0}, r"backbone\.heads=5: does not divide the width 192"),
        ({**SMALL, "depth": (2, 2)}, r"backbone\.depth=\(2, 2\): a ViT has one number"),
        ({**SMALL, "selective_kernels": True}, r"backbone\.selective_kernels=True: vit_tiny_patch16_224 is a ViT"),
        ({"name": "resnet18", "heads": 4}, r"backbone\.heads=4: resnet18 is no ViT"),
        ({"name": "resnet18", "positions": "sincos"}, r"backbone\.positions=sincos: resnet18 is no ViT"),
        ({"name": "vit_base_patch16_gap_224", "xavier": True, "depth": (1,)}, r"backbone\.xavier=True: .* no plain ViT with a CLS token"),
        ({**SMALL, "registers": -1}, r"backbone\.registers=-1"),
        ({**SMALL, "layer_scale": 0.0}, r"backbone\.layer_scale=0\.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneConfig(**settings))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("deit3_small_patch16_224", True),
        ("vit_small_patch14_reg4_dinov2", True),
        ("vit_base_patch16_clip_224", True),
        ("deit_tiny_distilled_patch16_224", False),
        ("vit_base_patch16_siglip_224", False),
        ("vit_small_patch16_18x2_224", False),
    ],
)
def test_other_transformers_of_timm(name: str, plain: bool) -> None:
    """Plain ones are a `ViT` with timm's features; the others stay as they are."""
    network = build_backbone(BackboneConfig(name=name, depth=(1,))).eval()
    assert isinstance(network, ViT) == plain
    side = 4 * network.patch_embed.patch_size[0]
    features = network(images(side, 2))
    assert features.shape == (2, network.num_features)
    if plain:
        torch.testing.assert_close(network.tokens(images(side, 2)).cls, features)
        assert network.cls_attention(images(side, 2)).shape[2] == 16


def test_sizes_that_are_no_whole_patches_are_refused() -> None:
    network = vit()
    with pytest.raises(ConfigError, match=r"views\.local\.size=20: not a multiple of .* 8 pixels; use 16 or 24"):
        require_whole_patches(network, "views.local.size", 20)
    with pytest.raises(ConfigError, match=r"=20: not a multiple"):
        network.tokens(images(20))
    require_whole_patches(build_backbone(BackboneConfig(name="resnet18")), "views.local.size", 21)
    with pytest.raises(ConfigError, match=r"cannot use a ResNet; use a ViT"):
        require_vit(build_backbone(BackboneConfig(name="resnet18")), "mae")
    for change, key in ((enable_gradient_checkpointing, "gradient_checkpointing"), (compile_blocks, "compile")):
        with pytest.raises(ConfigError, match=rf"train\.{key}=True: .* this backbone has none"):
            change(nn.Linear(2, 2))


def test_an_export_is_the_same_network(tmp_path: Path) -> None:
    """Position table, registers, SwiGLU and scales come back from the description and the weights."""
    settings = {"positions": "sincos", "registers": 2, "layer_scale": 0.1, "swiglu": True, "heads": 6}
    network = vit(**settings)
    config = BackboneConfig(**{**SMALL, **settings})
    export(network, config, tmp_path, size=32, mean=(0.5,) * 3, std=(0.2,) * 3, facts={})
    loaded, spec = load_export(tmp_path)
    assert isinstance(loaded, ViT) and spec.backbone == config and not loaded.pos_embed.requires_grad
    for side in (32, 16):
        torch.testing.assert_close(loaded(images(side)), network(images(side)))
