"""DINO against the original's values and against a literal float64 transcription of its equations."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from methods.dino import DINOConfig
from methods.parts.centering import Center
from methods.parts.contract import Progress, RunFacts
from methods.parts.errors import ConfigError
from methods.parts.schedules import cosine, linear_by_epoch, warmup_cosine
from methods.parts.views import Views
from pipeline.build import build_method
from pipeline.config import override
from pipeline.recipes import load_recipe
from pipeline.resolve import resolve
from tests.parity.common import EXACT, in_processes
from tests.parity.dino_cases import EPOCH, FACTS, TOTAL, dino, images, of_scores, progress, rows_of
from tests.parity.test_swav import literal_sinkhorn

# ---------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_three_steps_of_the_loss_equal_the_original(golden, dtype: torch.dtype, tolerance: float) -> None:
    """Losses, gradients of the scores, and the centre, which each step leaves for the next."""
    values = golden("dino_loss")
    center = torch.zeros(40, dtype=dtype)
    for call in range(3):
        student = torch.from_numpy(values["student_logits"][call]).to(dtype).requires_grad_()
        teacher = torch.from_numpy(values["teacher_logits"][call]).to(dtype)
        method, views = of_scores(student, teacher, 2, 6, teacher_temperature=float(values["teacher_temp"][call]))
        np.testing.assert_allclose(center.numpy(), values["center"][call][0], rtol=tolerance, atol=1e-8)
        method.center.value.copy_(center)
        out = method(views, progress())
        out.loss.backward()
        method.center.update([out.outputs["mean"]])
        center = method.center.value
        np.testing.assert_allclose(out.loss.item(), values["loss"][call], rtol=tolerance)
        largest = np.abs(values["grad_student"][call]).max()
        np.testing.assert_allclose(student.grad.numpy(), values["grad_student"][call], atol=max(tolerance, 1e-5) * largest)
    np.testing.assert_allclose(center.numpy(), values["center"][3][0], rtol=tolerance, atol=1e-8)


def loss_of_this_worker(rank: int, world: int, values: dict[str, np.ndarray]) -> dict[str, Any]:
    losses, centers, value = [], [], torch.zeros(40, dtype=torch.float64)
    own = [crop * 6 + image for crop in range(8) for image in range(6 // world * rank, 6 // world * (rank + 1))]
    for call in range(3):
        student = torch.from_numpy(values["student_logits"][call][own]).double().requires_grad_()
        teacher = torch.from_numpy(values["teacher_logits"][call][own[: len(own) // 4]]).double()
        method, views = of_scores(student, teacher, 2, 6 // world, teacher_temperature=float(values["teacher_temp"][call]))
        method.center.value.copy_(value)
        out = method(views, progress())
        method.center.update([out.outputs["mean"]])
        value = method.center.value
        losses.append(out.loss.item())
        centers.append(value.clone())
        if call == 0:
            out.loss.backward()
            gradient = student.grad
    return {"losses": losses, "centers": torch.stack(centers), "gradient": gradient}


def test_loss_and_center_of_two_workers_equal_the_original(golden, tmp_path: Path) -> None:
    values = golden("dino_loss")
    results = in_processes(2, tmp_path, partial(loss_of_this_worker, values=values))
    for rank, result in enumerate(results):
        np.testing.assert_allclose(result["losses"], values["rank_loss"][:, rank], rtol=1e-6)
        np.testing.assert_allclose(result["centers"].numpy(), values["rank_center"][:, 0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(results[0]["gradient"].numpy(), values["rank0_grad_step0"], rtol=1e-5, atol=1e-9)


def test_no_opinion_costs_ln_k_and_gradients_sum_to_zero() -> None:
    k = 11
    student, teacher = torch.zeros(20, k, dtype=torch.float64), torch.randn(8, k, dtype=torch.float64)
    method, views = of_scores(student, teacher, 2, 4)
    assert method(views, progress()).loss.item() == pytest.approx(math.log(k), abs=1e-12)
    assert method.config.hints(FACTS).chance_loss == (math.log(k), "ln K")
    student = torch.randn(20, k, dtype=torch.float64, requires_grad=True)
    method, views = of_scores(student, teacher, 2, 4)
    method(views, progress()).loss.backward()
    torch.testing.assert_close(student.grad.sum(dim=1), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-14)
    assert all(float(crop.abs().sum()) > 0 for crop in student.grad.chunk(5))


def test_rows_are_crop_major() -> None:
    """The same permutation of the images of every crop changes nothing; of one crop's alone, it changes the loss."""
    method, views = dino(), images(0)
    loss = method(views, progress()).loss.item()
    order = torch.tensor([2, 0, 3, 1])
    assert method(rows_of(views, order), progress()).loss.item() == pytest.approx(loss, abs=1e-12)
    first, *others = views.stacks["local"].chunk(3)
    views.stacks["local"] = torch.cat([first[order], *others])
    assert abs(method(views, progress()).loss.item() - loss) > 1e-3


