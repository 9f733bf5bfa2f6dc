"""What a GPU makes of five recipes: images/s of the loader and of the step, waits for data, launches, memory, bf16 against float32.

`make gpu` runs it after `tests/gpu`. It makes its own JPEGs, prints a table and writes it with the hardware to a JSON file.
Without a GPU it says so and ends; `--device cpu --tiny` runs the same code there in a minute, which checks it and measures
nothing of use.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from methods.parts.views import ViewsConfig
from pipeline.build import prepare
from pipeline.config import RunConfig, override
from pipeline.data.augment import augment_views
from pipeline.data.crops import draw_views
from pipeline.data.loader import Batch, TrainLoader
from pipeline.data.ray_data import start_ray
from pipeline.machine import available_cores, memory_advice
from pipeline.recipes import load_recipe
from pipeline.run_folder import create_run
from pipeline.train.loop import Trainer
from pipeline.train.progress import NullReporter
from pipeline.train.work import build_trainer

RECIPES = {  # images of one GPU; the recipe of the same method that stands in with --tiny
    "swav-imagenet": (64, "swav-small"),
    "dino-vits16": (64, "dino-small"),
    "moco-v2": (128, "moco-v2-small"),
    "mae-vitb16": (256, "mae-small"),
    "simclr": (128, "simclr-small"),
}
PRECISIONS = ("bf16", "float32")
SIDES, DISTINCT = (500, 375), 128  # of a JPEG, pixels; how many are made: the other names are links to them
COLUMNS = {
    "recipe": "recipe",
    "images": "images",
    "loader": "loader, images/s",
    "step": "step, images/s",
    "fed": "both, images/s",
    "wait_ms": "waits, ms a step",
    "launches": "launches",
    "colour_launches": "of colour",
    "memory_gib": "peak, GiB",
    "float32_step": "float32, images/s",
    "bf16_gain": "bf16 / float32",
    "float32_memory_gib": "float32 peak, GiB",
}


# ---------------------------------------------------------------------------- what is measured


def make_images(folder: Path, count: int, sides: tuple[int, int]) -> None:
    """Write JPEGs of clouds with some noise: about 110 KB each at 500 x 375, as in ImageNet."""
    folder.mkdir(parents=True)
    width, height = sides
    for i in range(min(count, DISTINCT)):
        rng = np.random.default_rng(i)
        clouds = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(sides, Image.Resampling.BICUBIC)
        pixels = np.asarray(clouds, np.float32) + rng.normal(0, 12, (height, width, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06d}.jpg", quality=90)
    for i in range(DISTINCT, count):
        os.link(folder / f"{i % DISTINCT:06d}.jpg", folder / f"{i:06d}.jpg")


def configured(recipe: str, images: int, folder: Path, num_shards: int = 8) -> RunConfig:
    """The recipe as one of its GPUs sees it: its network and views, `images` of its global batch."""
    changes: dict[str, Any] = {"data.path": str(folder), "data.held_out": 0.0, "data.num_shards": num_shards, "train.epochs": 10_000}
    changes |= {"train.global_batch_size": images, "train.accumulation_steps": 1, "train.workers": 0}
    return override(load_recipe(recipe), changes)


def build(config: RunConfig, folder: Path, device: torch.device) -> tuple[Trainer, TrainLoader]:
    """A run's trainer on a device, without anything that shows or reports, and its loader."""
    ready, screen = prepare(config), NullReporter(config.train.global_batch_size)
    trainer = build_trainer(
        ready, create_run(folder, None, "gpu"), None, reporter=screen, report=lambda step, metrics: None, stop=lambda: False, device=device
    )
    trainer.method.train()
    return trainer, ready.loader


def random_batch(views: ViewsConfig, images: int, device: torch.device, step: int = 0, of: int = 2**31) -> Batch:
    """A batch of noise with real tables, on the device; its ids go round `of` images."""
    ids, sizes = (step * images + np.arange(images)) % of, np.full(images, 400)
    noise = torch.Generator().manual_seed(step)
    shapes = {name: (images, group.count, group.size, group.size, 3) for name, group in views.items() if group.count}
    crops = {name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise).to(device) for name, shape in shapes.items()}
    tables = draw_views(0, step, ids, sizes, sizes, views)
    there = torch.from_numpy(ids).to(device)
    labels = torch.full_like(there, -1)
    return Batch(crops=crops, tables=tables, ids=there, labels=labels, epoch=0, step=step, bad=[], host_ids=torch.from_numpy(ids))


# ---------------------------------------------------------------------------- measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_rate(trainer: Trainer, batch: Batch, seconds: float) -> float:
    """Images/s of whole steps, colour and optimizer included, over one batch that is on the device: no data to wait for."""

    def run(count: int) -> float:
        synchronize(trainer.device)
        begin = time.perf_counter()
        for _ in range(count):
            trainer.step(dataclasses.replace(batch, step=trainer.position.step))
        synchronize(trainer.device)
        return time.perf_counter() - begin

    run(2)  # cuDNN times its algorithms
    count = max(1, int(seconds / 3 / run(1)))
    return count * len(batch.ids) / min(run(count) for _ in range(3))


