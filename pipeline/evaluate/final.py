"""What is measured, on which images, and beside which baselines.

During training, kNN asks held-out training images only; the test split is read once, at the end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
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

MEMORY_LIMIT = 512 * 2**20  # bytes of evaluation images kept in memory


@dataclass
class KNNData:
    """Labelled images at evaluation size: those that vote, and those that are asked."""

    bank: EvaluationImages
    queries: EvaluationImages
    split: str  # "held-out" or "test"

    @classmethod
    def load(cls, config: RunConfig, dataset: ImageDataset, most_bank: int) -> KNNData | None:
        """Training images against held-out ones; None when there are no labels of two classes or nothing is held out."""
        fraction = config.data.held_out
        asked = dataset.held_out_ids(fraction)
        return cls.between(
            config, dataset, dataset.training_ids(fraction), most_bank, dataset, asked, config.evaluate.knn_queries, "held-out"
        )

    @classmethod
    def between(
        cls,
        config: RunConfig,
        bank: ImageDataset,
        bank_ids: np.ndarray,
        most_bank: int,
        asked: ImageDataset,
        asked_ids: np.ndarray,
        most_asked: int,
        split: str,
    ) -> KNNData | None:
        """At most so many labelled images of each, fewer where they would not fit into `MEMORY_LIMIT`."""
        share = min(1.0, MEMORY_LIMIT / ((most_bank + most_asked) * config.evaluation_size**2 * 3))
        bank_ids, asked_ids = labelled(bank, bank_ids, int(most_bank * share)), labelled(asked, asked_ids, int(most_asked * share))
        if not len(asked_ids) or len(np.unique(bank.labels[bank_ids])) < 2:
            return None
        size = config.evaluation_size
        queries = evaluation_images(asked, asked_ids, size)
        queries = dataclasses.replace(queries, labels=same_classes(asked, bank, queries.labels))
        return cls(evaluation_images(bank, bank_ids, size), queries, split)


def labelled(dataset: ImageDataset, ids: np.ndarray, most: int) -> np.ndarray:
    """At most `most` labelled ids, an even and repeatable choice, sorted."""
    ids = np.asarray(ids)[dataset.labels[ids] >= 0]
    return np.sort(np.random.default_rng(0).permutation(ids)[:most])


def same_classes(source: ImageDataset, target: ImageDataset, labels: Tensor) -> Tensor:
    """Labels of one source in the numbering of another, by class name; -1 for a class that the other lacks."""
    if source.class_names == target.class_names or not source.class_names:
        return labels
    numbers = {name: i for i, name in enumerate(target.class_names)}
    table = torch.tensor([numbers.get(name, -1) for name in source.class_names] + [-1])
    return table[labels]  # an unknown label, -1, takes the last entry


@dataclass(frozen=True)
class Score:
    """One line of the table: top-1 as a fraction, and what it is of."""

    key: str
    label: str
    accuracy: float


@dataclass(frozen=True)
class Scores:
    """kNN of the trained backbone and of what it must beat. Empty without labels."""

    rows: tuple[Score, ...]
    protocol: str  # the settings, readable
    split: str = ""

    def get(self, key: str) -> float:
        return next(row.accuracy for row in self.rows if row.key == key)

    @property
    def gain(self) -> float:
        """Points of accuracy above the best baseline (raw pixels under L2, or the untrained backbone)."""
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
    """kNN on the test split (`evaluate.path`, or the source's own), else on held-out images, beside the baselines.

    Baselines: raw pixels (Euclidean, one vote each), raw pixels (centred cosine), the untrained backbone with its
    initial batch-norm statistics, and with statistics calibrated on the bank.
    """
    data = final_data(config, dataset)
    if data is None:
        return Scores((), "no kNN: there are no labels of at least two classes, or no images held out", "none")
    k, temperature = config.evaluate.knn_k, config.evaluate.knn_temperature
    mean, std = config.data.mean, config.data.std
    asked = data.queries.labels

    def pixels(centre: bool) -> float:
        bank, queries = raw_pixels(data.bank.images), raw_pixels(data.queries.images)
        if centre:
            bank, queries = centred(bank, queries)
            return knn_accuracy(bank, data.bank.labels, queries, asked, k, temperature)
        return knn_accuracy(bank, data.bank.labels, queries, asked, k, metric="l2")

    def features(network: nn.Module) -> float:
        bank, queries = (extract(network, part.images, mean=mean, std=std, device=device) for part in (data.bank, data.queries))
        return knn_accuracy(bank, data.bank.labels, queries, asked, k, temperature)

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
        f"{len(asked):,} {data.split} images asked, {config.evaluation_size} px"
    )
    return Scores(rows, protocol, data.split)


def final_data(config: RunConfig, dataset: ImageDataset) -> KNNData | None:
    """Bank and queries of the final evaluation.

    Raises:
        ConfigError: `evaluate.path` has no labels that the training images know.
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