def test_groups_with_the_role_global_are_of_global_crops() -> None:
    method, views = dino(), images(0)
    loss = method(views, progress()).loss
    a, b = views.stacks["global"].chunk(2)
    stacks = {"global": a, "global_solarized": b, "local": views.stacks["local"]}
    counts = {"global": 1, "global_solarized": 1, "local": 3}
    split = Views(stacks=stacks, counts=counts, roles=views.roles, image_ids=views.image_ids, labels=views.labels)
    assert torch.equal(method(split, progress()).loss, loss)
    first = {"local": views.stacks["local"], "global": views.stacks["global"]}  # the order of the groups is free
    turned = Views(stacks=first, counts=views.counts, roles=views.roles, image_ids=views.image_ids, labels=views.labels)
    torch.testing.assert_close(method(turned, progress()).loss, loss, **EXACT)
    alone = Views(stacks={"global": a}, counts={"global": 1}, image_ids=views.image_ids, labels=views.labels)
    with pytest.raises(ConfigError, match=r"views: 1 crop, 1 of them global; use 2 or more"):
        method(alone, progress())


# ---------------------------------------------------------------------------- targets


def test_targets_see_the_centre_of_the_step_before() -> None:
    method, views = dino(momentum=1.0), images(0)
    first = method(views, progress())
    assert not method.center.value.any()  # the step itself moves nothing
    method.after_step([first.outputs], progress())
    t = method.teacher(views.stacks["global"])
    torch.testing.assert_close(method.center.value, 0.1 * t.mean(0), **EXACT)
    assert method(views, progress()).loss.item() != pytest.approx(first.loss.item(), abs=1e-6)
    want = torch.softmax((t - method.center.value) / 0.04, dim=1)
    torch.testing.assert_close(method.targets(t, progress()), want, **EXACT)


def test_targets_of_many_rows_are_made_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.parts.centering.chunk_rows", lambda x: 3)
    center, t = Center(6).double(), torch.randn(10, 6, dtype=torch.float64)
    center.value.normal_()
    torch.testing.assert_close(center.targets(t, 0.05), torch.softmax((t - center.value) / 0.05, dim=1), **EXACT)
    assert center.float().targets(t.bfloat16(), 0.05).dtype == torch.float32


def test_sinkhorn_teacher_equals_the_algorithm_box_and_keeps_no_centre() -> None:
    method, views = dino(teacher_targets="sinkhorn", momentum=1.0, teacher_temperature=0.05), images(0)
    t = method.teacher(views.stacks["global"])
    out = method(views, progress())
    np.testing.assert_allclose(method.targets(t, progress()).numpy(), literal_sinkhorn(t.numpy(), 0.05, 3), atol=1e-9)
    q = torch.from_numpy(literal_sinkhorn(t.numpy(), 0.05, 3)).chunk(2)
    p = [torch.log_softmax(method.head(method.backbone(x)) / 0.1, dim=1) for x in views.crops]
    pairs = [(g, v) for g in range(2) for v in range(5) if v != g]
    want = sum(-(q[g] * p[v]).sum(1).mean() for g, v in pairs) / 8
    torch.testing.assert_close(out.loss, want, rtol=0, atol=1e-9)
    method.after_step([out.outputs], progress())
    assert method.center is None and not any("center" in name for name in [*method.state_dict(), *out.metrics])
    torch.testing.assert_close(method.cluster_scores(views.crops[0]), method.teacher(views.crops[0]))


