"""The data of pictures: a run, a backbone without its run, or a recipe. Each part is read or computed at its first use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from methods.parts.backbones import build_backbone
from methods.parts.contract import Method, RunFacts, registered
from methods.parts.errors import ConfigError
from methods.parts.norms import has_batch_norm
from methods.parts.vit import ViT
from pipeline import checkpoint
from pipeline.build import build_method
from pipeline.config import RunConfig, from_yaml
from pipeline.data.decode import decode
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import EvaluationImages, evaluation_images
from pipeline.data.sources.base import open_source
from pipeline.evaluate.clusters import Clusters
from pipeline.evaluate.features import calibrate_batchnorm
from pipeline.evaluate.final import MEMORY_LIMIT, Scores, final_scores
from pipeline.evaluate.online import Online
from pipeline.export import SPEC, registry
from pipeline.export.evaluation import config_of
from pipeline.figures.pictures import NothingToDraw
from pipeline.run_folder import RunFolder
from pipeline.shell import program

MAP_SIZE = 224  # pixels; on smaller images a ViT has too few patches for a map that can be read
LEAST = 8  # patches on a side; a coarser map says nothing of an image's parts
MANY = 2**31  # images of a run whose tables by image are not read


@dataclass
class FigureContext:
    """A run with its folder, an exported backbone, or a recipe.

    Attributes:
        config: the settings of the run; those of data, views and evaluation may be changed.
        device: device of the networks.
        folder: None = a backbone without its run, or a recipe.
        export: an exported backbone; None = the run's.
    """

    config: RunConfig
    device: torch.device
    folder: RunFolder | None = None
    export: Path | None = None

    def __post_init__(self) -> None:
        self.held_out = self.config.data.held_out  # of the run, whatever is changed later

    @classmethod
    def of(cls, found: RunFolder | Path | RunConfig) -> FigureContext:
        """Return the context of a run or an export, as `pipeline.export.find.run_or_model` finds them, or of a recipe."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(found, RunFolder):
            return cls(from_yaml(found.config_text()), device, found)
        return cls(found, device) if isinstance(found, RunConfig) else cls(config_of(found), device, export=found)

    @property
    def name(self) -> str:
        return self.folder.name if self.folder else str(self.export or self.config.recipe)

    @property
    def run(self) -> RunFolder:
        """The folder of the run.

        Raises:
            NothingToDraw: a model without its run, or a recipe.
        """
        if self.folder:
            return self.folder
        if self.export:
            raise NothingToDraw(f"model={self.name}: an exported backbone is without head and curves; give the run that made it")
        raise NothingToDraw(f"recipe={self.name}: is not trained; give a run of it, or draw views or masks")

    @property
    def facts(self) -> RunFacts:
        """Numbers that neither state nor networks depend on; the images drawn may be others than the run's."""
        batch = self.config.train.global_batch_size
        return RunFacts(global_batch_size=batch, steps_per_epoch=1, total_steps=1, num_images=MANY, num_ids=MANY)

    @cached_property
    def dataset(self) -> ImageDataset:
        return open_source(self.config.data)

    @cached_property
    def has_own_images(self) -> bool:
        """Whether the images are those of the run, with the same ones held out."""
        if self.folder:
            known = self.folder.state().get("fingerprint")
        else:
            known = registry.read_export(self.export)[1].facts.get("data_fingerprint") if self.export else None
        return known == self.dataset.fingerprint and self.config.data.held_out == self.held_out

    def images_of(self, part: str) -> str:
        """Return what pictures call the images of a part, `held-out images of photos/`; other images than the run's are of no part."""
        name = "/".join(self.config.data.path.rstrip("/").split("/")[-2:])
        return f"{part} images of {name}" if self.has_own_images else f"images of {name}"

    @cached_property
    def backbone(self) -> nn.Module:
        """The backbone of the export, or of the last checkpoint of a run without an export."""
        export = self.export or self.run.model
        if self.export or (export / SPEC).is_file():
            return registry.load_export(export)[0].to(self.device)
        return self.method.evaluation_backbone()

    @cached_property
    def method(self) -> Method:
        """The method in the state of the run's last checkpoint, without memory banks.

        Raises:
            NothingToDraw: a model without its run, a recipe, or a run without a checkpoint.
        """
        pointed = checkpoint.pointed_to(self.run.checkpoints)
        if pointed is None:
            raise NothingToDraw(f"run={self.name}: has no checkpoint yet; draw this after the first one")
        config = from_yaml(self.run.config_text())
        method = build_method(config, self.facts)
        method.load_state_dict(checkpoint.load(pointed)["method"])
        return method.to(self.device)

    @cached_property
    def untrained(self) -> nn.Module:
        """The randomly initialised backbone of the run's seed."""
        torch.manual_seed(self.config.train.seed)
        return build_backbone(self.config.backbone).to(self.device)

    @cached_property
    def calibrated(self) -> nn.Module:
        """The untrained backbone with batch-norm statistics of training images, if it has batch norms."""
        if not has_batch_norm(self.untrained):
            return self.untrained
        images, data = self.training_images(256).images, self.config.data
        return calibrate_batchnorm(self.untrained, images, mean=data.mean, std=data.std, device=self.device)

    @cached_property
    def scores(self) -> Scores:
        """kNN and its baselines."""
        return final_scores(self.config, self.dataset, self.backbone, self.untrained, self.device)

    @cached_property
    def clusters(self) -> Clusters:
        """The clusters of the kNN bank; without labels, of as many training images.

        Raises:
            NothingToDraw: a method without clusters.
        """
        if not self.method.has_clusters:
            names = ", ".join(name for name, entry in registered().items() if entry.method.has_clusters)
            raise NothingToDraw(f"run={self.name}: its method has no clusters; give a run of one of {names}")
        return Online(self.config, self.dataset, self.device, torch.float32).clusters(self.method)

    def training_images(self, most: int, seed: int = 1) -> EvaluationImages:
        """Return centre crops of at most `most` training images at evaluation size, fewer if they are large. The choice is repeatable."""
        ids = self.dataset.training_ids(self.config.data.held_out)
        return self._images(ids, min(most, max(64, MEMORY_LIMIT // (self.config.evaluation_size**2 * 3))), seed)

    @property
    def map_size(self) -> int:
        """The side, in pixels, at which maps of patches are drawn: the evaluation's, at least `MAP_SIZE`, in whole patches."""
        size = max(MAP_SIZE, self.config.evaluation_size)
        patch = self.backbone.patch_embed.patch_size[0] if isinstance(self.backbone, ViT) else 1
        return -(-size // patch) * patch

    def require_fine(self, rows: int, columns: int) -> None:
        """Raise NothingToDraw if a map of patches is too coarse for a picture."""
        if min(rows, columns) < LEAST:
            found = f"{rows} x {columns} patches at {self.map_size} pixels"
            raise NothingToDraw(f"model={self.name}: {found} are too few for a picture; use a larger evaluate.size")

    def a_few_images(self, count: int = 8, size: int | None = None) -> tuple[Tensor, str]:
        """Return held-out images of many classes, uint8 `(count, H, W, 3)`, and their description; training images if none are held out.

        They are any images of a dataset that is not the run's.

        Args:
            size: their side in pixels; None = the evaluation's.
        """
        ids, part = self.dataset.held_out_ids(self.held_out if self.has_own_images else 0), "held-out"
        if not len(ids):
            ids, part = self.dataset.training_ids(0), "training"
        found = self._images(ids, 64, 4, size)
        return found.images[torch.from_numpy(np.sort(spread_over_classes(found.labels.numpy(), count)))], self.images_of(part)

    def originals(self, ids: np.ndarray) -> list[np.ndarray]:
        """Return whole images as they are in the source, uint8 `(H, W, 3)`."""
        return [np.asarray(decode(sample.image)) for sample in self.dataset.read(ids)]

    def _images(self, ids: np.ndarray, most: int, seed: int, size: int | None = None) -> EvaluationImages:
        chosen = np.sort(np.random.default_rng(seed).permutation(ids)[:most])
        found = evaluation_images(self.dataset, chosen, size or self.config.evaluation_size)
        if not len(found.images):
            tried = f"none of {len(chosen)} images tried can be decoded"
            raise ConfigError(f"data.path={self.config.data.path}: {tried}; see {program()} doctor")
        return found


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of at most `count` images of many classes."""
    order = np.random.default_rng(2).permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    first = np.random.default_rng(3).permutation(first)
    rest = np.setdiff1d(np.arange(len(order)), first)
    chosen: np.ndarray = order[np.concatenate([first, rest])[:count]]
    return chosen
