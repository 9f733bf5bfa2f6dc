"""What follows the last step: final evaluation, pictures, export and registration, now or later."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from methods.parts.contract import find
from methods.parts.errors import ConfigError
from pipeline import registry, tracking
from pipeline.config import RunConfig, from_yaml
from pipeline.evaluate.protocols import Scores, final_scores
from pipeline.gallery import run_figures
from pipeline.runs import RunFolder, find_run, write_json
from pipeline.tracking import Tracker, default_uri
from pipeline.train.loop import Trainer
from pipeline.train.prepare import Prepared, untrained


def finish(
    ready: Prepared, folder: RunFolder, trainer: Trainer, tracker: Tracker, console: Console, device: torch.device
) -> tuple[Scores, registry.Registered | None]:
    """Final evaluation, pictures, export and registration of a complete run."""
    config = ready.config
    console.print("evaluating ...", highlight=False)
    backbone = trainer.method.evaluation_backbone()
    scores = final_scores(config, ready.manifest, backbone, untrained(config, ready.resolved), device)
    write_json(folder.path / "evaluation.json", scores.to_dict())
    for picture in run_figures(ready, folder, backbone, scores, device):
        tracker.artifact(picture)
    tracker.log(trainer.position.step, scores.metrics())
    facts = {
        "method": find(config.method).name,
        "recipe": config.recipe,
        "run": folder.name,
        "data_fingerprint": ready.manifest.fingerprint,
        "steps": trainer.position.step,
        "knn_held_out": trainer.last_knn,
    } | scores.tags()
    registry.export(
        backbone, config.backbone, folder.model, size=config.evaluation_size, mean=config.data.mean, std=config.data.std, facts=facts
    )
    model = None
    if config.track.register:
        console.print("registering ...", highlight=False)
        try:
            model = publish(folder, tracker.run_id(timeout=60.0))
        except ConfigError as error:  # the weights are safe; a server that is down must not fail the run
            console.print(f"not registered: {error}; later: manyviews sync {folder.name}", highlight=False, soft_wrap=True)
    return scores, model


def publish(folder: RunFolder, run_id: str | None) -> registry.Registered:
    """Register a finished run's export; alias `best` if its held-out kNN is the highest of its name.

    Raises:
        ConfigError: the registry does not answer, or does not take the name.
    """
    config = from_yaml(folder.config_text())
    _, spec = registry.read_export(folder.model)
    model = registry.register(
        folder.model,
        name=config.track.model_name or config.recipe or find(config.method).name,
        uri=tracking_uri(config, folder),
        run_id=run_id,
        tags={key: str(value) for key, value in spec.facts.items() if value is not None},
        held_out_knn=spec.facts.get("knn_held_out"),
        experiment=config.track.experiment,
    )
    folder.update(model=model.uri, model_version=model.version)
    return model


def sync(reference: str, *, runs_dir: Path) -> tuple[int, registry.Registered | None]:
    """Send a run's points that MLflow does not have, and register its backbone if that is still due."""
    folder = find_run(reference, runs_dir)
    sent = tracking.sync(folder.path)
    facts = folder.state()
    due = facts.get("status") == "finished" and "model" not in facts and from_yaml(folder.config_text()).track.register
    return sent, publish(folder, json.loads((folder.path / "tracking.json").read_text())["run_id"]) if due else None


def tracking_uri(config: RunConfig, folder: RunFolder) -> str:
    """The tracking server of a run, and its registry."""
    return config.track.uri or default_uri(folder.path.parent)