def test_sinkhorn_targets_equal_those_of_the_original_dinov2(golden) -> None:
    values = golden("dinov2_losses")
    method = dino(teacher_targets="sinkhorn", teacher_temperature=float(values["teacher_temp"]))
    got = method.targets(torch.from_numpy(values["teacher"][0]).double(), progress())
    np.testing.assert_allclose(got.numpy(), values["dino_sk"], atol=2e-6)  # the original works in float32


def test_settings_decide_whether_micro_batches_are_exact() -> None:
    assert not dino().whole_batch_remedy and dino(teacher_targets="sinkhorn").whole_batch_remedy
    halves = override(load_recipe("dino-small"), {"train.accumulation_steps": 2, "method.teacher_targets": "centering"})
    assert not build_method(halves, FACTS).whole_batch_remedy
    with pytest.raises(ConfigError, match=r"accumulation_steps=2: dino needs the whole batch at once; use 1 \(method.teacher_targets=cent"):
        build_method(override(halves, {"method.teacher_targets": "sinkhorn"}), FACTS)


def test_paper_settings() -> None:
    """Rates at the recipes' batches, decay, clipping and crops."""
    for name, lr, batch, crops, clip in (
        ("dino-vits16", 1e-3, 512, 10, 3.0),
        ("dino-vitb16", 2e-3, 1024, 12, 0.3),
        ("dino-resnet50", 0.06, 512, 10, 3.0),
    ):
        config = load_recipe(name)
        numbers = resolve(config, 1_281_167)
        assert numbers.lr == pytest.approx(lr) and numbers.final_lr == pytest.approx(1e-6)
        assert numbers.weight_decays == (None if name == "dino-resnet50" else (0.04, 0.4))
        assert (config.train.global_batch_size, config.optim.clip_norm, config.optim.clip_scope) == (batch, clip, "tensor")
        assert sum(group.count for group in config.views.values()) == crops
        assert (config.method.num_prototypes, config.method.temperature, config.method.momentum) == (65536, 0.1, 0.996)
    assert load_recipe("dino-resnet50").optim.weight_decay == 1e-4


# ---------------------------------------------------------------------------- schedules


def test_schedules_equal_the_original(golden) -> None:
    values = golden("vit_schedules")
    epoch, total = 1251, 125100
    for step, lr, wd, m in zip(*(values[f"dino_{name}"] for name in ("steps", "lr", "wd", "momentum")), strict=True):
        step = int(step)
        settings = {"total_steps": total, "warmup_steps": 10 * epoch, "start": 0.0, "base": 0.002, "final": 1e-6}
        assert warmup_cosine(step, **settings) == pytest.approx(lr, rel=1e-9, abs=1e-15)
        assert cosine(step, total, 0.04, 0.4) == pytest.approx(wd, rel=1e-9)
        method = dino()
        at = Progress(step=step, total_steps=total, steps_per_epoch=epoch)
        assert method.momentum(at) == pytest.approx(m, rel=1e-12)
    for e, tau in enumerate(values["dino_teacher_temp_per_epoch"]):
        method = dino(teacher_temperature=0.07, warmup_teacher_temperature=0.04, warmup_teacher_temperature_epochs=30)
        for step in (e * epoch, (e + 1) * epoch - 1):
            at = Progress(step=step, total_steps=total, steps_per_epoch=epoch)
            assert method.teacher_temperature(at) == pytest.approx(tau, rel=1e-12)
    tiny = {"total_steps": 20, "warmup_steps": 8, "start": 0.0, "base": 1.0, "final": 0.1}
    np.testing.assert_allclose([warmup_cosine(i, **tiny) for i in range(20)], values["tiny_lr"], atol=1e-12)
    np.testing.assert_allclose([cosine(i, 20, 0.04, 0.4) for i in range(20)], values["tiny_wd"], atol=1e-12)