def loader_rate(loader: TrainLoader, device: torch.device, seconds: float) -> float:
    """Images/s of the batches alone; those that were ready before the clock started do not count."""
    with contextlib.closing(loader.batches(device=device)) as found:
        for _ in range(4):
            next(found)
        begin, images = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            images += len(next(found).ids)
        synchronize(device)
        return images / (time.perf_counter() - begin)


def fed(trainer: Trainer, loader: TrainLoader, seconds: float) -> tuple[float, float]:
    """Images/s of steps that the loader feeds, and the time that a step waits for its batch, ms."""
    trainer.position.step, waits, images = 0, [], 0
    with contextlib.closing(loader.batches(device=trainer.device)) as found:
        for _ in range(4):
            trainer.step(next(found))
        synchronize(trainer.device)
        begin = time.perf_counter()
        while (asked := time.perf_counter()) - begin < seconds:
            batch = next(found)
            waits.append(time.perf_counter() - asked)
            images += len(batch.ids)
            trainer.step(batch)
            # the thread that launches runs ahead of the device: without this, a wait may cost nothing
            synchronize(trainer.device)
        return images / (time.perf_counter() - begin), 1000 * float(np.mean(waits))


def launches(call: Callable[[], object], device: torch.device) -> int:
    """Kernels that a call launches; on a CPU, the operators that it calls from outside of torch."""
    cuda = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        call()
        synchronize(device)
    if cuda:
        return sum(event.count for event in found.key_averages() if "LaunchKernel" in event.key)
    return sum(event.name.startswith("aten::") and event.cpu_parent is None for event in found.events())


def peak_gib(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None


def measure(config: RunConfig, folder: Path, device: torch.device, seconds: float) -> dict[str, Any]:
    """The row of one recipe; each of four measurements takes `seconds`.

    Raises:
        torch.OutOfMemoryError: the batch is too large for this device.
    """
    images = config.train.global_batch_size
    row: dict[str, Any] = {"images": images, "views": " + ".join(g.describe() for g in config.views.values() if g.count)}
    batch = random_batch(config.views, images, device)
    for precision in reversed(PRECISIONS):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        trainer, loader = build(override(config, {"train.precision": precision}), folder / precision, device)
        rate, memory = step_rate(trainer, batch, seconds), peak_gib(device)
        row |= {"step": rate, "memory_gib": memory} if precision == "bf16" else {"float32_step": rate, "float32_memory_gib": memory}
    data, last = config.data, trainer.position.step
    row["bf16_gain"] = row["step"] / row["float32_step"]
    row["launches"] = launches(lambda: trainer.step(dataclasses.replace(batch, step=last)), device)
    row["colour_launches"] = launches(lambda: augment_views(batch, config.views, data.mean, data.std, device), device)
    start_ray()
    row["loader"] = loader_rate(loader, device, seconds)
    row["fed"], row["wait_ms"] = fed(trainer, loader, seconds)
    return row


# ---------------------------------------------------------------------------- telling


def hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    return {"device": name, "cores": available_cores(), "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit}


def written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown; a recipe that could not be measured has its reason instead."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for row in rows:
        told = [row["recipe"], row["error"]] if "error" in row else [written(row[key]) for key in COLUMNS]
        lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES), choices=list(RECIPES), help="which recipes; default: all five")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the small recipes on small pictures: only to run the code")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each of four measurements of a recipe")
    parser.add_argument("--minutes", type=float, default=5.0, help="no recipe begins later than this")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="where the figures go")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU that torch can use: nothing to measure. `manyviews doctor` says what it sees; --device cpu --tiny checks the code")
        return
    device, begin, rows = torch.device(options.device), time.monotonic(), []
    about = hardware(device)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        make_images(folder, 64 if options.tiny else 4096, (64, 48) if options.tiny else SIDES)
        for recipe in options.recipe:
            row: dict[str, Any] = {"recipe": recipe}
            rows.append(row)
            if time.monotonic() - begin > 60 * options.minutes:
                row["error"] = f"not begun: --minutes {options.minutes:g} were over"
                continue
            images, small = RECIPES[recipe]
            config = configured(small, 16, folder, num_shards=2) if options.tiny else configured(recipe, images, folder)
            try:
                row |= measure(config, Path(scratch) / recipe, device, options.seconds)
            except torch.OutOfMemoryError as error:
                row["error"] = memory_advice(error, config)
            print(f"{recipe}: {row.get('error') or 'done'} after {time.monotonic() - begin:.0f} s", flush=True)
    print("\n" + table(rows))
    options.json.write_text(json.dumps(about | {"seconds": round(time.monotonic() - begin), "rows": rows}, indent=2) + "\n")
    print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
