"""Final evaluation: its images, its kNN, and the baselines.

During training, kNN uses held-out training images only; the test split is read once, at the end.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methods.parts.errors import ConfigError
from pipeline.config import RunConfig
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import EvaluationImages, evaluation_images
from pipeline.data.sources.base import open_test
from pipeline.evaluate.features import calibrate_batchnorm, extract, raw_pixels
from pipeline.evaluate.knn import centred, knn_accuracy

MEMORY_LIMIT = 512 * 2**20  # bytes of evaluation images in memory


@dataclass
class KNNData:
    """Labelled images at evaluation size: `bank` votes on the classes of `queries`."""

    bank: EvaluationImages
    queries: EvaluationImages
    split: str  # "held-out" or "test"

    @classmethod
    def load(cls, config: RunConfig, dataset: ImageDataset, most_bank: int) -> KNNData | None:
        """Return training images as bank and held-out ones as queries; None without labels of two classes or held-out images."""
        fraction = config.data.held_out
        query_ids = dataset.held_out_ids(fraction)
        return cls.between(
            config, dataset, dataset.training_ids(fraction), most_bank, dataset, query_ids, config.evaluate.knn_queries, "held-out"
        )

    @classmethod
    def between(
        cls,
        config: RunConfig,
        bank: ImageDataset,
        bank_ids: np.ndarray,
        most_bank: int,
        query_set: ImageDataset,
        query_ids: np.ndarray,
        most_queries: int,
        split: str,
    ) -> KNNData | None:
        """Return at most `most_bank` and `most_queries` labelled images, fewer if they exceed `MEMORY_LIMIT`."""
        share = min(1.0, MEMORY_LIMIT / ((most_bank + most_queries) * config.evaluation_size**2 * 3))
        bank_ids, query_ids = labelled(bank, bank_ids, int(most_bank * share)), labelled(query_set, query_ids, int(most_queries * share))
        if not len(query_ids) or len(np.unique(bank.labels[bank_ids])) < 2:
            return None
        size = config.evaluation_size
        queries = evaluation_images(query_set, query_ids, size)
        queries = dataclasses.replace(queries, labels=same_classes(query_set, bank, queries.labels))
        return cls(evaluation_images(bank, bank_ids, size), queries, split)


def labelled(dataset: ImageDataset, ids: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` labelled ids, sorted. The choice is uniform and repeatable."""
    ids = np.asarray(ids)[dataset.labels[ids] >= 0]
    return np.sort(np.random.default_rng(0).permutation(ids)[:most])


def same_classes(source: ImageDataset, target: ImageDataset, labels: Tensor) -> Tensor:
    """Map labels of one source to those of another by class name; -1 for a class that the other lacks."""
    if source.class_names == target.class_names or not source.class_names:
        return labels
    numbers = {name: i for i, name in enumerate(target.class_names)}
    table = torch.tensor([numbers.get(name, -1) for name in source.class_names] + [-1])
    return table[labels]  # the unknown label -1 maps to the last entry


@dataclass(frozen=True)
class Score:
    """One row of the table: top-1 as a fraction, and its label."""

    key: str
    label: str
    accuracy: float


@dataclass(frozen=True)
class Scores:
    """kNN of the trained backbone and of the baselines. Empty without labels."""

    rows: tuple[Score, ...]
    protocol: str  # settings as text
    split: str = ""
    queries: int = 0  # labelled images that were asked
    majority: float | None = None  # accuracy of the most common class of the bank, whatever the image

    def get(self, key: str) -> float:
        return next(row.accuracy for row in self.rows if row.key == key)

    @property
    def gain(self) -> float:
        """Return the points of accuracy above the best baseline (raw pixels under L2, or the untrained backbone)."""
        return 100 * (self.get("trained") - max(self.get(key) for key in ("raw_l2", "untrained", "untrained_calibrated")))

    def to_dict(self) -> dict[str, Any]:
        return {"protocol": self.protocol, "split": self.split} | {row.key: row.accuracy for row in self.rows}

    def metrics(self) -> dict[str, float]:
        return {f"final/{self.split}/{row.key}": row.accuracy for row in self.rows}

    def tags(self) -> dict[str, str]:
        return {f"knn_{self.split}_{row.key}".replace("-", "_"): f"{row.accuracy:.4f}" for row in self.rows} | (
            {"knn_protocol": self.protocol} if self.rows else {}
        )


