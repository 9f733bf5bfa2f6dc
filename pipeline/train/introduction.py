"""What a run is about to do, in words."""

from __future__ import annotations

from methods.parts.contract import find
from pipeline.machine import choose_device
from pipeline.runs import RunFolder
from pipeline.train.prepare import Prepared


def introduction(ready: Prepared, folder: RunFolder, start: int) -> list[str]:
    """What is about to happen from step `start` on, in a few lines with rich's markup."""
    device, precision = choose_device(ready.config)
    config, facts = ready.config, ready.resolved.facts
    manifest = ready.manifest
    labels = f"{len(manifest.class_names)} classes" if manifest.class_names else "no labels"
    size = sum(p.numel() for p in ready.method.evaluation_backbone().parameters()) / 1e6
    lines: list[str] = []
    say = lambda key, text: lines.append(f"[bold]{key:9}[/bold] {text}")  # noqa: E731
    say("run", str(folder.path))
    training = "" if facts.num_images is None else f"{facts.num_images:,} training images of "
    say("data", f"{config.data.path}: {training}{manifest.describe()}, {labels}")
    for path, reason in manifest.skipped[:3]:
        say("", f"skipped {path}: {reason}")
    if len(manifest.skipped) > 3:
        say("", f"... and {len(manifest.skipped) - 3} more files skipped; `manyviews doctor --data.path` lists them")
    for name, group in config.views.items():
        if group.count:
            say("views", f"{name}: {group.describe()}")
    kind = str(precision).removeprefix("torch.")
    where = f"{config.train.workers} workers" if config.train.worker_range[1] else f"{kind} on {device.type}"
    say("model", f"{find(config.method).name}, {config.backbone.name} ({size:.1f} M parameters), {where}")
    epochs = f"{facts.total_steps / facts.steps_per_epoch:.3g} epochs"
    if facts.num_images is not None:
        epochs = f"{facts.total_steps * facts.global_batch_size / facts.num_images:.3g} passes over the data"
    begin = f" from step {start}" if start else ""
    say("plan", f"{facts.total_steps:,} steps of {facts.global_batch_size} images{begin} ({epochs})")
    for sentence in ready.method.advice(facts):
        say("[yellow]advice[/yellow]   ", sentence)
    return lines
