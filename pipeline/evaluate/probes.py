"""Logistic regression on frozen features: `linear` on all labels, `lowshot` on a few images of each class.

Both are measured on the queries of the final kNN: the test split, or else held-out images. No setting is chosen on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methods.parts.errors import ConfigError
from pipeline.config import RunConfig
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import evaluation_images
from pipeline.evaluate.features import calibrate_batchnorm, extract
from pipeline.evaluate.final import KNNData, final_data

CHOICES = tuple(10.0 ** np.arange(-4, 3))  # C
LOWSHOT_PENALTY = 0.00025  # lambda n of MSN's evaluation: the mean loss over n images + lambda / 2 |w|^2


@dataclass(frozen=True)
class ProbeRow:
    """Top-1 of one backbone as a fraction; the mean of several draws, with their standard deviation as `spread`."""

    key: str
    label: str
    accuracy: float
    spread: float | None = None


@dataclass(frozen=True)
class ProbeScores:
    """The scores of one protocol, and its settings as text."""

    name: str
    rows: tuple[ProbeRow, ...]
    protocol: str
    split: str

    def get(self, key: str) -> float:
        return next(row.accuracy for row in self.rows if row.key == key)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"protocol": self.protocol, "split": self.split}
        for row in self.rows:
            values[row.key] = row.accuracy
            if row.spread is not None:
                values[f"{row.key}_spread"] = row.spread
        return values


class Probes:
    """Linear and low-shot scores of a trained and an untrained backbone. Features are computed once and cached.

    Raises:
        ConfigError: images without labels of two classes.
    """

    def __init__(self, config: RunConfig, dataset: ImageDataset, backbone: nn.Module, untrained: nn.Module, device: torch.device) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        data = final_data(config, dataset)
        if data is None:
            raise ConfigError(f"data.path={config.data.path}: no labels of two classes, or nothing held out; give evaluate.path")
        self.data: KNNData = data
        mean, std = config.data.mean, config.data.std
        calibrated = calibrate_batchnorm(untrained.to(device), data.bank.images, mean=mean, std=std, device=device)
        self.backbones = {"trained": backbone, "untrained": calibrated}
        self.cached_features: dict[tuple[str, str], Tensor] = {}

    def features(self, key: str, name: str, images: Tensor) -> np.ndarray:
        """Return the features `(N, D)` of a backbone; `name` identifies the images in the cache."""
        if (key, name) not in self.cached_features:
            mean, std = self.config.data.mean, self.config.data.std
            self.cached_features[key, name] = extract(self.backbones[key], images, mean=mean, std=std, device=self.device)
        return self.cached_features[key, name].numpy()

    def linear(self) -> ProbeScores:
        """Fit standardised features of all training images, with C chosen on a tenth of them."""
        bank, test = self.data.bank, self.data.queries
        rows, chosen = [], {}
        for key in self.backbones:
            x, queries = self.features(key, "bank", bank.images), self.features(key, "queries", test.images)
            accuracy, chosen[key] = linear_accuracy(x, bank.labels.numpy(), queries, test.labels.numpy())
            rows.append(ProbeRow(key, f"{key} backbone", accuracy))
        text = (
            f"logistic regression on standardised features, C {chosen['trained']:g} of {CHOICES[0]:g} to {CHOICES[-1]:g} by a tenth of the "
            f"{len(bank.labels):,} training images, refitted to all; {self.query_description()}"
        )
        return ProbeScores("linear", tuple(rows), text, self.data.split)

    def lowshot(self) -> ProbeScores:
        """Run MSN's protocol: centred rows of unit length, no intercept, a fixed penalty; several draws of images."""
        settings, test = self.config.evaluate, self.data.queries
        ids = self.dataset.training_ids(self.config.data.held_out)
        labels = self.dataset.labels[ids]
        most = max(settings.lowshot_images)
        draws = [draw(ids, labels, most, seed, self.dataset.class_names) for seed in range(settings.lowshot_draws)]
        found = evaluation_images(self.dataset, np.unique(np.concatenate(draws)), self.config.evaluation_size)
        place = {int(image): row for row, image in enumerate(found.ids.tolist())}
        rows = []
        for count in settings.lowshot_images:
            for key in self.backbones:
                x, queries = self.features(key, "drawn", found.images), self.features(key, "queries", test.images)
                accuracies = []
                for drawn in draws:
                    own = [place[i] for i in drawn[:, :count].flatten().tolist() if i in place]  # without images that cannot be decoded
                    accuracies.append(lowshot_accuracy(x[own], found.labels.numpy()[own], queries, test.labels.numpy()))
                text = f"{key} backbone, {count} image{'s' if count > 1 else ''} per class"
                rows.append(ProbeRow(f"{key}_{count}", text, float(np.mean(accuracies)), spread_of(accuracies)))
        text = (
            f"logistic regression on rows centred and of unit length, no intercept, lambda {LOWSHOT_PENALTY:g} / n; mean and standard "
            f"deviation of {len(draws)} draws; {self.query_description()}"
        )
        return ProbeScores("lowshot", tuple(rows), text, self.data.split)

    def query_description(self) -> str:
        known = int((self.data.queries.labels >= 0).sum())
        return f"{known:,} {self.data.split} images as queries, {self.config.evaluation_size} px"


