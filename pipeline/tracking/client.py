"""Clients of MLflow: one address for tracking and registry, short timeouts, no log lines on the console."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from methods.parts.errors import ConfigError


def default_uri(runs_dir: Path) -> str:
    """Return the tracking URI of the SQLite database of a runs folder, with an absolute path."""
    return f"sqlite:///{runs_dir.expanduser().resolve() / 'mlflow.db'}"


def quiet_mlflow() -> None:
    """Set short timeouts, no telemetry and no log lines, unless the environment sets them."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


def mlflow_client(uri: str) -> Any:
    """Return an `MlflowClient` for tracking and registry. For SQLite, make the folder of the database."""
    quiet_mlflow()
    from mlflow import MlflowClient

    quiet_mlflow()  # after the import, which sets the log level
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(client: Any, uri: str, name: str) -> str:
    """Return the experiment of that name, and create it if needed. With SQLite its files are stored beside the database."""
    from mlflow.exceptions import MlflowException

    location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri() if uri.startswith("sqlite:////") else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another run made it at the same moment
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ConfigError(f"track.experiment={name}: was deleted on {uri}; restore it or use another name")
    return str(found.experiment_id)


def is_active(client: Any, run_id: str) -> bool:
    """Return whether the run exists and is not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
