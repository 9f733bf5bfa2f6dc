"""Source without an end: `stream:FILE.py:FUNCTION` or `stream:MODULE:FUNCTION`, a Python function that yields images."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.data.image_dataset import ImageDataset, Sample, fingerprint
from pipeline.data.sampler import Sampler

PREVIEW_IMAGES = 256  # first images, for figures and the doctor


class IterableDataset(ImageDataset):
    """Images in their order of arrival; the id of an image is its number in that order.

    The function takes no argument and yields the bytes of image files. It is called in one process for the whole run, for
    any number of workers. When it ends it is called again. A resumed run calls it anew and skips the images that it has
    seen, so a function that yields the same images each time gives the same run.

    As an `ImageDataset` it holds the first `PREVIEW_IMAGES` images.
    """

    def __init__(self, path: str, function: bytes) -> None:
        super().__init__(
            labels=np.full(PREVIEW_IMAGES, -1),
            class_names=[],
            fingerprint=fingerprint([path], []),
            spans=np.array([[0, PREVIEW_IMAGES]]),
        )
        self.source, self.function = path, function
        self.reader: Any = None

    def describe(self) -> str:
        return "images without end"

    def num_training(self, fraction: float) -> int | None:
        return None

    def path(self, id: int) -> str:
        return f"{self.source}, image {id}"

    def make_sampler(
        self, *, seed: int, held_out: float, global_batch: int, num_shards: int, images_per_task: int, steps_per_epoch: int
    ) -> Sampler:
        return SequentialSampler(global_batch, num_shards, images_per_task, steps_per_epoch)

    def bind_to_run(self, sampler: Sampler, first_step: int) -> IterableDataset:
        """Return this source with the reader of the run, an actor that ends when the returned object is deleted."""
        import ray

        it = IterableDataset(self.source, self.function)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 64}
        it.reader = ray.remote(Reader).options(**options).remote(self.function, first_step * sampler.global_batch)
        return it

    def read(self, ids: Sequence[int] | np.ndarray) -> list[Sample]:
        asked = [int(i) for i in ids]
        found = [beginning(self.function)[id] for id in asked] if self.reader is None else self._ask(asked)
        return [Sample(id, image, -1, self.path(id)) for id, image in zip(asked, found, strict=True)]

    def _ask(self, ids: list[int]) -> list[bytes]:
        import ray

        images: list[bytes] = ray.get(self.reader.read.remote(ids))
        return images


class SequentialSampler(Sampler):
    """Deals images in their order of arrival: batch s starts with image s * global_batch, and each shard in turn gets a part of it."""

    def __init__(self, global_batch: int, num_shards: int, images_per_task: int, steps_per_epoch: int) -> None:
        self._cut(global_batch, num_shards, images_per_task, steps_per_epoch)

    def task_ids(self, epoch: int, group: int, shard: int) -> np.ndarray:
        first = epoch * self.steps_per_epoch + group * self.steps_per_group
        steps = np.arange(first, first + self.steps_in(group), dtype=np.int64)
        return (steps[:, None] * self.global_batch + shard * self.shard_batch + np.arange(self.shard_batch)).reshape(-1)


class Reader:
    """Calls the function once and returns its images by number. Images before a requested one are buffered.

    Args:
        function: the pickled function.
        first: number of the first image of the run; those before are skipped.
    """

    def __init__(self, function: bytes, first: int) -> None:
        self.function, self.next = function, first
        self.iterator: Iterator[bytes] | None = None
        self.buffer: dict[int, bytes] = {}
        self.lock = threading.Lock()

    def read(self, ids: list[int]) -> list[bytes]:
        """Return encoded images in the order of `ids`.

        Raises:
            ValueError: the function yields nothing, or a value that is not the bytes of an image.
        """
        with self.lock:
            if self.iterator is None:
                self.iterator = itertools.islice(arrivals(self.function), self.next, None)
            while self.next <= max(ids):
                self.buffer[self.next] = next(self.iterator)
                self.next += 1
            missing = {id for id in ids if id not in self.buffer}
            if missing:  # this reader or a task was restarted: read again from the beginning
                again = itertools.islice(arrivals(self.function), max(missing) + 1)
                self.buffer |= {id: image for id, image in enumerate(again) if id in missing}
            return [self.buffer.pop(id) for id in ids]


def arrivals(function: bytes) -> Iterator[bytes]:
    """Yield the images of the function without end: call it again whenever it ends."""
    from ray import cloudpickle

    call: Callable[[], Iterable[Any]] = cloudpickle.loads(function)
    while True:
        empty = True
        for value in call():
            empty = False
            if not isinstance(value, (bytes, bytearray, memoryview)):
                raise ValueError(f"the stream's function yields {type(value).__name__}; let it yield the bytes of image files")
            yield bytes(value)
        if empty:
            raise ValueError("the stream's function yields nothing; let it yield the bytes of image files")


@lru_cache(maxsize=1)
def beginning(function: bytes) -> list[bytes]:
    """Return the first `PREVIEW_IMAGES` images."""
    return list(itertools.islice(arrivals(function), PREVIEW_IMAGES))


def open_iterable(path: str) -> IterableDataset:
    """Find the function of `stream:FILE.py:FUNCTION` or `stream:MODULE:FUNCTION`, and pickle it with its module.

    Raises:
        ConfigError: no such file, module or function, one that cannot be imported, or one that does not yield images.
    """
    from ray import cloudpickle

    place, _, name = path.removeprefix("stream:").rpartition(":")
    if not place or not name:
        raise ConfigError(f"data.path={path}: not the form of a stream; use stream:FILE.py:FUNCTION or stream:MODULE:FUNCTION")
    try:
        module = _import_file(place) if place.endswith(".py") else _import_module(place)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise ConfigError(f"data.path={path}: {place} cannot be imported ({text}); repair it, or check the name") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"data.path={path}: {place} has no function {name}; give one that yields the bytes of images")
    cloudpickle.register_pickle_by_value(module)  # other machines do not have the file
    pickled = cloudpickle.dumps(function)
    try:
        next(arrivals(pickled))
    except Exception as error:
        raise ConfigError(f"data.path={path}: the first image cannot be had ({type(error).__name__}: {error})") from error
    return IterableDataset(path, pickled)


def with_absolute_path(path: str) -> str:
    """Return the path with an absolute file name."""
    place, _, name = path.removeprefix("stream:").rpartition(":")
    return f"stream:{os.path.abspath(os.path.expanduser(place))}:{name}" if place.endswith(".py") else path


def _import_file(place: str) -> Any:
    file = os.path.abspath(os.path.expanduser(place))
    name = "manyviews_stream_" + os.path.basename(file).removesuffix(".py")  # differs from the names of other modules
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # cloudpickle looks for it there
    spec.loader.exec_module(module)
    return module


def _import_module(place: str) -> Any:
    if os.getcwd() not in sys.path:  # absent for an installed command
        sys.path.append(os.getcwd())
    return importlib.import_module(place)
