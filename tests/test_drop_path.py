"""Counter-based random numbers, and the drop path that is made of them: of the image, not of the worker."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from methods.dino import DINO, DINOConfig
from methods.mae import MAE, MAEConfig
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import Method, Progress, RunFacts
from methods.parts.counter_random import random_words
from methods.parts.distributed import average_gradients
from methods.parts.drop_path import DropPath, images_of_step
from methods.parts.norms import convert_sync_batchnorm
from methods.parts.views import Views
from methods.parts.vit import enable_gradient_checkpointing
from tests.parity.common import in_processes

BATCH = 8
VIT = BackboneConfig(name="vit_tiny_patch16_224", width=0.25, depth=(3,), image_size=16, patch_size=4, drop_path=0.5)
RESNET = BackboneConfig(name="resnet18", width=0.125, depth=(1, 1, 1, 1), stem="strided", drop_path=0.5)

# ---------------------------------------------------------------------------- numbers


def test_words_are_those_of_a_plain_transcription() -> None:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    seed, ids = 2**61 + 12345, [0, 7, 2**33 + 5]
    words = random_words(torch.tensor(ids), 2, 3, seed)
    assert words.shape == (6, 3)
    for v in range(2):
        for i, image in enumerate(ids):
            row = mix(((image ^ image >> 32) + seed % 2**32) % 2**32)
            want = [mix((row + (3 * v + c) * 0x9E3779B1 + seed % 2**32 * 0x85EBCA6B + (seed >> 32)) % 2**32) for c in range(3)]
            assert words[3 * v + i].tolist() == want


def test_words_are_uniform_and_independent_over_images_columns_and_seeds() -> None:
    u = torch.stack([random_words(torch.arange(400), 2, 30, seed) for seed in (0, 1, 2**40)]).double() / 2**32
    counts = torch.histc(u.flatten(), bins=64, min=0, max=1)
    expected = u.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5  # chi squared
    for axis in range(3):
        a, b = u.narrow(axis, 0, u.shape[axis] - 1).flatten(), u.narrow(axis, 1, u.shape[axis] - 1).flatten()
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / len(a) ** 0.5


def test_words_depend_on_the_id_alone() -> None:
    ids = torch.randperm(1000)[:64]
    whole = random_words(ids, 3, 5, 9).view(3, 64, 5)
    assert torch.equal(random_words(ids[3::4], 3, 5, 9).view(3, 16, 5), whole[:, 3::4])


# ---------------------------------------------------------------------------- drop path


def test_paths_are_dropped_at_their_rate_and_scaled() -> None:
    drop, x = DropPath(0.25).train(), torch.ones(4000, 3, 2)
    with images_of_step(torch.arange(2000), torch.Generator().manual_seed(0)):
        once, again = drop(x), drop(x)
    assert once.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((once[:, 0, 0] > 0).double().mean()) == pytest.approx(0.75, abs=0.03)
    assert bool((once == once[:, :1, :1]).all())  # a whole row or nothing of it
    both = float(((once > 0) & (again > 0)).double().mean())
    assert both == pytest.approx(0.75**2, abs=0.03)  # a second pass drops others, and so does a second crop
    assert float(((once[:2000] > 0) & (once[2000:] > 0)).double().mean()) == pytest.approx(0.75**2, abs=0.03)
    assert torch.equal(drop.eval()(x), x)


def test_where_images_are_not_known_timm_draws() -> None:
    drop, x = DropPath(0.5).train(), torch.ones(1000, 2)
    assert 0.4 < float((drop(x) > 0).double().mean()) < 0.6
    with images_of_step(torch.arange(7), None):
        assert 0.4 < float((drop(x) > 0).double().mean()) < 0.6  # no whole crops


def test_blocks_that_are_computed_again_drop_the_same() -> None:
    """Two passes before one backward: of large crops and of small ones."""
    torch.manual_seed(0)
    plain = build_backbone(VIT).train()
    saving = copy.deepcopy(plain)
    enable_gradient_checkpointing(nn.Sequential(saving))
    large, small = torch.randn(8, 3, 16, 16), torch.randn(4, 3, 8, 8)
    for network in (plain, saving):
        with images_of_step(torch.arange(4), torch.Generator().manual_seed(0)):
            out = torch.cat([network(large), network(small)])
        (out**2).sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---------------------------------------------------------------------------- workers


def _method(name: str) -> Method:
    facts = RunFacts(global_batch_size=BATCH, steps_per_epoch=4, total_steps=40, num_images=64)
    if name == "mae":
        return MAE(MAEConfig(decoder_width=24, decoder_depth=1, decoder_heads=3), build_backbone(VIT), facts)
    config = DINOConfig(num_prototypes=16, projector_hidden=16, projection_dim=8, freeze_prototypes_epochs=0)
    return DINO(config, build_backbone(VIT) if name == "dino" else _resnet(), facts)


def _resnet() -> nn.Module:
    """timm begins with blocks that add nothing, whether they are dropped or not."""
    network = build_backbone(RESNET)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def _steps(rank: int, world: int, name: str) -> dict[str, Any]:
    """Two steps on this worker's chunks of the batch: r, r + W, ... of four, as the stream deals them."""
    torch.manual_seed(0)
    method = _method(name).double().train()
    g = torch.Generator().manual_seed(1)
    sides = {"global": 16} if name == "mae" else {"global": 16, "local": 8}
    rows = torch.cat(torch.arange(BATCH).chunk(4)[rank::world])
    stacks = {n: torch.randn(2, BATCH, 3, side, side, dtype=torch.float64, generator=g)[:, rows].flatten(0, 1) for n, side in sides.items()}
    ids = (torch.arange(BATCH) + 20)[rows]
    views = Views(stacks, dict.fromkeys(sides, 2), ids, ids)
    if world > 1:
        convert_sync_batchnorm(method)
    optimizer, losses = torch.optim.SGD(method.parameters(), lr=0.1), []
    for step in range(2):
        torch.manual_seed(100 * rank + step)  # what is drawn without an image may differ
        at = Progress(step=step, total_steps=40, steps_per_epoch=4, generator=torch.Generator().manual_seed(step))
        method.before_step(at)
        out = method(views, at, method.draw_masks(views, at))
        optimizer.zero_grad()
        out.loss.backward()
        average_gradients(method.parameters())
        optimizer.step()
        method.after_step([out.outputs], at)
        losses.append(out.loss.detach())
    return {"losses": torch.stack(losses), "state": {n: v for n, v in method.state_dict().items() if "running" not in n}}


@pytest.mark.parametrize("name", ["dino", "dino-resnet", "mae"])
def test_two_workers_drop_the_paths_of_one(name: str, tmp_path: Path) -> None:
    one = _steps(0, 1, name)
    two = in_processes(2, tmp_path, partial(_steps, name=name))
    torch.testing.assert_close(torch.stack([part["losses"] for part in two]).mean(dim=0), one["losses"], rtol=1e-9, atol=0)
    for part in two:
        for key, value in one["state"].items():
            torch.testing.assert_close(part["state"][key], value, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("make", [lambda: build_backbone(VIT), _resnet])
def test_at_this_rate_two_passes_differ(make: Callable[[], nn.Module]) -> None:
    """So the test above would notice."""
    network, x = make().train(), torch.randn(BATCH, 3, 16, 16)
    assert float((network(x) - network(x)).abs().mean().detach()) > 1e-3
