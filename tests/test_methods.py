"""Every registered method, in one place: it builds, learns one batch, restores bit-exactly. New methods join by existing."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import Method, Progress, RunFacts, find, registered
from methods.parts.errors import ConfigError
from methods.parts.selective_kernels import SelectiveKernel
from methods.parts.views import CropGroup, Views
from pipeline.build import build_method
from pipeline.config import OptimConfig, RunConfig, flatten, override
from pipeline.recipes import entries, load_recipe
from pipeline.train.optim import build_optimizer

SMALL = [entry.name for entry in entries() if entry.name.endswith("-small")]
BATCH = 16
TINY = BackboneConfig(name="resnet18", width=0.125, stem="strided")
TINY_VIT = BackboneConfig(name="vit_tiny_patch16_224", width=0.25, depth=(2,), image_size=32, patch_size=4)


def tiny(config: RunConfig) -> BackboneConfig:
    """A ResNet, or a ViT for a method that works on patches."""
    facts = RunFacts(global_batch_size=BATCH, steps_per_epoch=4, total_steps=400, num_images=16 * BATCH)
    try:
        find(config.method).method(config.method, build_backbone(TINY), facts)
    except ConfigError as error:
        assert "backbone.name" in str(error)
        return TINY_VIT
    return TINY


def built(recipe: str, **settings: object) -> tuple[Method, Views]:
    """A method with its small recipe's settings on a tiny backbone, and one fixed batch."""
    config = load_recipe(recipe)
    config = replace(config, method=replace(config.method, **settings))
    torch.manual_seed(0)
    facts = RunFacts(global_batch_size=BATCH, steps_per_epoch=4, total_steps=400, num_images=16 * BATCH)
    backbone = build_backbone(tiny(config))
    method = find(config.method).method(config.method, backbone, facts)
    counts = {name: group.count for name, group in config.views.items()}
    sides = {name: max(8, group.size * 32 // config.evaluation_size) for name, group in config.views.items()}  # at most 32
    stacks = {name: torch.randn(counts[name] * BATCH, 3, side, side) for name, side in sides.items()}
    ids, roles = torch.arange(BATCH), {name: group.role for name, group in config.views.items()}
    return method, Views(stacks=stacks, counts=counts, roles=roles, image_ids=ids, labels=torch.full_like(ids, -1))


def progress(step: int) -> Progress:
    return Progress(step=step, total_steps=400, steps_per_epoch=4, generator=torch.Generator().manual_seed(step))


def begin(method: Method, views: Views) -> int:
    """The step from which on there is a loss: a method may spend its first pass without one."""
    for step in range(4):
        torch.manual_seed(step)
        if method.has_loss(progress(step)):
            return 0
        with torch.no_grad():
            out = method(views, progress(step))
        assert out.loss is None
        method.after_step([out.outputs], progress(step))
    method.end_epoch(progress(3))
    method.start_epoch(progress(4))
    return 4


def advance(method: Method, optimizer: torch.optim.Optimizer, views: Views, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        method.before_step(progress(step))
        out = method(views, progress(step))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step([out.outputs], progress(step))
        losses.append(out.loss.item())
    return losses


def test_each_registered_method_has_a_small_recipe_and_a_paper() -> None:
    covered = {find(load_recipe(recipe).method).name for recipe in SMALL}
    assert covered == set(registered())
    assert all("arXiv" in entry.method.paper for entry in registered().values())


@pytest.mark.parametrize("recipe", [name for name in SMALL if "-cifar10-" not in name])  # those have the same methods
def test_learns_one_fixed_batch(recipe: str) -> None:
    """With networks that follow another held still, and nothing enqueued: keys of the one batch would become its negatives."""
    method, views = built(recipe)
    for name in {"momentum", "memory_momentum"} & set(vars(method.config)):
        method.config = replace(method.config, **{name: 1.0})
    first = begin(method, views)
    method.after_step = lambda outputs, progress: None
    optimizer = build_optimizer(OptimConfig(name="adamw", base_lr=3e-3), method.param_groups())
    losses = advance(method, optimizer, views, range(first, first + 20))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("recipe", SMALL)
def test_state_is_complete_before_the_first_step_and_restores_bit_exactly(recipe: str) -> None:
    method, views = built(recipe)
    keys = set(method.state_dict())
    optimizer = build_optimizer(OptimConfig(name="adamw"), method.param_groups())
    first = begin(method, views)
    advance(method, optimizer, views, range(first, first + 3))
    assert set(method.state_dict()) == keys
    again, _ = built(recipe)
    again.load_state_dict(method.state_dict())
    for name, table in again.memory_banks().items():
        table.load([piece.clone() for piece in method.memory_banks()[name].pieces()])
    other = build_optimizer(OptimConfig(name="adamw"), again.param_groups())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert advance(again, other, views, range(first + 3, first + 6)) == advance(method, optimizer, views, range(first + 3, first + 6))
    for name, value in method.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for name, table in again.memory_banks().items():
        assert torch.equal(table.rows, method.memory_banks()[name].rows), name


@pytest.mark.parametrize("recipe", SMALL)
def test_a_method_can_be_sent_to_a_worker(recipe: str) -> None:
    method, views = built(recipe)
    first = begin(method, views)
    sent = pickle.loads(pickle.dumps(method))
    losses = []
    for one in (method, sent):
        torch.manual_seed(0)
        losses.append(one(views, progress(first)).loss.item())
    assert losses[0] == losses[1] and method.state_dict().keys() == sent.state_dict().keys()


@pytest.mark.parametrize("recipe", SMALL)
def test_parameter_groups_hold_every_trained_parameter_once(recipe: str) -> None:
    method, _ = built(recipe)
    held = [id(p) for group in method.param_groups() for p in group.params]
    assert sorted(held) == sorted(id(p) for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("recipe", SMALL)
def test_micro_batches_are_refused_with_a_remedy_where_the_loss_needs_the_whole_batch(recipe: str) -> None:
    config = override(load_recipe(recipe), {"train.accumulation_steps": 2})
    config = replace(config, backbone=tiny(config))
    kind = built(recipe)[0]  # its settings may decide
    facts = RunFacts(global_batch_size=BATCH, steps_per_epoch=4, total_steps=400, num_images=16 * BATCH)
    if not kind.whole_batch_remedy:
        build_method(config, facts)
        return
    with pytest.raises(ConfigError, match=rf"accumulation_steps=2: .* whole batch at once; use 1 \({kind.whole_batch_remedy}\)"):
        build_method(config, facts)


SCARCE = RunFacts(global_batch_size=2, steps_per_epoch=1, total_steps=1, num_images=1, num_ids=1, num_features=4096)


@pytest.mark.parametrize("recipe", SMALL)
def test_hints_name_settings_that_there_are(recipe: str) -> None:
    config = load_recipe(recipe)
    for facts in (SCARCE, RunFacts(global_batch_size=256, steps_per_epoch=10**6, total_steps=10**8)):
        hints = config.method.hints(facts)
        assert hints.remedies.startswith("try ")
        keys = re.findall(r"\b(?:method|optim|train|views)\.[a-z_]+", " ".join([hints.remedies, *hints.warnings]))
        assert set(keys) <= set(flatten(config))
        assert hints.chance_loss is None or hints.chance_loss[0] > 0
        assert all(step < facts.total_steps for step in hints.settling_steps) or facts is SCARCE


def test_scores_are_compared_after_a_queue_is_full_and_prototypes_learn() -> None:
    facts = RunFacts(global_batch_size=100, steps_per_epoch=40, total_steps=4000)
    for name, settings, steps in (
        ("swav", {"queue_length": 500, "queue_start_epoch": 3}, (125, 40)),
        ("swav", {"queue_start_epoch": 3}, (0, 40)),  # without a queue
        ("moco", {"queue_length": 500}, (5,)),
        ("dino", {"freeze_prototypes_epochs": 0.5}, (20,)),
    ):
        assert registered()[name].config(**settings).hints(facts).settling_steps == steps


@pytest.mark.parametrize("recipe", SMALL)
def test_backbone_to_evaluate_gives_features(recipe: str) -> None:
    method, views = built(recipe)
    backbone = method.evaluation_backbone().eval()
    features = backbone(views.crops[0])
    assert features.shape == (BATCH, backbone.num_features)


@pytest.mark.parametrize("recipe", SMALL)
def test_weights_that_a_run_starts_from_reach_every_copy_of_the_backbone(recipe: str) -> None:
    def start_from(backbone: nn.Module) -> None:
        with torch.no_grad():
            for p in backbone.parameters():
                p.fill_(0.125)

    config = load_recipe(recipe)
    config = replace(config, backbone=tiny(config))
    facts = RunFacts(global_batch_size=config.train.global_batch_size, steps_per_epoch=4, total_steps=400, num_images=1000, num_ids=1000)
    method = build_method(config, facts, start_from)
    first_layers = [p for name, p in method.named_parameters() if name.endswith(("conv1.0.weight", "patch_embed.proj.weight"))]
    assert first_layers and all(bool((p == 0.125).all()) for p in first_layers)


@pytest.mark.parametrize("recipe", SMALL)
def test_cluster_scores_are_of_each_image_by_itself(recipe: str) -> None:
    method, views = built(recipe)
    if not method.has_clusters:
        with pytest.raises(NotImplementedError):
            method.cluster_scores(views.crops[0])
        return
    method.eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():
        scores = method.cluster_scores(views.crops[0])
        assert scores.shape[0] == BATCH and scores.shape[1] > 1
        torch.testing.assert_close(method.cluster_scores(views.crops[0][5:7]), scores[5:7], rtol=1e-4, atol=1e-5)
    assert float(scores.std(dim=0).max()) > 0
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_views_group_and_join_crops_in_declared_order() -> None:
    stacks = {"a": torch.arange(8.0).view(4, 1, 1, 2), "b": torch.arange(4.0).view(2, 1, 1, 2), "c": torch.zeros(2, 1, 3, 3)}
    views = Views(stacks=stacks, counts={"a": 2, "b": 1, "c": 1}, image_ids=torch.arange(2), labels=torch.arange(2))
    assert views.groups == {"a": [0, 1], "b": [2], "c": [3]}
    assert [crop.shape[0] for crop in views.crops] == [2, 2, 2, 2]
    assert torch.equal(views.crops[1], stacks["a"][2:])
    assert [tuple(stack.shape) for stack in views.by_resolution()] == [(6, 1, 1, 2), (2, 1, 3, 3)]
    with pytest.raises(ConfigError, match=r"views\.a"):
        Views(stacks=stacks, counts={"a": 3, "b": 1, "c": 1}, image_ids=torch.arange(2), labels=torch.arange(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"scale": (0.0, 1.0)}, "scale="), ({"flip": 1.5}, "flip=1.5"), ({"size": 1}, "size=1"), ({"jitter": (1, 1, 1, 0.6)}, "jitter=")],
)
def test_crop_groups_refuse_what_cannot_be_drawn(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CropGroup(**settings)


def test_a_small_stem_keeps_small_images_large_and_names_as_in_timm() -> None:
    x = torch.randn(2, 3, 32, 32)
    sizes = {}
    for stem in ("full", "pooled", "strided", "imagenet"):
        backbone = build_backbone(BackboneConfig(name="resnet18", stem=stem)).eval()
        sizes[stem] = backbone.forward_features(x).shape[-1]
        names = set(backbone.state_dict())
        assert names == set(build_backbone(BackboneConfig(name="resnet18")).state_dict())
    assert sizes == {"full": 4, "pooled": 2, "strided": 2, "imagenet": 1}


@pytest.mark.parametrize(
    ("name", "width", "selective", "millions"),
    [
        ("resnet50", 1, False, 25.56),
        ("resnet50", 1, True, 37.26),
        ("resnet50", 2, False, 98.0),
        ("resnet50", 2, True, 144.4),
        ("resnet101", 1, True, 66.71),
    ],
)
def test_wide_and_selective_resnets_have_the_published_size(name: str, width: float, selective: bool, millions: float) -> None:
    """Parameters of SimCLR v2's networks, with a classifier of 1000 classes."""
    backbone = build_backbone(BackboneConfig(name=name, width=width, selective_kernels=selective))
    count = sum(p.numel() for p in backbone.parameters()) + 1000 * (backbone.num_features + 1)
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_selective_kernels_weigh_two_streams() -> None:
    torch.manual_seed(0)
    block = SelectiveKernel(6, 8, stride=2).double().eval()
    x = torch.randn(3, 6, 9, 9, dtype=torch.float64)
    both = block.bn(block.conv(x)).clamp(min=0)
    first, second = both[:, :8], both[:, 8:]
    hidden = block.squeeze_bn(block.squeeze((first + second).mean((2, 3), keepdim=True))).clamp(min=0)
    a, b = block.weigh(hidden).exp().split(8, dim=1)
    assert a.shape == (3, 8, 1, 1) and block.squeeze.out_channels == 32
    torch.testing.assert_close(block(x), first * a / (a + b) + second * b / (a + b))
    assert block(x).shape == (3, 8, 5, 5)


def test_gradients_of_maps_smaller_than_the_stride_are_right_in_bf16() -> None:
    torch.manual_seed(0)
    conv = build_backbone(BackboneConfig(name="resnet18", width=0.125)).get_submodule("layer4.0.conv1")
    images = torch.randn(32, 32, 1, 1)
    want = torch.zeros_like(conv.weight)
    want[:, :, 1, 1] = images.sum(0).flatten()  # only the centre of the kernel ever meets the one pixel
    for _ in range(10):
        dirt = [torch.full((conv.weight.numel(),), 1e30, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        del dirt  # whatever is left uninitialised may hold this
        conv.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = conv(images)
        out.float().sum().backward()
        assert torch.allclose(conv.weight.grad, want, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig(name="resnet81"), "backbone.name=resnet81: timm cannot build it"),
        (BackboneConfig(name="resnet18", selective_kernels=True), "selective_kernels=True: needs a ResNet with bottlenecks"),
        (BackboneConfig(name="vit_tiny_patch16_224", stem="full"), "backbone.stem=full: vit_tiny_patch16_224 has no ResNet stem"),
    ],
)
def test_backbones_that_cannot_be_built_are_refused(config: BackboneConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(config)


def test_swav_prototypes_wait_and_its_queue_must_fit_the_batch() -> None:
    from methods.swav import SwAV, SwAVConfig

    facts = RunFacts(global_batch_size=500, steps_per_epoch=40, total_steps=400)
    backbone = nn.Identity()
    backbone.num_features = 8
    method = SwAV(SwAVConfig(num_prototypes=10, projector_hidden=8), backbone, facts)
    assert [(g.name, g.frozen_steps) for g in method.param_groups()] == [("network", 0), ("prototypes", 40)]
    with pytest.raises(ConfigError, match=r"method\.queue_length=3840: not a multiple of train\.global_batch_size=500; use 3500 or 4000"):
        SwAV(SwAVConfig(queue_length=3840), backbone, facts)
    assert any("3000 is more than the 500 features" in sentence for sentence in SwAVConfig().hints(facts).warnings)
