"""Linear and low-shot probes: the regression by its own optimality, choices without the asked images, draws, the verb."""

from __future__ import annotations

import numpy as np
import pytest

from methods.parts.errors import ConfigError
from pipeline.evaluate.probes import CHOICES, LOWSHOT_PENALTY, draw, fitted, linear_accuracy, lowshot_accuracy, spread_of, unit_rows


def clusters(rows: int, spread: float, seed: int, classes: int = 4, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = np.arange(rows) % classes
    return (centres[labels] + spread * np.random.default_rng(seed).normal(size=(rows, width))).astype(np.float32), labels


def test_the_penalty_is_that_of_the_mean_loss() -> None:
    """At MSN's weights the gradient of mean CE + lambda / 2 |w|^2, lambda = 0.00025 / n, vanishes; there is no intercept."""
    x, labels = clusters(20, 1.0, 0)
    x = unit_rows(x).astype(np.float64)
    model = fitted(x, labels, 1 / LOWSHOT_PENALTY, fit_intercept=False, max_iter=10_000, tol=1e-10)
    logits = x @ model.coef_.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = (p - np.eye(4)[labels]).T @ x / len(x) + LOWSHOT_PENALTY / len(x) * model.coef_
    assert np.abs(gradient).max() < 1e-7 < np.abs(model.coef_).max() and not model.intercept_.any()


def test_rows_are_centred_and_of_unit_length() -> None:
    x, _ = clusters(6, 1.0, 0)
    rows = unit_rows(3 * x + 5)
    np.testing.assert_allclose(rows.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(rows, unit_rows(x), atol=1e-5)
    assert np.isfinite(unit_rows(np.ones((2, 3)))).all()


def test_linear_finds_classes_and_chooses_by_training_images_alone() -> None:
    (bank, labels), (queries, truth) = clusters(400, 1.2, 0), clusters(300, 1.2, 1)
    accuracy, chosen = linear_accuracy(bank, labels, queries, truth)
    assert accuracy > 0.8 and chosen in CHOICES
    scaled, again = linear_accuracy(bank * np.logspace(-3, 3, 12), labels, queries * np.logspace(-3, 3, 12), truth)
    assert scaled == pytest.approx(accuracy, abs=0.01) and again == chosen
    assert linear_accuracy(bank, labels, queries, (truth + 1) % 4)[1] == chosen  # other answers, the same choice
    order = np.random.default_rng(0).permutation(400)[:40]  # wrong labels of the tenth that decides, and only they, change it
    wrong = labels.copy()
    wrong[order] = np.random.default_rng(1).permutation(wrong[order])
    assert linear_accuracy(bank, wrong, queries, truth)[0] < accuracy + 0.02
    unknown = truth.copy()
    unknown[::2] = -1
    assert linear_accuracy(bank, labels, queries, unknown)[0] == pytest.approx(accuracy, abs=0.06)


def test_a_feature_that_never_changes_does_no_harm() -> None:
    (bank, labels), (queries, truth) = clusters(200, 1.0, 0), clusters(100, 1.0, 1)
    flat, other = np.full((200, 1), 7.0, np.float32), np.full((100, 1), 8.0, np.float32)
    accuracy, _ = linear_accuracy(np.hstack([bank, flat]), labels, np.hstack([queries, other]), truth)
    assert accuracy == linear_accuracy(bank, labels, queries, truth)[0]


def test_more_images_are_better_and_noise_is_at_chance() -> None:
    (bank, labels), (queries, truth) = clusters(400, 1.2, 0), clusters(400, 1.2, 1)
    found = {}
    for count in (1, 5, 50):
        drawn = [draw(np.arange(400), labels, count, seed) for seed in range(5)]
        found[count] = np.mean([lowshot_accuracy(bank[d.flatten()], labels[d.flatten()], queries, truth) for d in drawn])
    assert found[1] < found[5] < found[50]
    noise = np.random.default_rng(2).normal(size=(400, 12))
    assert lowshot_accuracy(noise[:20], labels[:20], noise[20:], labels[20:]) == pytest.approx(0.25, abs=0.08)


def test_draws_are_balanced_repeatable_and_nested() -> None:
    ids, labels = np.arange(100, 160), np.repeat([0, 3, -1], 20)
    five = draw(ids, labels, 5, seed=1)
    assert five.shape == (2, 5) and all(100 <= i < 120 for i in five[0]) and all(120 <= i < 140 for i in five[1])
    assert len(np.unique(five)) == 10
    np.testing.assert_array_equal(five, draw(ids, labels, 5, seed=1))
    np.testing.assert_array_equal(five[:, :2], draw(ids, labels, 2, seed=1))
    np.testing.assert_array_equal(five, draw(ids[::-1], labels[::-1], 5, seed=1))  # whatever the order of the source
    assert not np.array_equal(five, draw(ids, labels, 5, seed=2))
    with pytest.raises(ConfigError, match=r"evaluate\.lowshot_images: 21 asked for, but class frog has 20"):
        draw(ids, labels, 21, 0, ["frog"])
    assert spread_of([0.5]) == 0.0 and spread_of([0.4, 0.6]) == pytest.approx(0.2 / 2**0.5)
