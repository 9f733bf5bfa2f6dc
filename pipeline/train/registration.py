"""Registration of a complete run, and late transfer to a tracking server that did not answer."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from methods.parts.contract import find
from methods.parts.errors import ConfigError
from pipeline.config import RunConfig, from_yaml
from pipeline.export import registry
from pipeline.run_folder import RunFolder, command, find_run
from pipeline.tracking import run_tracker
from pipeline.tracking.run_tracker import Tracker, default_uri


def publish(folder: RunFolder, run_id: str | None) -> registry.Registered:
    """Register a finished run's export, with alias `best` if its held-out kNN is the highest of its name.

    Raises:
        ConfigError: the registry does not answer, or rejects the name.
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


def register(folder: RunFolder, tracker: Tracker, console: Console) -> registry.Registered | None:
    """Register a finished run's backbone, if `track.register`. A registry that does not answer does not fail the run."""
    if not from_yaml(folder.config_text()).track.register:
        return None
    console.print("registering ...", highlight=False)
    try:
        return publish(folder, tracker.run_id(timeout=60.0))
    except ConfigError as error:
        later = command("sync", folder.name, runs_dir=folder.path.parent)
        console.print(f"not registered: {error}; later: {later}", highlight=False, soft_wrap=True)
        return None


def sync(reference: str, *, runs_dir: Path) -> tuple[int, registry.Registered | None]:
    """Send the metrics of a run that MLflow lacks, and register its backbone if it is not registered."""
    folder = find_run(reference, runs_dir)
    sent = run_tracker.sync(folder.path)
    facts = folder.state()
    due = facts.get("status") == "finished" and "model" not in facts and from_yaml(folder.config_text()).track.register
    return sent, publish(folder, json.loads((folder.path / "tracking.json").read_text())["run_id"]) if due else None


def tracking_uri(config: RunConfig, folder: RunFolder) -> str:
    """Return the tracking server of a run, which is its registry too."""
    return config.track.uri or default_uri(folder.path.parent)
