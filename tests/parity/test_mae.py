"""MAE against a literal float64 transcription over several steps; what its loss sees; its pictures; two workers against one."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.mae import MAE, MAEConfig, patchify, unpatchify
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import RunFacts
from methods.parts.distributed import average_gradients
from methods.parts.errors import ConfigError
from methods.parts.masking import masked_of, random_keep
from methods.parts.views import Views
from methods.parts.vit import sincos_table
from pipeline.figures.reconstruction_charts import reconstructions
from pipeline.figures.style import to_uint8
from tests.parity.common import EXACT, in_processes, progress
from tests.parity.test_msn import gelu, literal_layer_norm

FACTS = RunFacts(global_batch_size=4, steps_per_epoch=10, total_steps=100)


def method_of(**settings: Any) -> MAE:
    vit = {"width": 0.125, "depth": (2,), "image_size": 16, "patch_size": 4, "positions": "sincos", "xavier": True}
    small = {"decoder_width": 8, "decoder_depth": 2, "decoder_heads": 2}
    return MAE(MAEConfig(**{**small, **settings}), build_backbone(BackboneConfig(name="vit_tiny_patch16_224", **vit)), FACTS).double()


def views_of(batch: int = 4, seed: int = 0, count: int = 1) -> Views:
    images = torch.randn(count * batch, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(batch)
    return Views(stacks={"global": images}, counts={"global": count}, image_ids=ids, labels=torch.full_like(ids, -1))


# ---------------------------------------------------------------------------- steps


def literal_block(w: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    y = literal_layer_norm(x, w, f"{name}.norm1") @ w[f"{name}.attn.qkv.weight"].T + w[f"{name}.attn.qkv.bias"]
    q, k, v = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in y.chunk(3, dim=1))
    y = (torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1) @ v).transpose(0, 1).flatten(1)
    x = x + y @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
    y = gelu(literal_layer_norm(x, w, f"{name}.norm2") @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"])
    return x + y @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]


def literal_positions(d: int) -> Tensor:
    """A row for each of 4 x 4 patches: [sin a o, cos a o, sin b o, cos b o], o_i = 10000^(-4 i / d)."""
    rows = []
    for a in range(4):
        for b in range(4):
            o = [10000 ** (-4 * i / d) for i in range(d // 4)]
            rows.append([f(at * x) for at in (a, b) for f in (math.sin, math.cos) for x in o])
    return torch.tensor(rows, dtype=torch.float64)


def literal_loss(w: dict[str, Tensor], images: Tensor, keep: Tensor, normalize: bool) -> Tensor:
    """One image, patch and pixel after the other."""
    terms = []
    for image, seen in zip(images, keep.tolist(), strict=True):
        cut = [image[:, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4] for a in range(4) for b in range(4)]
        kernel = w["backbone.patch_embed.proj.weight"]
        tokens = [(kernel * cut[i]).flatten(1).sum(1) + w["backbone.patch_embed.proj.bias"] + literal_positions(24)[i] for i in seen]
        x = torch.stack([w["backbone.cls_token"][0, 0], *tokens])
        for block in range(2):
            x = literal_block(w, f"backbone.blocks.{block}", x, 3)
        h = literal_layer_norm(x, w, "backbone.norm")
        y = [h[0] @ w["decoder.embed.weight"].T + w["decoder.embed.bias"]]
        for i in range(16):
            token = h[1 + seen.index(i)] @ w["decoder.embed.weight"].T + w["decoder.embed.bias"] if i in seen else w["decoder.mask_token"]
            y.append(token + literal_positions(8)[i])
        y = torch.stack(y)
        for block in range(2):
            y = literal_block(w, f"decoder.blocks.{block}", y, 2)
        predicted = literal_layer_norm(y, w, "decoder.norm") @ w["decoder.pixels.weight"].T + w["decoder.pixels.bias"]
        for i in set(range(16)) - set(seen):
            t = cut[i].permute(1, 2, 0).flatten()
            if normalize:
                t = (t - t.mean()) / (((t - t.mean()) ** 2).mean() + 1e-6).sqrt()
            terms.append(((predicted[1 + i] - t) ** 2).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("normalize", [True, False])
def test_steps_equal_the_equations(normalize: bool) -> None:
    torch.manual_seed(0)
    method = method_of(normalize_patches=normalize)
    with torch.no_grad():
        for name, p in method.named_parameters():
            if p.requires_grad:  # so that no weight hides behind 1 or 0
                p.add_(0.1 * torch.randn_like(p))
            elif name == "backbone.pos_embed":  # made in float32
                p.copy_(torch.cat([torch.zeros(1, 24), literal_positions(24)])[None])
    w = {name: p.detach().clone() for name, p in method.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for group in method.param_groups() for p in group.params], lr=0.05)
    for step in range(3):
        views = views_of(seed=step)
        [keep] = method.draw_masks(views, progress(step))
        assert keep.shape == (4, 4)
        loss = method(views, progress(step), [keep]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        w = {name: p.requires_grad_() for name, p in w.items()}
        want = literal_loss(w, views.stacks["global"], keep, normalize)
        gradients = torch.autograd.grad(want, list(w.values()))
        w = {name: (p - 0.05 * g).detach() for (name, p), g in zip(w.items(), gradients, strict=True)}
        assert loss.item() == pytest.approx(want.item(), rel=1e-6)  # the decoder's positions are float32
        for name, p in method.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.detach(), w[name], rtol=1e-5, atol=1e-7, msg=name)


def _gradients(rank: int, world: int, images: Tensor, keep: Tensor) -> tuple[float, list[Tensor]]:
    torch.manual_seed(0)
    method = method_of()
    own = images.chunk(world)[rank]
    views = Views(stacks={"global": own}, counts={"global": 1}, image_ids=torch.arange(len(own)), labels=torch.zeros(len(own)))
    loss = method(views, progress(), [keep.chunk(world)[rank]]).loss
    loss.backward()
    average_gradients(method.parameters())
    return loss.item(), [p.grad for p in method.parameters() if p.requires_grad]


def test_two_workers_equal_one_with_the_same_masks(tmp_path: Path) -> None:
    images, keep = views_of().stacks["global"], random_keep(torch.arange(4), 16, 4, seed=0)
    loss, gradients = _gradients(0, 1, images, keep)
    found = in_processes(2, tmp_path, partial(_gradients, images=images, keep=keep))
    assert np.mean([one for one, _ in found]) == pytest.approx(loss, rel=1e-10)
    for _, own in found:
        for a, b in zip(own, gradients, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


# ---------------------------------------------------------------------------- what is seen, what counts


def pixels_of(index: Tensor) -> Tensor:
    """Where the patches of `(B, m)` lie: `(B, 3, 16, 16)` bool."""
    grid = torch.zeros(len(index), 16, dtype=torch.bool).scatter_(1, index, True).view(-1, 1, 4, 4)
    return grid.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


def test_the_encoder_sees_the_kept_patches_only() -> None:
    method, images = method_of(), views_of().stacks["global"]
    seen: list[int] = []
    method.backbone.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    keep = method.draw(images, torch.arange(len(images)), seed=0)
    predicted, _ = method.predict(images, keep)
    other = torch.where(pixels_of(keep), images, torch.randn_like(images))
    torch.testing.assert_close(method.predict(other, keep)[0], predicted)
    assert seen == [5, 5] and predicted.shape == (4, 16, 48)


def test_errors_on_visible_patches_do_not_count() -> None:
    """The target may have any values where patches were seen; the same change at masked ones is felt."""
    method, views = method_of(normalize_patches=False), views_of()
    images = views.stacks["global"]
    keep = method.draw(images, torch.arange(len(images)), seed=0)
    plain, original = method(views, progress(), [keep]).loss.item(), method.pixel_targets
    for area, felt in ((keep, False), (masked_of(keep, 16), True)):
        changed = patchify(torch.where(pixels_of(area), images + 1, images), 4)
        method.pixel_targets = lambda _, changed=changed: changed  # what the encoder sees stays
        assert (method(views, progress(), [keep]).loss.item() != plain) == felt
    method.pixel_targets = original


def test_no_gradient_reaches_the_visible_pixels_of_the_picture() -> None:
    method, views = method_of(), views_of()
    keep = method.draw(views.stacks["global"], views.image_ids, seed=0)
    predicted = torch.randn(4, 16, 48, dtype=torch.float64, requires_grad=True)
    method.predict = lambda images, keep: (predicted, torch.randn(4, 24))
    method(views, progress(), [keep]).loss.backward()
    touched = predicted.grad.abs().sum(-1) > 0
    assert torch.equal(touched.nonzero()[:, 1].view(4, -1), masked_of(keep, 16))


def test_normalised_targets_do_not_change_with_brightness_and_contrast() -> None:
    method, images = method_of(), views_of().stacks["global"]
    targets = method.pixel_targets(images)
    torch.testing.assert_close(method.pixel_targets(7 * images + 3), targets, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(4, 16, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float((1 - targets.var(-1, correction=0)).abs().max()) < 1e-5
    assert method.config.hints(FACTS).chance_loss == (1.0, "1")
    assert MAEConfig(normalize_patches=False).hints(FACTS).chance_loss is None


@pytest.mark.parametrize(("height", "width", "patch"), [(16, 16, 4), (8, 24, 8), (12, 6, 3)])
def test_patches_and_back(height: int, width: int, patch: int) -> None:
    images = torch.randn(2, 3, height, width)
    patches = patchify(images, patch)
    assert patches.shape == (2, height * width // patch**2, 3 * patch**2)
    assert torch.equal(unpatchify(patches, patch, height), images)
    second = images[0, :, :patch, patch : 2 * patch] if width > patch else images[0, :, patch : 2 * patch, :patch]
    assert torch.equal(patches[0, 1], second.permute(1, 2, 0).flatten())


def test_crops_of_several_sizes_and_counts() -> None:
    method = method_of()
    images = {"global": torch.randn(8, 3, 16, 16).double(), "local": torch.randn(4, 3, 8, 8).double()}
    views = Views(stacks=images, counts={"global": 2, "local": 1}, image_ids=torch.arange(4), labels=torch.zeros(4))
    masks = method.draw_masks(views, progress())
    assert [tuple(keep.shape) for keep in masks] == [(8, 4), (4, 1)]
    assert method(views, progress(), masks).loss.isfinite()


# ---------------------------------------------------------------------------- pictures, settings


def test_reconstruction_keeps_what_was_seen_and_puts_colours_back() -> None:
    method, images = method_of(), views_of().stacks["global"]
    seen, made = method.reconstruct(images).unbind(1)
    masked = seen.isnan()
    assert float(masked.double().mean()) == 0.75
    assert torch.equal(seen[~masked], images[~masked])
    torch.testing.assert_close(made[~masked], images[~masked])
    method.predict = lambda x, keep: (method.pixel_targets(x), None)  # a decoder that knows
    torch.testing.assert_close(method.reconstruct(images)[:, 1], images)
    assert torch.equal(method.reconstruct(images)[:, 0].isnan(), masked)  # always the same masks


def test_picture_of_reconstructions(tmp_path: Path) -> None:
    from PIL import Image

    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[..., 0] = 255
    seen = images / 255.0
    seen[:, :4] = np.nan
    path = reconstructions(images, seen, np.full(images.shape, 2.0), tmp_path / "r.png")
    picture = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    colours = {tuple(c) for c in np.unique(picture, axis=0)}
    assert {(255, 0, 0), tuple(to_uint8(np.full(3, 0.75)))} <= colours
    with pytest.raises(ConfigError, match="images=3: 2 and 3 reconstructions"):
        reconstructions(images, seen[:2], seen, path)


def test_what_decays_and_what_is_fixed() -> None:
    method = method_of()
    matrices, vectors = method.param_groups()
    assert any(p is method.decoder.mask_token for p in vectors.params) and not vectors.decay
    assert not any(p is method.backbone.pos_embed for p in [*matrices.params, *vectors.params])
    out = method(views_of(), progress())
    out.loss.backward()
    assert all(p.grad is not None for p in [*matrices.params, *vectors.params])
    torch.testing.assert_close(sincos_table(4, 4, 24).double(), literal_positions(24), rtol=0, atol=1e-6)
    bound = math.sqrt(6 / (24 + 24))
    assert float(method.backbone.blocks[0].attn.qkv.weight.detach().abs().max()) <= bound + 1e-6


@pytest.mark.parametrize("settings", [{"mask_ratio": 0.0}, {"decoder_width": 30}, {"decoder_depth": 0}])
def test_settings_that_cannot_work_are_refused(settings: dict) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ConfigError, match=rf"method\.{name}={value}: "):
        MAEConfig(**settings)
    assert MAEConfig(mask_ratio=0.2).hints(FACTS).warnings and not MAEConfig().hints(FACTS).warnings


def test_one_fixed_batch_is_predicted() -> None:
    torch.manual_seed(0)
    method, views = method_of(decoder_width=32).float(), views_of()
    views.stacks["global"] = torch.rand(4, 3, 1, 1).expand(-1, -1, 16, 16) * torch.linspace(0, 1, 16)
    optimizer = torch.optim.AdamW([p for group in method.param_groups() for p in group.params], lr=3e-3)
    first = copy.deepcopy(method(views, progress()).metrics)
    for step in range(60):
        optimizer.zero_grad()
        out = method(views, progress(step))
        out.loss.backward()
        optimizer.step()
    assert float(out.metrics["explained"]) > 0.5 > float(first["explained"])
    assert isinstance(method.decoder.embed, nn.Linear)
