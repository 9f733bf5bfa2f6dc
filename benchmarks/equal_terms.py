"""What ours and lightly's parts learn under equal terms: the same crops, backbone, data, optimizer and steps, one thread.

A bare loop in one process, without Ray: our view engine cuts and finishes every batch, the trainer's own step follows.
lightly's parts are a method like any other to it. Then kNN (k 20) on the test split with the training images as bank,
beside raw pixels and the untrained backbone. CPU seconds are those of the process: cutting and training, nothing else.

NNCLR with the paper's loss learns less than lightly's parts, because their NT-Xent has the predictions as anchors too, and repels them from
each other. With `method.column_term` and `method.own_kind_negatives`, as in `nnclr-cifar10-small`, our loss and its gradients are twice
those of NT-Xent, which AdamW does not notice, and ours is not behind: support set, lookup and heads are not the cause.

    python benchmarks/equal_terms.py simclr-cifar10-small --data.path=cifar10/train/part-00000.parquet --evaluate.path=cifar10/test
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly_parts import lightly_parts
from torch import Tensor, nn

from methods.parts.backbones import build_backbone
from methods.parts.contract import Masks, Method, MethodConfig, ParamGroup, Progress, RunFacts, StepOutput, find
from methods.parts.groups import param_groups_weight_decay
from methods.parts.views import Views
from pipeline.build import build_method
from pipeline.cli.overrides import configured
from pipeline.config import RunConfig, override
from pipeline.data.crop_task import decode_all
from pipeline.data.crops import cut_crops, draw_views
from pipeline.data.decode import evaluation_crop
from pipeline.data.loader import Batch
from pipeline.data.sources.base import open_source
from pipeline.evaluate.features import calibrate_batchnorm, extract, raw_pixels
from pipeline.evaluate.knn import knn_accuracy
from pipeline.machine import choose_device, keep_freed_memory
from pipeline.resolve import resolve
from pipeline.run_folder import RunFolder
from pipeline.train.loop import Trainer
from pipeline.train.optim import build_optimizer
from pipeline.train.progress import NullReporter


class Lightly(Method):
    """lightly's parts as a method; vectors neither decay nor adapt, as in ours."""

    def __init__(self, name: str, config: MethodConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        parts = lightly_parts(name, config, backbone, torch.device("cpu"), facts.total_steps)
        if parts is None:
            raise SystemExit(f"{name}: lightly has no parts that fit these settings")
        self.net, self.loss, self.before = parts
        self.backbone = self.net["teacher"]["backbone"] if "teacher" in self.net else backbone  # type: ignore[index,operator]
        self.frozen_steps = round(getattr(config, "freeze_prototypes_epochs", 0.0) * facts.steps_per_epoch)

    def before_step(self, progress: Progress) -> None:
        self.before()

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        return StepOutput(loss=self.loss(views))

    def param_groups(self) -> list[ParamGroup]:
        waiting = [p for n, p in self.net.named_parameters() if "last_layer" in n and p.requires_grad]
        rest = nn.ParameterList(p for n, p in self.net.named_parameters() if "last_layer" not in n)
        last = [ParamGroup(params=waiting, name="prototypes", frozen_steps=self.frozen_steps)] if waiting else []
        return [*param_groups_weight_decay(rest), *last]

    def evaluation_backbone(self) -> nn.Module:
        return self.backbone


@dataclasses.dataclass
class Images:
    """Decoded images of one source, at their own sizes and as the evaluation sees them."""

    pixels: list[np.ndarray]
    crops: Tensor
    labels: Tensor

    @classmethod
    def load(cls, config: RunConfig, path: str) -> Images:
        dataset = open_source(dataclasses.replace(config.data, path=path))
        rows = list(dataset.read(np.arange(len(dataset))))
        pixels, reasons = decode_all(rows)
        assert not any(reasons), "all images must be readable here"
        size = config.evaluation_size
        crops = torch.from_numpy(np.stack([evaluation_crop(image, size) for image in pixels]))
        return cls(pixels, crops, torch.tensor([row.label for row in rows]))


def batches(images: Images, config: RunConfig, facts: RunFacts) -> Iterator[Batch]:
    """Global batches of permuted passes, crops drawn by the engine."""
    size = facts.global_batch_size
    for step in range(facts.total_steps):
        epoch, place = divmod(step, len(images.pixels) // size)
        order = np.random.default_rng((config.train.seed, epoch)).permutation(len(images.pixels))
        ids = order[place * size : (place + 1) * size]
        pictures = [images.pixels[i] for i in ids]
        heights, widths = (np.array([picture.shape[axis] for picture in pictures]) for axis in (0, 1))
        tables = draw_views(config.train.seed, epoch, ids, heights, widths, config.views)
        crops = {name: torch.from_numpy(cut) for name, cut in cut_crops(pictures, tables, config.views).items()}
        yield Batch(crops=crops, tables=tables, ids=torch.from_numpy(ids), labels=images.labels[ids], epoch=epoch, step=step, bad=[])


class Trained:
    """One arm: the method after its steps, with what it cost."""

    def __init__(self, config: RunConfig, images: Images, lightly: bool) -> None:
        resolved = resolve(config, len(images.pixels))
        entry = find(config.method)
        if lightly:
            torch.manual_seed(config.train.seed)
            backbone = build_backbone(config.backbone).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            method: Method = Lightly(entry.name, config.method, backbone, resolved.facts)
        else:
            method = build_method(config, resolved.facts)
        device, precision = choose_device(config)
        self.losses: list[float] = []
        self.meters: dict[str, float] = {}  # of the last report
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                config=config,
                resolved=resolved,
                method=method,
                optimizer=build_optimizer(config.optim, method.param_groups()),
                folder=RunFolder(Path(folder)),
                device=device,
                precision=precision,
                reporter=NullReporter(config.train.global_batch_size),
                report=self.report,
                images=len(images.pixels),
                saved_step=resolved.facts.total_steps,  # writes no checkpoint
            )
            began, wall = time.process_time(), time.monotonic()
            trainer.run(batches(images, config, resolved.facts))
            self.cpu, self.wall = time.process_time() - began, time.monotonic() - wall
        self.backbone = method.evaluation_backbone()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.losses.append(metrics.get("loss", 0.0))
        self.meters = dict(metrics)


def score(config: RunConfig, network: nn.Module, bank: Images, asked: Images, calibrated: bool = False) -> float:
    """kNN of a network's features, in percent."""
    common: dict[str, Any] = {"mean": config.data.mean, "std": config.data.std}
    if calibrated:
        network = calibrate_batchnorm(network, bank.crops, **common)
    features = [extract(network, part.crops, **common) for part in (bank, asked)]
    return 100 * knn_accuracy(features[0], bank.labels, features[1], asked.labels, 20, 0.07)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=["ours", "lightly"], default=["ours", "lightly"])
    options, settings = parser.parse_known_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    config = override(configured(options.recipe, settings), {"train.checkpoint_every": 10**9, "train.log_every": 50})
    assert config.evaluate.path, "--evaluate.path: give the test split"
    bank, asked = Images.load(config, config.data.path), Images.load(config, config.evaluate.path)
    pixels = [raw_pixels(part.crops) for part in (bank, asked)]
    raw = 100 * knn_accuracy(pixels[0], bank.labels, pixels[1], asked.labels, 20, metric="l2")
    print(f"{options.recipe}: {len(bank.labels)} images vote, {len(asked.labels)} asked; raw pixels {raw:.1f} %", flush=True)
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in options.seeds:
        seeded = override(config, {"train.seed": seed})
        start = build_method(seeded, resolve(seeded, len(bank.pixels)).facts).evaluation_backbone()
        untrained = [score(seeded, start, bank, asked, calibrated) for calibrated in (False, True)]
        for arm in options.arms:
            done = Trained(seeded, bank, arm == "lightly")
            trained = score(seeded, done.backbone, bank, asked)
            rows.setdefault(arm, []).append((trained, trained - max(untrained)))
            params = sum(p.numel() for p in done.backbone.parameters()) / 1e6
            print(
                f"seed {seed}  {arm:8} {trained:5.1f} %  +{trained - max(untrained):.1f} over untrained "
                f"({untrained[0]:.1f} raw, {untrained[1]:.1f} calibrated)  {len(done.losses) and done.losses[-1]:.3f} loss  "
                f"{done.cpu:.0f} CPU s  {done.wall:.0f} s  {params:.2f} M parameters",
                flush=True,
            )
    for arm, values in rows.items():
        scores, gains = ([value[i] for value in values] for i in (0, 1))
        print(f"{arm:8} {statistics.mean(scores):.1f} % ({min(scores):.1f} to {max(scores):.1f}), gain {statistics.mean(gains):.1f}")


if __name__ == "__main__":
    main()
