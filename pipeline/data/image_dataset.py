"""Image datasets: the images of a source by dense ids 0 .. N-1, for every kind of source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.data.philox import HELD_OUT, uniforms
from pipeline.data.sampler import Sampler

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
MOST_HELD_OUT = 5000  # an accuracy on as many images is known to about half a point


class Sample(NamedTuple):
    """One encoded image of a source. A label of -1 is unknown."""

    id: int
    image: bytes
    label: int
    path: str


@dataclass(kw_only=True)
class ImageDataset:
    """The images of a source without their pixels. It is small and picklable, and does not depend on where the files are stored.

    Attributes:
        labels: `(N,)` int64 by id; -1 is unknown.
        class_names: name of every label, empty if there are none.
        fingerprint: hash of the list of images and the class names.
        spans: `(G, 2)` int64, first id and number of rows of every row group, file or other unit of reading.
        skipped: path and reason of every file that is not an image.
        test_path: test split of the source, as a value of `data.path`.
    """

    labels: np.ndarray
    class_names: list[str]
    fingerprint: str
    spans: np.ndarray
    skipped: list[tuple[str, str]] = field(default_factory=list)
    test_path: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self) -> str:
        """Return the number of images as text."""
        return f"{len(self):,} images"

    def num_training(self, fraction: float) -> int | None:
        """Return the number of training images; None if the source has no end."""
        return len(self.training_ids(fraction))

    def make_sampler(
        self, *, seed: int, held_out: float, global_batch: int, num_shards: int, images_per_task: int, steps_per_epoch: int
    ) -> Sampler:
        """Return the sampler of a run. Only a source without end needs `steps_per_epoch`.

        Raises:
            ConfigError: the shards cannot share the batch, or there are fewer images than one batch.
        """
        return Sampler(
            self.spans,
            self.training_ids(held_out),
            seed=seed,
            global_batch=global_batch,
            num_shards=num_shards,
            images_per_task=images_per_task,
        )

    def bind_to_run(self, sampler: Sampler, first_step: int) -> ImageDataset:
        """Return this dataset for the tasks of a run that starts with step `first_step`."""
        return self

    def path(self, id: int) -> str:
        """Return the path of an image, for messages."""
        raise NotImplementedError

    def read(self, ids: Sequence[int] | np.ndarray) -> list[Sample]:
        """Return the encoded images in the order of `ids`. A file that cannot be read gives empty bytes, so that ids stay stable."""
        cells = zip(ids, self._read(ids), strict=True)
        return [Sample(int(i), image, int(self.labels[i]), path or self.path(int(i))) for i, (image, path) in cells]

    def _read(self, ids: Sequence[int] | np.ndarray) -> Iterable[tuple[bytes, str | None]]:
        """Return the encoded bytes of every image, and its path if the source stores one."""
        raise NotImplementedError

    def held_out_ids(self, fraction: float) -> np.ndarray:
        """Return the sorted held-out ids, int64. They are chosen by a hash of the id, so they are the same in every run.

        Nothing is held out without labels, because held-out images are for kNN.
        """
        count = len(self)
        if fraction <= 0 or count < 2 or not (self.labels >= 0).any():
            return np.empty(0, np.int64)
        wanted = min(max(1, round(fraction * count)), count - 1, MOST_HELD_OUT)
        numbers = uniforms(0, 0, np.arange(count), HELD_OUT, 1)[:, 0]
        return np.sort(np.argsort(numbers, kind="stable")[:wanted])

    def training_ids(self, fraction: float) -> np.ndarray:
        """Return the sorted ids that are not held out, int64."""
        keep = np.ones(len(self), bool)
        keep[self.held_out_ids(fraction)] = False
        return np.flatnonzero(keep)


def numbered(labels: np.ndarray) -> list[str]:
    """Return the numbers of labels as class names."""
    top = int(labels.max(initial=-1)) + 1
    return [str(i) for i in range(top)] if top <= 100_000 else []


def fingerprint(lines: Iterable[str], class_names: Sequence[str]) -> str:
    """Return the hash of a list of images and the class names, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for line in (*lines, "classes", *class_names):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
