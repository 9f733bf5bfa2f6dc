"""Online evaluation: kNN on held-out images during training, and the clusters of a method that has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methods.parts.contract import Method
from methods.parts.errors import ConfigError
from pipeline.config import RunConfig
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import DecodeFailure, EvaluationImages, evaluation_images
from pipeline.evaluate.clusters import Clusters, assign
from pipeline.evaluate.features import Precision, effective_rank, extract
from pipeline.evaluate.final import MEMORY_LIMIT, KNNData
from pipeline.evaluate.knn import knn_accuracy
from pipeline.evaluate.probes import linear_accuracy


class Online:
    """Evaluates in the precision of training, on images that are read at the first use and then cached.

    Args:
        on_bad_images: called with the images that could not be decoded.
        cache: images shared with other objects for the same data; None = not shared.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        device: torch.device,
        dtype: torch.dtype,
        on_bad_images: Callable[[list[DecodeFailure]], None] = lambda bad: None,
        cache: dict[Any, Any] | None = None,
    ) -> None:
        self.config, self.dataset, self.device, self.on_bad_images = config, dataset, device, on_bad_images
        self.cache = {} if cache is None else cache
        self.precision: Precision = "bf16" if dtype is torch.bfloat16 else "float32"

    @cached_property
    def has_knn(self) -> bool:
        """Whether the bank has labels of two classes and the queries have a label."""
        fraction = self.config.data.held_out
        bank_labels, query_labels = (
            self.dataset.labels[ids] for ids in (self.dataset.training_ids(fraction), self.dataset.held_out_ids(fraction))
        )
        return bool((query_labels >= 0).any()) and len(np.unique(bank_labels[bank_labels >= 0])) >= 2

    @property
    def measures(self) -> bool:
        """Whether a backbone can be measured.

        Raises:
            ConfigError: `evaluate.score` needs labels, and there are none.
        """
        wanted = self.config.evaluate.score
        if wanted in ("knn", "linear") and not self.has_knn:
            raise ConfigError(
                f"evaluate.score={wanted}: {self.config.data.path} has no labels of two classes, or nothing is held out; use rankme"
            )
        return self.has_knn or wanted is not None

    def measure(self, backbone: nn.Module) -> dict[str, float]:
        """Return `knn`, top-1 of a backbone on held-out images, if there are labels; and `score`, if `evaluate.score` is set."""
        settings, found = self.config.evaluate, {}
        if self.has_knn:
            data = self.knn_data
            bank, queries = self.features(backbone, data.bank), self.features(backbone, data.queries)
            bank_labels, query_labels = data.bank.labels, data.queries.labels
            found["knn"] = knn_accuracy(bank, bank_labels, queries, query_labels, settings.knn_k, settings.knn_temperature)
            if settings.score == "knn":
                found["score"] = found["knn"]
            elif settings.score == "linear":
                found["score"], _ = linear_accuracy(bank.numpy(), bank_labels.numpy(), queries.numpy(), query_labels.numpy())
        if settings.score == "rankme":
            rows = bank if self.has_knn else self.features(backbone, self.clustered_images)
            found["rankme"] = effective_rank(rows)
            found["score"] = found["rankme"] / min(rows.shape)
        return found

    def features(self, backbone: nn.Module, part: EvaluationImages) -> Tensor:
        """Return the features `(N, D)` of cached images."""
        mean, std = self.config.data.mean, self.config.data.std
        return extract(backbone, part.images, mean=mean, std=std, device=self.device, precision=self.precision)

    def clusters(self, method: Method) -> Clusters:
        """Return the clusters of the kNN bank; without labels, of as many training images."""
        found = self.clustered_images
        mean, std = self.config.data.mean, self.config.data.std
        clusters = assign(method, found.images, found.labels, mean=mean, std=std, device=self.device, precision=self.precision)
        return replace(clusters, ids=found.ids.numpy())

    @cached_property
    def knn_data(self) -> KNNData:
        settings = self.config.evaluate
        key = ("knn", self.config.data, self.config.evaluation_size, settings.online_bank, settings.knn_queries)
        data = self.cache.get(key) or KNNData.load(self.config, self.dataset, settings.online_bank)
        assert data is not None
        self.cache[key] = data
        self.on_bad_images([*data.bank.bad, *data.queries.bad])
        return data

    @cached_property
    def clustered_images(self) -> EvaluationImages:
        if self.has_knn:
            return self.knn_data.bank
        size = self.config.evaluation_size
        most = min(self.config.evaluate.online_bank, max(1, MEMORY_LIMIT // (size * size * 3)))
        ids = np.random.default_rng(0).permutation(self.dataset.training_ids(self.config.data.held_out))[:most]
        key = ("clusters", self.config.data, size, most)
        found: EvaluationImages = self.cache.get(key) or evaluation_images(self.dataset, np.sort(ids), size)
        self.cache[key] = found
        self.on_bad_images(found.bad)
        return found
