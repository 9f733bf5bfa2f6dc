"""kNN against the original's values, a literal transcription, and by hand; features without side effects."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.parts.errors import ConfigError
from pipeline.evaluate.knn import centred, knn_accuracy, knn_predict

REFERENCE = Path(os.environ.get("MANYVIEWS_REFERENCE", Path(__file__).parents[1].parent / "shared")) / "golden" / "vit_knn.npz"


def transcription(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float) -> list[int]:
    """The vote, word for word and in float64: sum over the k nearest of exp(similarity / T) for each class."""
    unit_bank = bank.double() / bank.double().norm(dim=1, keepdim=True)
    predictions = []
    for query in queries.double():
        similarity = unit_bank @ (query / query.norm())
        scores: dict[int, float] = {}
        for index in similarity.argsort(descending=True)[:k].tolist():
            label = int(labels[index])
            scores[label] = scores.get(label, 0.0) + float(np.exp(similarity[index].item() / temperature))
        predictions.append(max(scores, key=lambda label: scores[label]))
    return predictions


@pytest.mark.skipif(not REFERENCE.exists(), reason=f"reference values not found; set MANYVIEWS_REFERENCE ({REFERENCE})")
def test_agrees_with_the_original() -> None:
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(REFERENCE).items()}
    bank, bank_labels = golden["train_features"], golden["train_labels"]
    queries, query_labels = golden["test_features"], golden["test_labels"]
    temperature = float(golden["temperature"])
    for row, k in enumerate(golden["k"].tolist()):
        predicted = knn_predict(bank, bank_labels, queries, k=k, temperature=temperature, chunk=64)
        assert torch.equal(predicted, golden["prediction"][row])
        accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, k=k, temperature=temperature)
        assert 100 * accuracy == pytest.approx(float(golden["dino_top1_top5"][row, 0]), abs=1e-6)
        assert predicted.tolist() == transcription(bank, bank_labels, queries, k, temperature)


def clusters(rows: int, classes: int = 5, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % classes
    return centres[labels] + 0.9 * torch.randn(rows, width, generator=random), labels


@pytest.mark.parametrize("k", [1, 7, 200])
def test_agrees_with_the_transcription_on_rows_of_any_length(k: int) -> None:
    (bank, labels), (queries, _) = clusters(61), clusters(30, seed=1)
    queries = queries * torch.linspace(0.01, 100, 30)[:, None]
    assert knn_predict(bank, labels, queries, k=k, chunk=7).tolist() == transcription(bank, labels, queries, k, 0.07)


def test_a_small_temperature_is_the_nearest_neighbour() -> None:
    (bank, labels), (queries, _) = clusters(50), clusters(20, seed=1)
    nearest = knn_predict(bank, labels, queries, k=1)
    assert torch.equal(knn_predict(bank, labels, queries, k=50, temperature=1e-4), nearest)


def test_chunks_and_precision_do_not_change_the_prediction() -> None:
    (bank, labels), (queries, truth) = clusters(101), clusters(57, seed=1)
    whole = knn_predict(bank.double(), labels, queries.double(), chunk=1000)
    assert torch.equal(whole, knn_predict(bank, labels, queries, chunk=3))
    assert knn_accuracy(bank, labels, queries, truth) == pytest.approx((whole == truth).double().mean().item())


def test_labels_may_be_any_numbers_and_minus_one_never_votes() -> None:
    bank = torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [0.7, 0.7]])
    labels = torch.tensor([1000, -1, 7, -1])
    assert knn_predict(bank, labels, torch.tensor([[1.0, 0.1], [0.1, 1.0]]), k=9).tolist() == [1000, 7]
    accuracy = knn_accuracy(bank, labels, torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 1.0]]), torch.tensor([1000, 1000, -1]), k=1)
    assert accuracy == 0.5
    with pytest.raises(ConfigError, match="none of these images has a label"):
        knn_accuracy(bank, torch.full((4,), -1), bank, labels)
    with pytest.raises(ConfigError, match="none of these images has a label"):
        knn_accuracy(bank, labels, bank, torch.full((4,), -1))


def test_l2_is_one_vote_each_and_ties_go_to_the_nearest_then_the_lowest() -> None:
    bank = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    labels = torch.tensor([3, 5, 5, 1])
    query = torch.tensor([[0.4]])
    assert knn_predict(bank, labels, query, k=3, metric="l2").tolist() == [5]  # two votes against one nearer
    assert knn_predict(bank, labels, query, k=2, metric="l2").tolist() == [3]  # one each: the nearest
    assert knn_predict(bank, labels, torch.tensor([[0.5]]), k=2, metric="l2").tolist() == [3]  # equally near: the lowest label
    assert knn_predict(bank.flip(0), labels.flip(0), torch.tensor([[0.5]]), k=2, metric="l2").tolist() == [3]
    # not cosine: all rows point the same way
    assert knn_predict(bank, labels, torch.tensor([[9.0]]), k=1, metric="l2").tolist() == [1]


def test_centring_removes_a_shared_direction() -> None:
    (bank, labels), (queries, truth) = clusters(300), clusters(100, seed=1)
    shift = torch.zeros(8, dtype=torch.float64)
    shift[0] = 1e9  # float32 cosine then sees hardly anything but this direction
    plain = knn_accuracy(bank, labels, queries, truth)
    moved, asked = bank.double() + shift, queries.double() + shift
    assert knn_accuracy(moved, labels, asked, truth) < plain - 0.2
    moved, asked = centred(moved, asked)
    torch.testing.assert_close(moved.mean(0), torch.zeros(8, dtype=torch.float64), atol=1e-5, rtol=0)
    assert knn_accuracy(moved, labels, asked, truth) > plain - 0.1


def test_features_that_are_not_finite_are_refused() -> None:
    bank, labels = clusters(10)
    bank[3, 2] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        knn_predict(bank, labels, bank)


# ---------------------------------------------------------------------------- features

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_extract_leaves_the_backbone_and_the_random_state_alone() -> None:
    from pipeline.evaluate.features import extract

    net = network().train()
    net[3].eval()  # a part that the training loop keeps in evaluation mode
    modes = [m.training for m in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    features = extract(net, pictures(10), mean=MEAN, std=STD, batch_size=4)
    assert torch.equal(torch.rand(3), expected_draw)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert features.shape == (10, 6) and features.dtype == torch.float32 and not features.requires_grad

    normal = (pictures(10).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(features, net.eval()(normal).detach(), atol=1e-5, rtol=1e-4)


def test_extract_in_bf16_and_of_nothing() -> None:
    from pipeline.evaluate.features import extract

    net = network()
    exact, half = (extract(net, pictures(9), mean=MEAN, std=STD, precision=p) for p in ("float32", "bf16"))
    assert half.dtype == torch.float32
    assert 0 < (exact - half).abs().max() < 0.05
    assert len(extract(net, pictures(0), mean=MEAN, std=STD)) == 0


def test_calibration_averages_the_statistics_of_full_batches() -> None:
    from pipeline.evaluate.features import calibrate_batchnorm

    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = pictures(35)
    calibrated = calibrate_batchnorm(net, images, mean=MEAN, std=STD, batch_size=8)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and not calibrated.training

    normal = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    batches = [net[0](batch).detach().double() for batch in normal[:32].split(8)]
    norm = calibrated[1]
    torch.testing.assert_close(norm.running_mean.double(), torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0), atol=1e-5, rtol=0)
    expected = torch.stack([b.var((0, 2, 3), unbiased=True) for b in batches]).mean(0)
    torch.testing.assert_close(norm.running_var.double(), expected, atol=1e-4, rtol=0)
    assert norm.momentum == net[1].momentum


def test_raw_pixels_are_the_image() -> None:
    from pipeline.evaluate.features import raw_pixels

    images = pictures(2)
    pixels = raw_pixels(images)
    assert pixels.shape == (2, 192) and pixels.dtype == torch.float32
    assert torch.equal((pixels * 255).round().to(torch.uint8).view_as(images), images)
