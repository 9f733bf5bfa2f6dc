"""Embeddings of a whole dataset as Parquet, by a Ray Data batch job: tasks decode on CPUs, actors embed on GPUs if there are any.

    to/part-00000.parquet ...   id int64, path string, label int64, embedding fixed_size_list<float32>[D]; ordered by id
    to/_bad_images.jsonl        images that could not be decoded; they have no row
    to/_embed.json              model, data and settings, and whether the folder is complete

Readers of Parquet folders (pyarrow, pandas, Spark, Ray) skip names that begin with an underscore.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from methods.parts.errors import ConfigError
from pipeline.config import DataConfig
from pipeline.evaluate.features import Precision, extract
from pipeline.export.weights import build_export, read_export
from pipeline.machine import set_precision
from pipeline.run_folder import refuse_passing, write_json
from pipeline.storage.place import write_atomic

FACTS, BAD = "_embed.json", "_bad_images.jsonl"
SMALL, IMAGES_PER_TASK = 64, (1024, 256)  # for images of up to SMALL pixels, and for larger ones
GPU = "cuda"


@dataclass(frozen=True)
class EmbedReport:
    """The result of `embed`."""

    rows: int  # embeddings written
    bad: int  # images left out because they cannot be decoded
    seconds: float  # wall time
    images_per_s: float


@dataclass(frozen=True)
class _Job:
    """The arguments of every task. Model and dataset are references, so a cluster needs no shared model folder."""

    model: Any  # reference to (weights, spec)
    dataset: Any  # reference to the ImageDataset
    to: Path
    size: int  # side of a crop, pixels
    images_per_task: int
    batch_size: int
    precision: Precision
    device: str


def embed(
    model: Path,
    data: DataConfig,
    to: Path,
    *,
    batch_size: int = 256,
    bf16: bool = False,
    gpus: float | None = None,
    images_per_task: int | None = None,
) -> EmbedReport:
    """Embed every image of a source, held-out ones included, and write the rows in the order of their ids.

    Size and normalisation are those of the export; `data.mean` and `data.std` are not used.

    Args:
        model: an export, as `resolve_model` returns it.
        to: a new or empty folder, or the output of an earlier embed, which is replaced. On a cluster a shared path.
        batch_size: images in one forward pass.
        bf16: autocast; else float32, IEEE everywhere.
        gpus: GPUs of each actor, a fraction or a whole number; as many actors as fit are started. 0 = tasks on CPUs; None = 1 if Ray has
            GPUs now, else 0.
        images_per_task: images per task and per output file; None = 1024 small or 256 large ones.

    Raises:
        ConfigError: no such model, data or GPU, a folder with other files, or too many bad images.
    """
    import ray

    from pipeline.data.ray_data import joins_cluster, start_ray
    from pipeline.data.sources.base import open_source

    started = time.monotonic()
    weights, spec = read_export(model)
    to = to.expanduser().resolve()
    _check_target(to)
    dataset = open_source(data)
    if dataset.num_training(0.0) is None:
        raise ConfigError(f"data.path={data.path}: has no end, so its embeddings would have none; give a folder, Parquet or tars")
    start_ray()
    total_gpus = ray.cluster_resources().get("GPU", 0)
    if gpus and not total_gpus and not joins_cluster():  # a cluster may grow
        raise ConfigError(f"gpus={gpus:g}: there is no GPU here; leave it out")
    if gpus is None:
        gpus = 1.0 if total_gpus >= 1 else 0.0
    _clear(to)
    facts = {"model": str(model), "backbone": spec.backbone.name, "size": spec.size, "features": spec.features}
    facts |= {"data": data.path, "fingerprint": dataset.fingerprint, "images": len(dataset), "precision": "bf16" if bf16 else "float32"}
    write_json(to / FACTS, facts | {"complete": False})
    job = _Job(
        model=ray.put((weights, spec)),
        dataset=ray.put(dataset),
        to=to,
        size=spec.size,
        images_per_task=images_per_task or IMAGES_PER_TASK[spec.size > SMALL],
        batch_size=batch_size,
        precision="bf16" if bf16 else "float32",
        device=GPU if gpus else "cpu",
    )
    rows, bad = 0, []
    for part in _parts(job, len(dataset), gpus):
        rows += int(part["rows"])
        bad += json.loads(part["bad"])
        if len(bad) > data.max_bad_fraction * len(dataset):
            first = "; ".join(f"{b['path']} ({b['reason']})" for b in bad[:3])
            raise ConfigError(
                f"data.max_bad_fraction={data.max_bad_fraction}: {len(bad)} of {len(dataset)} images cannot be decoded, "
                f"such as {first}; remove them or raise the fraction"
            )
    bad.sort(key=lambda entry: entry["id"])
    write_atomic(to / BAD, "".join(json.dumps(entry) + "\n" for entry in bad).encode())
    seconds = time.monotonic() - started
    write_json(to / FACTS, facts | {"complete": True, "rows": rows, "bad": len(bad), "seconds": round(seconds, 3)})
    return EmbedReport(rows, len(bad), seconds, (rows + len(bad)) / seconds)


def _parts(job: _Job, images: int, gpus: float) -> Any:
    """Embed the images in parts, one row of Ray Data for each, and yield the report of each part."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that progress bars are off
    parts = -(-images // job.images_per_task)
    cut = functools.partial(_decode_part, job=job)
    dataset = ray.data.range(parts, override_num_blocks=parts).map_batches(cut, batch_size=1, num_cpus=1)
    if gpus:  # actors, because every task on a GPU would load the model
        dataset = dataset.map_batches(
            _Embedder,
            fn_constructor_args=(job,),
            batch_size=1,
            num_gpus=gpus,
            num_cpus=0,  # all CPUs are for the tasks that decode
            compute=ray.data.ActorPoolStrategy(min_size=1),
        )
    else:  # Ray Data fuses both steps into one task
        dataset = dataset.map_batches(functools.partial(_embed_part, job=job), batch_size=1, num_cpus=1)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset.iter_rows()


def _decode_part(batch: dict[str, np.ndarray], *, job: _Job) -> dict[str, list[Any]]:
    """Decode the images of one part. Return the bytes of the crops `(n, size, size, 3)` uint8 of good images, and their ids."""
    import ray

    from pipeline.data.decode import BadImage, decode, evaluation_crop

    torch.set_num_threads(1)  # one process per core
    part, dataset = int(batch["id"][0]), ray.get(job.dataset)
    good, crops, bad = [], [], []
    for row in dataset.read(np.arange(part * job.images_per_task, min(len(dataset), (part + 1) * job.images_per_task))):
        try:
            crops.append(evaluation_crop(decode(row.image), job.size))
            good.append((int(row.id), str(row.path), int(row.label)))
        except BadImage as error:
            bad.append({"id": int(row.id), "path": str(row.path), "reason": str(error)})
    pixels = np.stack(crops) if crops else np.empty((0, job.size, job.size, 3), np.uint8)
    return {"part": [part], "crops": [pixels.tobytes()], "good": [json.dumps(good)], "bad": [json.dumps(bad)]}


def _embed_part(batch: dict[str, np.ndarray], *, job: _Job) -> dict[str, list[Any]]:
    """Embed the crops of one part and write its file."""
    backbone, spec = _load(job)
    good = [tuple(row) for row in json.loads(batch["good"][0])]
    pixels = np.frombuffer(batch["crops"][0], np.uint8).reshape(len(good), spec.size, spec.size, 3)
    features = extract(
        backbone,
        torch.from_numpy(pixels.copy()),
        mean=spec.mean,
        std=spec.std,
        device=job.device,
        precision=job.precision,
        batch_size=job.batch_size,
    )
    _write(job.to / f"part-{int(batch['part'][0]):05d}.parquet", good, features.numpy(), spec.features)
    return {"rows": [len(good)], "bad": [batch["bad"][0]]}


class _Embedder:
    """Actor on a GPU that keeps the model."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        _load(job)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        return _embed_part(batch, job=self.job)


_loaded: dict[str, tuple[Any, Any]] = {}  # backbone and spec that this process has loaded


def _load(job: _Job) -> tuple[Any, Any]:
    import ray

    key = f"{job.model.hex()} {job.device}"  # not the reference, which would keep the weights in the object store
    if key not in _loaded:
        set_precision(torch.device(job.device))
        weights, spec = ray.get(job.model)
        _loaded.clear()
        _loaded[key] = build_export(weights, spec).to(job.device), spec
    return _loaded[key]


def _write(path: Path, rows: list[tuple[int, str, int]], features: np.ndarray, width: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids, paths, labels = zip(*rows, strict=True) if rows else ((), (), ())
    flat = pa.array(np.ascontiguousarray(features, np.float32).ravel(), pa.float32())
    columns = {
        "id": pa.array(ids, pa.int64()),
        "path": pa.array(paths, pa.string()),
        "label": pa.array(labels, pa.int64()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.table(columns), temporary)
    os.replace(temporary, path)  # a repeated task replaces its file


def _check_target(to: Path) -> None:
    refuse_passing(to, "to", "--to /shared/features")
    if to.exists() and not to.is_dir():
        raise ConfigError(f"to={to}: is a file; give a folder")
    if to.is_dir() and any(to.iterdir()) and not (to / FACTS).is_file():
        raise ConfigError(f"to={to}: holds other files; give a new folder (only the output of an earlier embed is replaced)")


def _clear(to: Path) -> None:
    """Make the folder and remove the files of an earlier embed."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        for old in (*to.glob("part-*.parquet"), *to.glob(".part-*.tmp"), to / BAD):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"to={to}: cannot be written ({error.strerror}); give another folder") from None
