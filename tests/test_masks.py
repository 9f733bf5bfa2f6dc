"""MSN beside its equations: which patches pass the blocks, invariants of the loss, parameter groups, settings and advice."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from methods.msn import MSN, MSNConfig
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.errors import ConfigError
from methods.parts.masking import masked_of, num_kept, random_keep
from methods.parts.views import Views
from tests.parity.common import progress
from tests.parity.test_msn import FACTS, ROLES, loss_of, method_of, views_of

# ---------------------------------------------------------------------------- masks


@pytest.mark.parametrize(("ratio", "tokens"), [(0.0, 196), (0.15, 166), (0.3, 137), (0.5, 98), (0.7, 58)])
def test_so_many_patches_stay(ratio: float, tokens: int) -> None:
    assert num_kept(196, ratio) == tokens
    keep = random_keep(torch.arange(5), 196, tokens, seed=0)
    assert all(len(set(row)) == tokens and row == sorted(row) and row[0] >= 0 and row[-1] < 196 for row in keep.tolist())
    gone = masked_of(keep, 196)
    assert gone.shape == (5, 196 - tokens)
    assert torch.equal(torch.cat([keep, gone], dim=1).sort(dim=1).values, torch.arange(196).expand(5, -1))


def test_only_kept_patches_pass_the_blocks_and_only_they_matter() -> None:
    torch.manual_seed(0)
    method, views = method_of(mask_ratio=0.5), views_of()
    seen: list[tuple[str, int]] = []
    for name, encoder in (("target", method.target), ("anchor", method.anchor)):
        encoder.backbone.blocks[0].register_forward_pre_hook(lambda _, x, name=name: seen.append((name, x[0].shape[1])))
    masks = method.draw_masks(views, progress())
    loss = method(views, progress(), masks).loss
    assert seen == [("target", 17), ("anchor", 9), ("anchor", 5)]  # CLS and 16, 8 and 4 patches
    gone = torch.ones(8, 16, dtype=torch.bool).scatter_(1, masks[0], False).view(8, 1, 4, 4)
    hidden = gone.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    for area, equal in ((hidden, True), (~hidden, False)):
        other = copy.deepcopy(views)
        other.stacks["random"][area] += 1.0
        assert (method(other, progress(), masks).loss.item() == pytest.approx(loss.item(), rel=1e-12)) == equal


def test_focal_crops_of_the_size_of_masked_ones_keep_their_patches() -> None:
    method, views = method_of(), views_of()
    views.stacks["focal"] = torch.randn(16, 3, 16, 16, dtype=torch.float64)
    seen: list[int] = []
    method.anchor.backbone.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    method(views, progress(), method.draw_masks(views, progress()))
    assert seen == [12, 17]


def test_masks_follow_the_generator_and_their_settings() -> None:
    views = views_of(random=2)
    once, again = (method_of().draw_masks(views, progress(5)) for _ in range(2))
    assert once[0].shape == (16, 11) and torch.equal(once[0], again[0])
    assert not torch.equal(once[0], method_of().draw_masks(views, progress(6))[0])
    assert len({tuple(row) for row in once[0].tolist()}) > 8
    shared = method_of(shared_mask=True).draw_masks(views, progress(5))[0]
    assert len({tuple(row) for row in shared[:8].tolist()}) == 1 and not torch.equal(shared[0], shared[8])
    assert method_of(mask_ratio=0.0).draw_masks(views, progress()) == []
    assert method_of().draw_masks(views_of(random=0), progress()) == []


def test_the_masked_share_has_its_mean_spread_and_probability() -> None:
    views = views_of(batch=2)
    spread = method_of(mask_ratio=0.5, mask_spread=0.5)
    kept = [spread.draw_masks(views, progress(i))[0].shape[1] for i in range(300)]
    assert min(kept) == 1 and max(kept) == 15 and np.mean(kept) == pytest.approx(7.5, abs=0.8)
    rarely = method_of(mask_probability=0.25)
    assert sum(bool(rarely.draw_masks(views, progress(i))) for i in range(400)) == pytest.approx(100, abs=30)


# ---------------------------------------------------------------------------- invariants


def test_predictions_that_tell_nothing_give_the_loss_of_chance() -> None:
    """Any targets; and collapse to one prototype is caught by me-max: it is ln K there, 0 for even predictions."""
    rows = torch.eye(10, dtype=torch.float64)
    even = torch.ones(24, 10, dtype=torch.float64)  # the same cosine with every prototype
    found = loss_of(even, torch.randn(8, 10, dtype=torch.float64), rows, {})
    assert found["total"].item() == pytest.approx(method_of().config.hints(FACTS).chance_loss[0], abs=1e-12) == pytest.approx(math.log(10))
    sharp = {"sinkhorn": False, "temperature": 0.02, "target_temperature": 0.01}
    one = loss_of(rows[:1].expand(24, -1), rows[:1].expand(8, -1), rows, sharp)
    assert one["ce"].item() == pytest.approx(0, abs=1e-9) and one["memax"].item() == pytest.approx(math.log(10), abs=1e-9)


def test_loss_does_not_change_with_lengths_or_the_order_of_anchors() -> None:
    torch.manual_seed(0)
    anchor, target, rows = torch.randn(24, 6).double(), torch.randn(8, 6).double(), torch.randn(10, 6).double()
    loss = loss_of(anchor, target, rows, {})["total"].item()
    assert loss_of(3 * anchor, 0.2 * target, 7 * rows, {})["total"].item() == pytest.approx(loss, rel=1e-12)
    swapped = anchor.unflatten(0, (3, 8)).flip(0).flatten(0, 1)
    assert loss_of(swapped, target, rows, {})["total"].item() == pytest.approx(loss, rel=1e-12)
    wrong = anchor.unflatten(0, (8, 3)).transpose(0, 1).flatten(0, 1)  # image-major rows
    assert abs(loss_of(wrong, target, rows, {})["total"].item() - loss) > 1e-3


def test_the_target_moves_by_its_average_only() -> None:
    method = method_of(momentum=1.0)
    before = copy.deepcopy(dict(method.target.named_parameters()))
    out = method(views_of(), progress(1))
    out.loss.backward()
    method.after_step([out.outputs], progress(1))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in method.target.named_parameters())
    assert not torch.equal(method.target.head[1].running_mean, method.anchor.head[1].running_mean)  # statistics of its own batches


def test_parameter_groups() -> None:
    method = method_of()
    matrices, vectors, prototypes = method.param_groups()
    assert prototypes.params == [method.prototypes] and not prototypes.decay and not prototypes.clip
    assert any(p is method.anchor.backbone.pos_embed for p in matrices.params) and matrices.clip
    assert all(p.ndim == 1 for p in vectors.params) and not vectors.decay
    fixed = method_of(train_prototypes=False)
    out = fixed(views_of(), progress())
    out.loss.backward()
    assert fixed.prototypes.grad is None and len(fixed.param_groups()) == 2
    assert float(method_of(projection_dim=256).prototypes.detach().abs().max()) <= 1 / 16


def test_heads_have_the_original_form() -> None:
    names = [type(m).__name__ for m in method_of().anchor.head]
    assert names == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]
    assert all(bool((m.bias == 0).all()) for m in method_of().anchor.head if isinstance(m, nn.Linear))
    wide = method_of(projector_hidden=512).anchor.head[3].weight
    assert float(wide.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_clusters_are_those_of_the_target_encoder() -> None:
    method = method_of().eval()
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    scores = method.cluster_scores(images)
    assert scores.shape == (5, 10) and float(scores.detach().abs().max()) <= 1
    torch.testing.assert_close(scores, nn.functional.normalize(method.target(images)) @ nn.functional.normalize(method.prototypes).T)


def test_advice_and_refusals() -> None:
    facts = replace(FACTS, num_features=1024)
    hints = MSNConfig(sinkhorn=False, mask_ratio=0.15, momentum=0.996, target_temperature=0.1).hints(facts)
    words = " ".join(hints.warnings)
    for part in ("not below method.temperature", "method.me_max=1 without Sinkhorn", "gave NaN", "method.momentum=0.996"):
        assert part in words
    assert not method_of(momentum=0.9).config.hints(FACTS).warnings
    assert "method.sinkhorn=True" in hints.remedies
    with pytest.raises(ConfigError, match=r"views\.target\.count=2.* one target"):
        stacks = {"target": torch.zeros(16, 3, 16, 16), "focal": torch.zeros(8, 3, 8, 8)}
        counts = {"target": 2, "focal": 1}
        method_of()(Views(stacks=stacks, counts=counts, roles=ROLES, image_ids=torch.arange(8), labels=torch.zeros(8)), progress())
    with pytest.raises(ConfigError, match="MSN works on patches"):
        MSN(MSNConfig(), build_backbone(BackboneConfig(name="resnet18", width=0.125)), FACTS)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"mask_ratio": 1.0}, {"mask_spread": 0.2}, {"me_max": -1.0}, {"num_prototypes": 1}, {"schedule_stretch": 0.0}],
)
def test_settings_that_cannot_work_are_refused(settings: dict) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ConfigError, match=rf"method\.{name}={value}: "):
        MSNConfig(**settings)
