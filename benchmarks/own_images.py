"""Does DINOv2 collapse on a few own images? `dinov2-own-images` and the released settings, both cut down to a tiny ViT.

One process and one thread, without Ray, as in `equal_terms.py`, and as few steps as asked for. A fifth of the images, drawn with
seed 0, is held out and asked by kNN (k 20); the others train and vote. Meters are those of the last report; a red one is starred.

    python benchmarks/own_images.py hands/ --seeds 0 1 2
    python benchmarks/own_images.py cifar10/train/part-00000.parquet --images 2000 --size 32 --arms own released
    python benchmarks/own_images.py garments/ --method.teacher-targets=centering
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from equal_terms import Images, Trained, score
from PIL import Image

from methods.dinov2 import DINOv2Config
from pipeline.build import build_method
from pipeline.cli.overrides import configured
from pipeline.config import RunConfig, override
from pipeline.evaluate.features import raw_pixels
from pipeline.evaluate.knn import knn_accuracy
from pipeline.machine import keep_freed_memory
from pipeline.resolve import resolve

SIDE = 160  # of the images that crops are cut from, at least
METERS = ("prototypes_used", "teacher_entropy", "teacher_mean_entropy", "patch_teacher_entropy", "embedding_std", "patch_norm_ratio")
RED = {
    "prototypes_used": lambda x: x < 0.1,  # few prototypes
    "teacher_mean_entropy": lambda x: x < 0.5,  # one prototype
    "teacher_entropy": lambda x: x > 0.99,  # uniform targets
    "patch_teacher_entropy": lambda x: x < 0.05 or x > 0.99,
    "embedding_std": lambda x: x < 0.1,
    "patch_norm_ratio": lambda x: x > 5,
}


def tiny(arm: str, options: argparse.Namespace, settings: list[str]) -> RunConfig:
    """The arm's recipe with a ViT of 0.5 M parameters and patches of 8 pixels; all lengths shrink with the run."""
    recipe = {"own": "dinov2-own-images", "released": "dinov2-vitl16"}[arm]
    size, steps = options.size, options.steps
    small: dict[str, Any] = {
        "backbone.name": "vit_tiny_patch16_224", "backbone.width": 0.5, "backbone.depth": 4, "backbone.patch_size": 8,
        "backbone.image_size": size, "method.projector_hidden": 256, "method.projection_dim": 64,
        "views.global.size": size, "views.global_solarized.size": size, "views.local.size": size // 2, "views.local.count": 2,
        "train.steps": steps, "train.steps_per_epoch": max(1, steps // (20 if arm == "own" else 100)), "train.global_batch_size": 64,
        "train.precision": "float32", "train.checkpoint_every": 10**9, "train.log_every": max(1, steps // 3), "data.num_shards": 1,
    }  # fmt: skip
    for name in ("global", "global_solarized", "local"):  # what is known to suit such small pictures
        scale = "0.2 0.5" if name == "local" else "0.3 1.0"
        small |= {f"views.{name}.scale": scale, f"views.{name}.blur": 0, f"views.{name}.solarize": 0}
    lines = [word for key, value in small.items() for word in (f"--{key.replace('_', '-')}", *str(value).split())]
    config = configured(recipe, [f"--data.path={options.path}", *lines, *settings])
    # so short a run needs a higher rate; the released one is for batches of 1024
    return override(config, {"optim.base_lr": 4e-3}) if arm == "own" else config


def cut(images: Images, ids: np.ndarray) -> Images:
    pixels = []
    for i in ids:
        h, w = images.pixels[i].shape[:2]
        f = min(1.0, SIDE / min(h, w))
        picture = Image.fromarray(images.pixels[i])
        pixels.append(np.asarray(picture if f == 1 else picture.resize((round(w * f), round(h * f)), Image.Resampling.BICUBIC)))
    return Images(pixels, images.crops[ids], images.labels[ids])


def shown(meters: Mapping[str, float]) -> str:
    known = [name for name in METERS if name in meters]
    return "  ".join(f"{name} {meters[name]:.3f}{'*' if name in RED and RED[name](meters[name]) else ''}" for name in known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--images", type=int, help="so many of them, drawn with seed 0")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=["own", "released"], default=["own"])
    options, settings = parser.parse_known_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    data = Images.load(tiny("own", options, settings), options.path)
    ids = np.random.default_rng(0).permutation(len(data.pixels))[: options.images]
    asked, bank = cut(data, ids[: len(ids) // 5]), cut(data, ids[len(ids) // 5 :])
    labelled = len(set(data.labels.tolist())) > 1
    if labelled:
        pixels = [raw_pixels(part.crops) for part in (bank, asked)]
        raw = 100 * knn_accuracy(pixels[0], bank.labels, pixels[1], asked.labels, 20, metric="l2")
        print(f"{len(bank.labels)} images vote, {len(asked.labels)} asked; raw pixels {raw:.1f} %", flush=True)
    for arm in options.arms:
        for seed in options.seeds:
            config = override(tiny(arm, options, settings), {"train.seed": seed})
            facts = resolve(config, len(bank.pixels)).facts
            config = dataclasses.replace(config, method=config.method.settled(facts))
            assert isinstance(config.method, DINOv2Config)
            line = f"{arm:8} seed {seed}  K {config.method.num_prototypes}  "
            start = build_method(config, facts).evaluation_backbone()
            done = Trained(config, bank, lightly=False)
            if labelled:
                before, after = (score(config, network, bank, asked) for network in (start, done.backbone))
                line += f"kNN {after:.1f} %, {after - before:+.1f} over untrained ({before:.1f})  "
            print(f"{line}{shown(done.meters)}  loss {done.losses[-1]:.3f}  {done.cpu:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
