"""MSN beside MAE under equal compute: what a few images per class are enough for, after the same CPU seconds of training.

Each method trains the same ViT from its own recipe, on the same images, until `--seconds` of CPU time are spent; its schedule
is made for as many steps as that will be, by the time of two trials. Then `pipeline/evaluate/probes.py`: logistic
regression on a few images of each class, several draws, asked on the test split; and the kNN. Both networks see the images
at the same size, and positions and first weights are those of each paper.

    python benchmarks/lowshot.py --data.path=cifar10/train/part-00000.parquet --evaluate.path=cifar10/test --seconds 600
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from equal_terms import Images, Trained, score
from torch import nn

from pipeline.build import build_method
from pipeline.cli.overrides import configured
from pipeline.config import RunConfig, override
from pipeline.evaluate.features import calibrate_batchnorm, extract
from pipeline.evaluate.probes import draw, lowshot_accuracy
from pipeline.resolve import resolve

TRIAL = 20  # steps of the shorter of two trials, whose times set the length of the schedule


def steps_for(seconds: float, config: RunConfig, images: Images) -> int:
    """Steps that take `seconds` of CPU time: from two trials, the longer a twentieth of it, so that what happens once does not count."""

    def cpu(steps: int) -> float:
        return Trained(override(config, {"train.steps": steps}), images, lightly=False).cpu

    short = cpu(TRIAL)
    steps = max(2 * TRIAL, round(TRIAL * seconds / short / 20))
    long = cpu(steps)
    each = (long - short) / (steps - TRIAL)
    return max(1, round((seconds - short) / each) + TRIAL) if each > 0 else round(seconds / long * steps)


def few_images(config: RunConfig, network: nn.Module, bank: Images, asked: Images, count: int, draws: int) -> list[float]:
    """Top-1 in percent from `count` images of each class, for each draw."""
    common: dict[str, Any] = {"mean": config.data.mean, "std": config.data.std}
    x, queries = (extract(network, part.crops, **common).numpy() for part in (bank, asked))
    labels, truth, ids = bank.labels.numpy(), asked.labels.numpy(), np.arange(len(bank.labels))
    found = []
    for seed in range(draws):
        own = draw(ids, labels, count, seed).flatten()
        found.append(100 * lowshot_accuracy(x[own], labels[own], queries, truth))
    return found


def words(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["msn-cifar10-small", "mae-cifar10-small"])
    parser.add_argument("--seconds", type=float, default=600, help="CPU seconds of training for each method and seed (default: 600)")
    parser.add_argument("--images", type=int, default=5, help="of each class (default: 5)")
    parser.add_argument("--draws", type=int, default=10, help="of the images (default: 10)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options, settings = parser.parse_known_args()
    torch.set_num_threads(1)
    quiet = {"train.checkpoint_every": 10**9, "train.log_every": 10**9}
    configs = {name: override(configured(name, settings), quiet) for name in options.recipes}
    sizes = {config.evaluation_size for config in configs.values()}
    assert len(sizes) == 1, f"--recipes: evaluated at {sizes} pixels; choose recipes of one size"
    first = next(iter(configs.values()))
    assert first.evaluate.path, "--evaluate.path: give the test split"
    bank, asked = Images.load(first, first.data.path), Images.load(first, first.evaluate.path)
    print(f"{options.images} images per class, {options.draws} draws; {len(asked.labels)} images asked; mean ± deviation", flush=True)
    results: dict[str, list[float]] = {name: [] for name in configs}
    for name, config in configs.items():
        steps = steps_for(options.seconds, config, bank)
        for seed in options.seeds:
            seeded = override(config, {"train.seed": seed, "train.steps": steps})
            start = build_method(seeded, resolve(seeded, len(bank.pixels)).facts).evaluation_backbone()
            start = calibrate_batchnorm(start, bank.crops, mean=config.data.mean, std=config.data.std)
            untrained = few_images(seeded, start, bank, asked, options.images, options.draws)
            began = time.monotonic()
            done = Trained(seeded, bank, lightly=False)
            found = few_images(seeded, done.backbone, bank, asked, options.images, options.draws)
            results[name] += found
            knn = score(seeded, done.backbone, bank, asked)
            print(
                f"{name:20} seed {seed}  {words(found)}  untrained {words(untrained)}  kNN {knn:.1f} %  "
                f"{steps} steps  {done.cpu:.0f} CPU s  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    for name, found in results.items():
        print(f"{name:20} {words(found)} over all seeds and draws")


if __name__ == "__main__":
    main()
