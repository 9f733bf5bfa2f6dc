"""What is measured while a run trains: kNN on held-out images, and the clusters of a method that has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import nn

from methods.parts.contract import Method
from pipeline.config import RunConfig
from pipeline.evaluate.clusters import Clusters, assign
from pipeline.evaluate.features import Precision, extract
from pipeline.evaluate.knn import knn_accuracy
from pipeline.evaluate.protocols import MEMORY_LIMIT, KNNData
from pipeline.ingest.manifest import Manifest
from pipeline.ingest.stream import BadSlot, EvaluationImages, evaluation_images


class Online:
    """Measures in the precision of training, on images that are read when first asked for and kept.

    A run that goes on after a loss does not wait for them.

    Args:
        found_bad: told of the images that could not be decoded.
    """

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        device: torch.device,
        dtype: torch.dtype,
        found_bad: Callable[[list[BadSlot]], None] = lambda bad: None,
    ) -> None:
        self.config, self.manifest, self.device, self.found_bad = config, manifest, device, found_bad
        self.precision: Precision = "bf16" if dtype is torch.bfloat16 else "float32"

    @cached_property
    def has_knn(self) -> bool:
        """Whether there are labels of two classes among those that vote, and one among those that are asked."""
        fraction = self.config.data.held_out
        voting, asked = (self.manifest.labels[ids] for ids in (self.manifest.training_ids(fraction), self.manifest.held_out_ids(fraction)))
        return bool((asked >= 0).any()) and len(np.unique(voting[voting >= 0])) >= 2

    def knn(self, backbone: nn.Module) -> float:
        """Top-1 of a backbone on held-out images."""
        data, settings = self.knn_data, self.config.evaluate
        mean, std = self.config.data.mean, self.config.data.std
        bank, queries = (
            extract(backbone, part.images, mean=mean, std=std, device=self.device, precision=self.precision)
            for part in (data.bank, data.queries)
        )
        return knn_accuracy(bank, data.bank.labels, queries, data.queries.labels, settings.knn_k, settings.knn_temperature)

    def clusters(self, method: Method) -> Clusters:
        """Where a method puts the training images that vote in the kNN; without labels, as many others."""
        found = self.clustered_images
        mean, std = self.config.data.mean, self.config.data.std
        return assign(method, found.images, found.labels, mean=mean, std=std, device=self.device, precision=self.precision)

    @cached_property
    def knn_data(self) -> KNNData:
        data = KNNData.load(self.config, self.manifest, self.config.evaluate.online_bank)
        assert data is not None
        self.found_bad([*data.bank.bad, *data.queries.bad])
        return data

    @cached_property
    def clustered_images(self) -> EvaluationImages:
        if self.has_knn:
            return self.knn_data.bank
        size = self.config.evaluation_size
        most = min(self.config.evaluate.online_bank, max(1, MEMORY_LIMIT // (size * size * 3)))
        ids = np.random.default_rng(0).permutation(self.manifest.training_ids(self.config.data.held_out))[:most]
        found = evaluation_images(self.manifest, np.sort(ids), size)
        self.found_bad(found.bad)
        return found
