"""CoKe's options, meters and schedules: what the equations of one step do not show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.coke import CoKeConfig, OnlineClusters, default_dual_learning_rate
from methods.parts.contract import ParamGroup
from methods.parts.errors import ConfigError
from pipeline.config import OptimConfig, override
from pipeline.recipes import load_recipe
from pipeline.resolve import resolve
from pipeline.train.optim import build_optimizer, scheduled_lr
from tests.parity.test_coke import advance, coke, progress, views_of


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_micro_batches_give_the_gradients_and_clusters_of_the_whole_batch() -> None:
    kept = []
    for parts in ([slice(0, 8)], [slice(0, 8, 2), slice(1, 8, 2)]):
        method = coke(4, 16, 8)
        for step in range(5):
            z, ids = draw(step, 1, 8, 4), torch.arange(8) + 8 * (step % 2)
            method.zero_grad()
            advance(method, [views_of(z[:, part], ids[part], 1) for part in parts], step, 2)
        (clusters,) = method.heads()
        kept.append((method.predictor.weight.grad, clusters.current, clusters.duals, clusters.counts, method.labels.rows))
    for a, b in zip(*kept, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_an_image_without_a_label_takes_no_part_in_the_loss() -> None:
    method = coke(4, 16, 8)
    advance(method, views_of(draw(0, 1, 8, 4), torch.arange(8), 1), 0, 1)
    z, ids = draw(1, 1, 8, 4).requires_grad_(), torch.tensor([0, 9, 2, 11, 4, 13, 6, 15])
    out = method(views_of(z, ids, 1), progress(1, 1))
    out.loss.backward()
    assert bool((z.grad[0, 1::2] == 0).all()) and bool((z.grad[0, ::2] != 0).any(dim=1).all())
    known = method(views_of(z[:, ::2], ids[::2], 1), progress(1, 1)).loss
    assert out.loss.item() == pytest.approx(known.item() / 2, abs=1e-12)  # a sum over all images of the batch
    assert float(out.metrics["known_labels"]) == 0.5
    nothing = method(views_of(z[:, 1::2], ids[1::2], 1), progress(1, 1)).loss
    nothing.backward()
    assert nothing.item() == 0


def test_two_views_leave_out_an_image_without_a_label_too() -> None:
    method = coke(4, 16, 8, predictor_weight=0.5)
    advance(method, views_of(draw(0, 2, 8, 4), torch.arange(8), 2), 0, 1)
    z = draw(1, 3, 8, 4).requires_grad_()
    method(views_of(z, torch.tensor([0, 9, 2, 11, 4, 13, 6, 15]), 2), progress(1, 1)).loss.backward()
    assert bool((z.grad[:, 1::2] == 0).all()) and bool((z.grad[:, ::2] != 0).any(dim=2).all())


def test_a_repeated_image_counts_once() -> None:
    results = []
    for ids in ([0, 1, 2, 3, 1, 2], [0, 1, 2, 3]):
        method, rows = coke(4, 16, 8), draw(0, 4, 4)
        advance(method, views_of(rows[ids][None], torch.tensor(ids), 1), 0, 2)
        (clusters,) = method.heads()
        results.append((clusters.current, clusters.duals, clusters.counts))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_first_pass_trains_only_where_asked_and_a_continued_run_has_it_behind_it() -> None:
    method = coke(4, 16, 8, train_first_epoch=False)
    z = draw(0, 1, 8, 4).requires_grad_()
    outs = [advance(method, views_of(z, torch.arange(8) + 8 * step, 1), step, 2) for step in range(2)]
    assert all(out.loss is None for out in outs) and z.grad is None and "label_agreement" not in outs[0].metrics
    again = method(views_of(z, torch.arange(8), 1), progress(0, 2))  # a new phase counts from 0
    continued = coke(4, 16, 8, train_first_epoch=False)
    assert continued.first(progress(0, 2))
    continued.load_state_dict(method.state_dict())
    assert not continued.first(progress(0, 2))
    assert again.loss is not None and float(again.metrics["known_labels"]) == 1


def test_a_phase_that_ends_amid_an_epoch_leaves_no_counts_to_the_next() -> None:
    method = coke(4, 24, 8)
    for step in range(4):
        advance(method, views_of(draw(step, 1, 8, 4), torch.arange(8), 1), step, 3)
    (clusters,) = method.heads()
    assert int(clusters.counts.sum()) == 8
    method.start_epoch(progress(0, 3))
    assert int(clusters.counts.sum()) == 0


def test_meters_are_those_of_the_last_whole_epoch() -> None:
    method = coke(2, 8, 8, num_clusters=(3,), constraint_ratio=0.0, train_first_epoch=False)
    (clusters,) = method.heads()
    clusters.current.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]]))
    rows = torch.tensor([[3.0, 0.1]] * 5 + [[-2.0, 0.1]] * 3, dtype=torch.float64)
    first = advance(method, views_of(rows[None], torch.arange(8), 1), 0, 1)
    assert float(first.metrics["largest_batch_share"]) == 5 / 8
    rows[4] = rows[5]
    metrics = advance(method, views_of(rows[None], torch.arange(8), 1), 1, 1).metrics
    names = ("smallest_cluster", "largest_cluster", "clusters_empty_epoch", "label_agreement", "mean_dual", "largest_dual")
    assert [float(metrics[name]) for name in names] == pytest.approx([0, 5, 1 / 3, 7 / 8, 0, 0])


@pytest.mark.parametrize(("k", "bound"), [(30, 0.4), (10, 0.8)])
def test_sizes_keep_to_the_bound_with_the_rule_for_the_dual_learning_rate(k: int, bound: float) -> None:
    """Fixed features of groups of very different size: the smallest cluster is far below the bound without it, with it near or above."""
    images, steps = 5000, 50
    weights = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01])
    group = torch.multinomial(weights, images, replacement=True, generator=torch.Generator().manual_seed(0))
    features = nn.functional.normalize(draw(1, 10, 16)[group] + 0.3 * draw(2, images, 16))
    smallest = {}
    for r in (0.0, bound):
        torch.manual_seed(0)
        clusters = OnlineClusters(k, 16, r, default_dual_learning_rate(k, steps)).double()
        for epoch in range(8):
            for ids in torch.randperm(images, generator=torch.Generator().manual_seed(epoch)).split(100):
                clusters.update(features[ids], clusters.assign(features[ids]))
            clusters.end_epoch()
        smallest[r] = int(clusters.sizes.min()) / (images / k)
    assert smallest[0.0] < bound / 2 and smallest[bound] > 0.8 * bound


def test_the_rule_for_the_dual_learning_rate_follows_clusters_and_length() -> None:
    assert default_dual_learning_rate(3000, 1251) == pytest.approx(3000 * 3 / 1251)
    assert default_dual_learning_rate(100, 195) == pytest.approx(100 / 65)
    assert default_dual_learning_rate(10, 5) == pytest.approx(0.5)
    method = coke(4, 1600, 8, dual_learning_rate=None, num_clusters=(6, 9))
    assert [clusters.dual_learning_rate for clusters in method.heads()] == [default_dual_learning_rate(k, 200) for k in (6, 9)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": ()}, r"method\.num_clusters=\(\): give one or more"),
        ({"constraint_ratio": 1.2}, r"method\.constraint_ratio=1\.2: use a number from 0 to 1"),
        ({"dual_learning_rate": 0.0}, r"method\.dual_learning_rate=0\.0: use a positive"),
        ({"averaging_start_epoch": 0}, r"method\.averaging_start_epoch=0: use 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CoKeConfig(**settings)


def test_learning_rate_and_lars_equal_the_original(golden) -> None:
    """0 in epoch 0, linear from epoch 1 on, cosine from epoch 11 on."""
    values = golden("clustering_schedules_optim")
    per_epoch, epochs, lr = values["coke_cfg"]
    changes = {"train.global_batch_size": 8, "train.epochs": float(epochs), "optim.base_lr": float(lr)}
    plan = resolve(override(load_recipe("coke"), changes), int(per_epoch) * 8)
    rates = [scheduled_lr(plan, step) for step in range(plan.facts.total_steps)]
    np.testing.assert_allclose(rates, values["coke_lr"], atol=1e-12)
    params = [nn.Parameter(torch.from_numpy(values[f"opt_p{j}_init"].copy())) for j in range(4)]
    optimizer = build_optimizer(OptimConfig(name="lars", weight_decay=1e-2), [ParamGroup(params=params)])
    for step, rate in enumerate(values["opt_lrs"]):
        for j, p in enumerate(params):
            p.grad = torch.from_numpy(values[f"opt_g{j}"][step])
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.step()
        for j, p in enumerate(params):
            np.testing.assert_allclose(p.detach(), values[f"opt_lars_p{j}_step{step}"], atol=1e-9)


def test_a_continued_run_is_not_idle_again_and_ids_of_images_held_out_are_known() -> None:
    config = override(load_recipe("coke"), {"train.global_batch_size": 8})
    assert resolve(config, 40).zero_lr_steps == 5
    assert resolve(override(config, {"train.first_epoch": 3}), 40).zero_lr_steps == 0
    assert resolve(config, 40).facts.num_ids == 40 and resolve(config, 40, 44).facts.num_ids == 44