def final_scores(config: RunConfig, dataset: ImageDataset, backbone: nn.Module, untrained: nn.Module, device: torch.device) -> Scores:
    """Evaluate kNN on the test split (`evaluate.path`, or that of the source), else on held-out images, and on the baselines.

    Baselines: raw pixels (Euclidean, one vote each), raw pixels (centred cosine), the untrained backbone with its
    initial batch-norm statistics, and with statistics calibrated on the bank.
    """
    data = final_data(config, dataset)
    if data is None:
        return Scores((), "no kNN: there are no labels of at least two classes, or no images held out", "none")
    k, temperature = config.evaluate.knn_k, config.evaluate.knn_temperature
    mean, std = config.data.mean, config.data.std
    query_labels = data.queries.labels

    def pixels(centre: bool) -> float:
        bank, queries = raw_pixels(data.bank.images), raw_pixels(data.queries.images)
        if centre:
            bank, queries = centred(bank, queries)
            return knn_accuracy(bank, data.bank.labels, queries, query_labels, k, temperature)
        return knn_accuracy(bank, data.bank.labels, queries, query_labels, k, metric="l2")

    def features(network: nn.Module) -> float:
        bank, queries = (extract(network, part.images, mean=mean, std=std, device=device) for part in (data.bank, data.queries))
        return knn_accuracy(bank, data.bank.labels, queries, query_labels, k, temperature)

    untrained = untrained.to(device)
    rows = (
        Score("raw_l2", "raw pixels (L2)", pixels(False)),
        Score("raw_cosine", "raw pixels (centred cosine)", pixels(True)),
        Score("untrained", "untrained backbone", features(untrained)),
        Score(
            "untrained_calibrated",
            "untrained backbone, calibrated BN",
            features(calibrate_batchnorm(untrained, data.bank.images, mean=mean, std=std, device=device)),
        ),
        Score("trained", "trained backbone", features(backbone)),
    )
    protocol = (
        f"kNN, k {k}, T {temperature:g}, cosine weighted vote; {len(data.bank.labels):,} training images vote, "
        f"{len(query_labels):,} {data.split} images as queries, {config.evaluation_size} px"
    )
    known = query_labels[query_labels >= 0]
    commonest = data.bank.labels[data.bank.labels >= 0].mode().values
    return Scores(rows, protocol, data.split, len(known), (known == commonest).double().mean().item())


def interval(accuracy: float, queries: int) -> tuple[float, float]:
    """Return Wilson's interval of an accuracy: 95 % of it contain the accuracy on endlessly many such images."""
    z = NormalDist().inv_cdf(0.975)
    middle, scale = accuracy + z**2 / (2 * queries), 1 + z**2 / queries
    reach = z * math.sqrt(accuracy * (1 - accuracy) / queries + (z / (2 * queries)) ** 2)
    return (middle - reach) / scale, (middle + reach) / scale


def final_data(config: RunConfig, dataset: ImageDataset) -> KNNData | None:
    """Return bank and queries of the final evaluation.

    Raises:
        ConfigError: `evaluate.path` has no labels of the classes of the training images.
    """
    bank_ids = dataset.training_ids(config.data.held_out)
    path = config.evaluate.path or dataset.test_path
    if path is None:
        return KNNData.load(config, dataset, config.evaluate.knn_bank)
    test = open_test(config.data, path)
    settings = config.evaluate
    data = KNNData.between(config, dataset, bank_ids, settings.knn_bank, test, np.arange(len(test)), settings.test_images, "test")
    if data is not None and bool((data.queries.labels < 0).all()):
        raise ConfigError(f"evaluate.path={path}: none of its classes occur in the training images; give the matching test split")
    return data
