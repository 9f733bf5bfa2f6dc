"""Clusters: their figures by hand, the images that stand for them, their pictures, and when they are measured."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from methods.parts.contract import RunFacts
from methods.parts.norms import convert_sync_batchnorm
from methods.swav import SwAV, SwAVConfig
from pipeline.data.sources.base import open_source
from pipeline.evaluate.clusters import Clusters, assign
from pipeline.evaluate.online import Online
from pipeline.figures import cluster_charts, style
from pipeline.train.health import HealthMonitor
from tests.parity.common import in_processes
from tests.test_figures import LIME, RED, near, plain, read
from tests.test_train import STUCK, Toy, batches, config, trainer


def clusters(assignments: list[int], labels: list[int] | None = None, scores: list[float] | None = None, count: int = 4) -> Clusters:
    images = np.stack([plain(8, 8, (i, i, i)) for i in range(len(assignments))])
    known = np.full(len(assignments), -1) if labels is None else np.array(labels)
    typical = np.ones(len(assignments)) if scores is None else np.array(scores)
    return Clusters(images, known, np.array(assignments), typical, count)


# ---------------------------------------------------------------------------- figures


def test_sizes_and_entropy_by_hand() -> None:
    found = clusters([0, 0, 0, 0, 0, 0, 2, 2]).metrics()  # 6, 0, 2, 0 images; the even share is 2
    assert set(found) == {"cluster_min", "cluster_max", "clusters_empty", "assignment_entropy"}
    assert (found["cluster_min"], found["cluster_max"], found["clusters_empty"]) == (0, 3, 0.5)
    assert found["assignment_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    even = clusters([3, 2, 1, 0]).metrics()
    assert (even["cluster_min"], even["cluster_max"], even["clusters_empty"]) == (1, 1, 0)
    assert even["assignment_entropy"] == pytest.approx(1)
    assert clusters([1, 1, 1]).metrics()["assignment_entropy"] == 0


def test_agreement_with_labels_counts_labelled_images_only() -> None:
    assignments, labels = [0, 0, 0, 1, 1, 3, 3, 3], [5, 5, 2, 2, -1, 2, 7, -1]
    found = clusters(assignments, labels).metrics()
    assert found["purity"] == pytest.approx((2 + 1 + 1) / 6)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score([5, 5, 2, 2, 2, 7], [0, 0, 0, 1, 3, 3]))
    assert found["cluster_max"] == pytest.approx(3 / (8 / 4))  # sizes count every image
    perfect = clusters([2, 2, 0, 0, 1], [0, 0, 1, 1, 2]).metrics()
    assert (perfect["nmi"], perfect["purity"]) == pytest.approx((1, 1))


def test_nmi_of_two_by_two_by_hand() -> None:
    table = np.array([[3, 1], [1, 3]]) / 8
    mutual = sum(p * math.log(p / 0.25) for p in table.flat)  # both marginals are 1/2, 1/2
    found = clusters([0, 0, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]).metrics()
    assert found["nmi"] == pytest.approx(mutual / math.log(2))
    assert found["purity"] == 6 / 8


# ---------------------------------------------------------------------------- what stands for a cluster


def test_nearest_are_the_members_of_highest_score_in_order() -> None:
    rng = np.random.default_rng(0)
    assignments, scores = rng.integers(0, 4, 60), rng.normal(size=60)
    found = clusters(list(assignments), scores=list(scores))
    for cluster in range(4):
        want = sorted((i for i in range(60) if assignments[i] == cluster), key=lambda i: -scores[i])
        assert found.nearest(cluster, 5).tolist() == want[:5]
    assert len(found.nearest(1, 1000)) == found.sizes[1]


def test_the_largest_smallest_and_purest_are_shown_once_and_none_is_empty() -> None:
    sizes = {0: 9, 1: 2, 3: 8, 4: 7, 5: 6, 6: 6, 7: 3}  # 2 is empty
    assignments = [k for k, size in sizes.items() for _ in range(size)]
    labels = [int(k == 6 and i < 3) for k, size in sizes.items() for i in range(size)]  # 6 is half and half
    shown = clusters(assignments, labels, count=8).worth_showing(each=2)
    assert shown == {"largest": [0, 3], "smallest": [1, 7], "purest": [4, 5]}
    assert clusters(assignments, labels, count=8).worth_showing(each=2, fewest=7)["purest"] == [4]
    scores = [{4: 0.1, 5: 0.3, 6: 0.2}.get(k, 1.0) for k in assignments]
    tight = clusters(assignments, scores=scores, count=8).worth_showing(each=2)
    assert tight == {"largest": [0, 3], "smallest": [1, 7], "tightest": [5, 6]}
    assert clusters([2, 2, 1]).worth_showing() == {"largest": [2, 1]}


def test_the_commonest_class_is_that_of_the_labelled_members() -> None:
    found = clusters([0, 0, 0, 0, 1], [3, 3, 1, -1, -1])
    assert found.commonest(0) == (3, pytest.approx(2 / 3))
    assert found.commonest(1) is None and found.commonest(2) is None


# ---------------------------------------------------------------------------- from a method


def swav(prototypes: int = 7) -> SwAV:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
    backbone.num_features = 6
    method_config = SwAVConfig(num_prototypes=prototypes, projection_dim=5, projector_hidden=8)
    method = SwAV(method_config, backbone, RunFacts(global_batch_size=4, steps_per_epoch=1, total_steps=4))
    with torch.no_grad():
        method.prototypes.weight.mul_(torch.linspace(0.2, 9, prototypes)[:, None])  # off the sphere, as after a step
        method.projector[1].running_mean.normal_()
    return method


def pixels(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_images_go_to_the_prototype_of_largest_cosine() -> None:
    method, images = swav().double(), pixels(600)  # three batches
    found = assign(method, images, torch.arange(600), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), device=torch.device("cpu"))
    x = ((images.double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])).permute(0, 3, 1, 2)
    hidden, norm, _, last = method.projector
    h = x.flatten(1) @ method.backbone[1].weight.T + method.backbone[1].bias
    h = (h @ hidden.weight.T + hidden.bias - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    z, c = h.relu() @ last.weight.T + last.bias, method.prototypes.weight
    cosines = (z @ c.T) / z.norm(dim=1, keepdim=True) / c.norm(dim=1)
    np.testing.assert_array_equal(found.assignments, cosines.argmax(1).numpy())
    np.testing.assert_allclose(found.scores, cosines.amax(1).detach().numpy(), atol=1e-5)
    assert (found.count, len(found.sizes), found.labels[-1]) == (7, 7, 599)
    assert len(np.unique(found.assignments)) > 2


def test_a_method_is_left_as_it_was_found() -> None:
    method = swav().train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assign(method, pixels(8), torch.zeros(8), mean=(0, 0, 0), std=(1, 1, 1), device=torch.device("cpu"))
    assert all(module.training for module in method.modules())
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def alone(rank: int, world: int) -> torch.Tensor:
    """Rank 0 asks, the others do not: a call that gathered anything would wait for them forever."""
    method = swav()
    convert_sync_batchnorm(method)
    return method.eval().cluster_scores(torch.linspace(-1, 1, 4 * 48).view(4, 3, 4, 4)).detach() if rank == 0 else torch.empty(0)


def test_one_worker_of_two_scores_alone_as_one_process_does(tmp_path: Path) -> None:
    want = swav().eval().cluster_scores(torch.linspace(-1, 1, 4 * 48).view(4, 3, 4, 4))
    torch.testing.assert_close(in_processes(2, tmp_path, alone)[0], want)


# ---------------------------------------------------------------------------- during training


class Clustered(Toy):
    def cluster_scores(self, images):
        return self.backbone(images)


def test_clusters_are_measured_where_knn_is_and_without_it(tmp_path: Path) -> None:
    assert Clustered().has_clusters and not Toy().has_clusters
    black, unknown = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.full((4,), -1)

    def measure(method: Toy) -> Clusters:
        return assign(method, black, unknown, mean=(0, 0, 0), std=(1, 1, 1), device=torch.device("cpu"))

    for folder, knn in (("with", lambda backbone: {"knn": 0.5}), ("without", None)):
        made, points = trainer(tmp_path / folder, config(), Clustered(), online=knn, online_clusters=measure)
        object.__setattr__(made.resolved, "knn_every", 4)
        made.run(batches(range(6)))
        assert [step for step, metrics in points if "cluster_max" in metrics] == [0, 4, 6]
        assert [step for step, metrics in points if "knn" in metrics] == ([0, 4, 6] if knn else [])
        said = made.reporter.console.file.getvalue()
        assert said.count("one cluster holds 4 of 4 images at step 4") == 1  # equal images; the patience is 3 steps


def test_without_labels_some_training_images_are_clustered(tmp_path: Path) -> None:
    for i in range(50):
        Image.new("RGB", (8, 8), (5 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    run = config()
    run = dataclasses.replace(
        run, data=dataclasses.replace(run.data, path=str(tmp_path)), evaluate=dataclasses.replace(run.evaluate, online_bank=20)
    )
    dataset = open_source(run.data)
    measured = Online(run, dataset, torch.device("cpu"), torch.float32)
    assert not measured.has_knn
    first = measured.clusters(Clustered())
    for path in tmp_path.iterdir():
        path.unlink()
    again = measured.clusters(Clustered())  # the images were read once
    shown = [int(image[0, 0, 0]) // 5 for image in first.images]
    assert len(set(shown)) == 20 and set(shown) <= set(dataset.training_ids(run.data.held_out).tolist())
    np.testing.assert_array_equal(first.assignments, again.assignments)
    assert np.isfinite(first.scores).all() and (first.labels == -1).all()


def test_empty_clusters_are_warned_of_once_where_there_are_images_enough() -> None:
    sizes = np.array([40, 40, 40, 0, 0, 0, 0])
    guards = HealthMonitor(STUCK, patience_steps=10)
    assert list(guards.cluster_warnings(9, sizes)) == []
    (warning,) = guards.cluster_warnings(10, sizes)
    assert warning == "4 of 7 clusters are empty at step 10; use fewer clusters, or try something"
    assert list(guards.cluster_warnings(11, sizes)) == []
    for fine in (sizes // 5, np.array([40, 40, 40, 40, 0, 0, 0, 0]), np.array([5])):  # too few images, half of them, one cluster
        assert list(HealthMonitor(STUCK, 10).cluster_warnings(10, fine)) == []
    (warning,) = HealthMonitor(STUCK, 10).cluster_warnings(10, np.array([90, 10, 0]))
    assert warning == "one cluster holds 90 of 100 images at step 10; try something"
    assert list(HealthMonitor(STUCK, 10).cluster_warnings(10, np.array([89, 11, 0]))) == []


# ---------------------------------------------------------------------------- pictures


def test_the_gallery_shows_the_most_typical_first_and_frames_another_class(tmp_path: Path) -> None:
    images = np.stack([plain(8, 8, c) for c in (LIME, RED, (255, 255, 0), (255, 0, 255))])
    found = Clusters(images, np.array([0, 0, 1, 1]), np.array([2, 2, 2, 1]), np.array([0.5, 0.9, 0.7, 0.2]), 3)
    picture = read(cluster_charts.gallery(found, ["a", "b"], tmp_path / "c.png", most=2))
    red, yellow, pink = (np.argwhere(near(picture, c)) for c in (RED, (255, 255, 0), (255, 0, 255)))
    assert red[:, 1].max() < yellow[:, 1].min()  # 0.9 before 0.7
    assert not near(picture, LIME).any()  # two in a row
    assert pink[:, 0].min() > red[:, 0].max()  # the smaller cluster below
    frames = np.argwhere(near(picture, style.VERMILLION))
    assert frames[:, 1].min() > red[:, 1].max() and frames[:, 0].max() < pink[:, 0].min()  # only the yellow one
    unknown = dataclasses.replace(found, labels=np.full(4, -1))
    assert not near(read(cluster_charts.gallery(unknown, [], tmp_path / "u.png")), style.VERMILLION).any()


def test_each_cluster_has_its_row_of_whole_images(tmp_path: Path) -> None:
    """Two clusters of one image each, one of which is known as a whole: twice as wide as high."""
    images = np.stack([plain(8, 8, c) for c in (RED, (255, 0, 255))])
    found = Clusters(images, np.full(2, -1), np.array([0, 1]), np.ones(2), 2)
    wide = plain(40, 80, LIME)
    picture = read(cluster_charts.gallery(found, [], tmp_path / "c.png", originals={0: wide}))
    whole, small = np.argwhere(near(picture, LIME)), np.argwhere(near(picture, (255, 0, 255)))
    assert not near(picture, RED).any()
    assert np.ptp(whole[:, 1]) == pytest.approx(2 * np.ptp(whole[:, 0]), rel=0.05)
    assert small[:, 0].min() > whole[:, 0].max() and small[:, 1].min() == pytest.approx(whole[:, 1].min(), abs=2)


def test_bars_are_clusters_by_size(tmp_path: Path) -> None:
    found = clusters([0, 1, 2, 3, 3, 3], count=6)  # three of one image, one of three, two empty
    picture = read(cluster_charts.size_bars(found, [], tmp_path / "s.png"))[:-60]  # without words below
    heights = near(picture, style.BLUE)[:, : picture.shape[1] * 2 // 3].sum(axis=0)  # left of the legend
    bars = np.flatnonzero(heights > 20)
    first, second = heights[bars[3]], heights[bars[-3]]
    assert first == pytest.approx(3 * second, rel=0.05)
    assert (heights[bars] > 2 * second).mean() == pytest.approx(1 / 4, abs=0.08)  # of four bars, or of as many as are left of the legend


def test_bars_are_divided_by_class(tmp_path: Path) -> None:
    found = clusters([0, 0, 0, 0, 1], [0, 0, 0, 1, 0], count=2)
    parts = cluster_charts._parts(found, ["cat", "dog"])
    assert {name: counts.tolist() for name, counts in parts.items()} == {"cat": [3, 1], "dog": [1, 0]}
    many = clusters([0] * 8 + [1], [0, 0, 1, 2, 3, 4, 5, 6, -1], count=2)
    found_many = {name: counts.tolist() for name, counts in cluster_charts._parts(many, []).items()}
    assert found_many == {"the cluster's commonest class": [2, 0], "others": [6, 1]}
    picture = read(cluster_charts.size_bars(found, ["cat", "dog"], tmp_path / "s.png"))[:-60]
    left = picture[:, : picture.shape[1] // 3]  # inside the larger bar
    cat, dog = (np.flatnonzero(near(left, c).sum(axis=1) > 20) for c in (style.BLUE, style.VERMILLION))
    assert dog.max() < cat.min() and len(cat) == pytest.approx(3 * len(dog), rel=0.06)