def test_shape_of_the_schedules() -> None:
    """The first rate is 0, the base comes twice; decay and momentum rise, and momentum stays below 1."""
    method = dino()
    lr = [warmup_cosine(i, total_steps=12, warmup_steps=4, start=0.0, base=1.0, final=0.0) for i in range(12)]
    assert lr[0] == 0 and lr[3] == lr[4] == 1 and lr[-1] > 0
    momenta = [method.momentum(progress(i)) for i in range(TOTAL)]
    assert momenta == sorted(momenta) and momenta[0] == 0.996 and momenta[-1] < 1
    assert [linear_by_epoch(e, epochs=0, start=0.04, end=0.07) for e in (0, 1)] == [0.07, 0.07]
    assert [linear_by_epoch(e, epochs=1, start=0.04, end=0.07) for e in (0, 1)] == [0.04, 0.07]


# ---------------------------------------------------------------------------- meters, advice


def test_meters_tell_both_kinds_of_collapse() -> None:
    k, batch = 16, 64
    spread = 0.5 * torch.eye(k, dtype=torch.float64).repeat(2 * batch // k, 1)  # each image has a prototype of its own
    one = torch.zeros(2 * batch, k, dtype=torch.float64)
    one[:, 3] = 0.5
    uniform = torch.zeros(2 * batch, k, dtype=torch.float64)
    student = torch.zeros(2 * batch, k, dtype=torch.float64)
    meters = []
    for teacher in (spread, one, uniform):
        method, views = of_scores(student, teacher, 2, batch)
        meters.append({name: float(value) for name, value in method(views, progress()).metrics.items()})
    own, mean, used = ([m[name] for m in meters] for name in ("teacher_entropy", "teacher_mean_entropy", "prototypes_used"))
    assert own == pytest.approx([0, 0, 1], abs=1e-3) and mean == pytest.approx([1, 0, 1], abs=1e-3)
    assert used == [1.0, 1 / k, 1 / k]
    assert [m["kl"] for m in meters] == pytest.approx([math.log(k)] * 2 + [0], abs=1e-3)
    assert meters[1]["embedding_std"] < 1e-6 < 0.5 < meters[0]["embedding_std"]


def test_cluster_scores_are_the_teachers() -> None:
    method, views = dino(), images(0)
    method.center.value.normal_()
    images_ = views.crops[0]
    torch.testing.assert_close(method.cluster_scores(images_), method.teacher(images_) - method.center.value, **EXACT)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_temperature": 0.1}, "not below method.temperature"),
        ({"momentum": 0.996}, "the teacher hardly moves; use 0.9 or less"),
        ({"teacher_targets": "sinkhorn", "num_prototypes": 300}, "can have its own; use method.num_prototypes=64 or fewer"),
        ({"num_prototypes": 5000}, "for 1000 images; use 250 or fewer"),
        ({"freeze_prototypes_epochs": 99.0}, "never learn"),
    ],
)
def test_advice(settings: dict[str, Any], words: str) -> None:
    facts = RunFacts(global_batch_size=4, steps_per_epoch=EPOCH, total_steps=TOTAL, num_images=1000)
    assert any(words in sentence for sentence in DINOConfig(**{"num_prototypes": 16, "momentum": 0.7, **settings}).hints(facts).warnings)
    assert DINOConfig(num_prototypes=16, momentum=0.7).hints(facts).warnings == ()


@pytest.mark.parametrize(
    "settings", [{"teacher_temperature": 0.0}, {"momentum": 1.5}, {"num_prototypes": 1}, {"freeze_prototypes_epochs": -1.0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    (key,) = settings
    with pytest.raises(ConfigError, match=f"method.{key}="):
        DINOConfig(**settings)