PROTOCOLS: dict[str, Callable[[Probes], ProbeScores]] = {"linear": Probes.linear, "lowshot": Probes.lowshot}


def linear_accuracy(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray, choices: Iterable[float] = CHOICES
) -> tuple[float, float]:
    """Return the top-1 of queries `(M, D)`, and the C with the best top-1 on a tenth of the bank `(N, D)`, of equal ones the smallest.

    Args:
        truth: labels of the queries, -1 unknown.
    """
    mean, std = bank.mean(axis=0, dtype=np.float64), bank.std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-6 * max(std.max(), 1e-30), std, np.inf)  # constant features become 0
    bank, queries = (((x - mean) / scale).astype(np.float32) for x in (bank, queries))
    order = np.random.default_rng(0).permutation(len(bank))
    validation, rest = order[: max(1, len(bank) // 10)], order[max(1, len(bank) // 10) :]
    scores = {
        C: float((fitted(bank[rest], labels[rest], C).predict(bank[validation]) == labels[validation]).mean()) for C in sorted(choices)
    }
    best = max(scores, key=lambda C: scores[C])
    return accuracy_of(fitted(bank, labels, best).predict(queries), truth), best


def lowshot_accuracy(images: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> float:
    """Return the top-1 of queries `(M, D)` from a few images `(n, D)` by MSN's protocol: C = 1 / (lambda n) = 1 / 0.00025."""
    model = fitted(unit_rows(images), labels, 1 / LOWSHOT_PENALTY, fit_intercept=False, max_iter=300, tol=1e-3)
    return accuracy_of(model.predict(unit_rows(queries)), truth)


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Subtract the mean of every row, and scale it to unit length."""
    x = x - x.mean(axis=1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)  # type: ignore[no-any-return]


def draw(ids: np.ndarray, labels: np.ndarray, count: int, seed: int, class_names: Iterable[str] = ()) -> np.ndarray:
    """Draw `count` random images of every class: `(classes, count)` ids. The first columns of a draw are a smaller draw.

    Raises:
        ConfigError: a class with fewer images.
    """
    random, names = np.random.default_rng(seed), dict(enumerate(class_names))
    chosen = []
    for label in np.unique(labels[labels >= 0]):
        own = np.sort(ids[labels == label])
        if len(own) < count:
            name = names.get(int(label), str(label))
            raise ConfigError(f"evaluate.lowshot_images: {count} asked for, but class {name} has {len(own)} training images; use fewer")
        chosen.append(random.permutation(own)[:count])
    return np.stack(chosen)


def fitted(x: np.ndarray, labels: np.ndarray, C: float, **settings: Any) -> Any:
    """Fit multinomial logistic regression: C sum of cross entropies + |w|^2 / 2."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a large C on separable classes does not converge, but its accuracy is final
        return LogisticRegression(C=C, **{"max_iter": 1000, **settings}).fit(x, labels)


def accuracy_of(predicted: np.ndarray, truth: np.ndarray) -> float:
    known = truth >= 0
    return float((predicted[known] == truth[known]).mean())


def spread_of(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
