"""Where the model lies that a reference means: a run, an export folder, a version in the registry. Loads no torch."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.export import SPEC, WEIGHTS
from pipeline.run_folder import RunFolder, command, find_run, list_runs
from pipeline.storage.place import write_atomic
from pipeline.tracking.client import default_uri, mlflow_client


def resolve_model(reference: str, *, runs_dir: Path, uri: str | None = None) -> Path:
    """Return the export that a reference means, for `load_export`.

    Args:
        reference: a run's name, a run folder, an export folder, a `.safetensors` file beside its JSON, `models:/NAME@ALIAS`
            or `models:/NAME/VERSION`.
        runs_dir: where runs are looked up by name.
        uri: the registry; None = MLFLOW_TRACKING_URI, else the SQLite database of `runs_dir`.

    Raises:
        ConfigError: nothing there; the message says what was tried and what exists.
    """
    if reference.startswith("models:"):
        return _from_registry(reference, runs_dir, uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(runs_dir))
    path = Path(reference).expanduser()
    for candidate in (runs_dir / reference / "model", path, path / "model"):
        if (candidate / SPEC).is_file():
            return candidate.resolve()
    if path.suffix == ".safetensors" and path.is_file():
        if path.with_suffix(".json").is_file():
            return path.resolve()
        raise ConfigError(f"model={reference}: {path.with_suffix('.json').name} is missing beside it; it says how to build the backbone")
    if any((folder / "run.json").is_file() for folder in (runs_dir / reference, path)):
        finish = command("resume", reference, runs_dir=runs_dir)
        raise ConfigError(f"model={reference}: this run has no exported model yet; finish it with: {finish}")
    finished = [run.name for run in list_runs(runs_dir) if (run.model / SPEC).is_file()]
    near = difflib.get_close_matches(reference, finished, n=3, cutoff=0.3) or finished[-3:]
    exist = f"finished runs: {', '.join(near)}" if near else "no run there has a model"
    raise ConfigError(f"model={reference}: neither a run in {runs_dir} nor an export folder nor models:/NAME@ALIAS; {exist}")


def run_or_model(reference: str, *, runs_dir: Path, uri: str | None = None) -> RunFolder | Path:
    """Return the run that a reference means, finished or not, or the export, as `resolve_model` finds it.

    Raises:
        ConfigError: neither a run nor a model.
    """
    if any((folder / "run.json").is_file() for folder in (runs_dir / reference, Path(reference))):
        return find_run(reference, runs_dir)
    return resolve_model(reference, runs_dir=runs_dir, uri=uri)


def _from_registry(reference: str, runs_dir: Path, uri: str) -> Path:
    match = re.fullmatch(r"models:/+([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if match is None:
        raise ConfigError(f"model={reference}: not an address in the registry; use models:/NAME@best or models:/NAME/3")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ConfigError(f"model={reference}: there is no registry at {uri}; train a model first, or give --track.uri")
    with answers(uri):
        name, alias, number = match.groups()
        return _downloaded(mlflow_client(uri), reference, name, alias, number, runs_dir, uri)


def _downloaded(client: Any, reference: str, name: str, alias: str | None, number: str | None, runs_dir: Path, uri: str) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ConfigError(f"model={reference}: not in the registry; {_what_exists(client, name)}") from None
    # the time of creation tells a version from one of the same number in a registry that was deleted and made anew
    cache = runs_dir.expanduser().resolve() / ".models" / f"{name}-{version.version}-{version.creation_timestamp}"
    if not (cache / SPEC).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            source = client.get_model_version_download_uri(name, version.version)
            found = next(Path(download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=uri)).rglob(SPEC), None)
            if found is None:
                raise ConfigError(f"model={reference}: has no {SPEC}, so it is not a Manyviews model; register one with pretrain")
            cache.mkdir(parents=True, exist_ok=True)
            write_atomic(cache / WEIGHTS, found.with_name(WEIGHTS).read_bytes())
            write_atomic(cache / SPEC, found.read_bytes())  # last: its presence means that both are whole
    return cache


def _what_exists(client: Any, name: str) -> str:
    versions = client.search_model_versions(f"name = '{name}'") if "'" not in name else []
    if not versions:
        names = [model.name for model in client.search_registered_models(max_results=20)]
        return f"it has {', '.join(names)}" if names else "it is empty"
    aliases = client.get_registered_model(name).aliases
    numbers = ", ".join(str(v) for v in sorted(int(v.version) for v in versions))
    return f"{name} has versions {numbers}" + (f" and aliases {', '.join(sorted(aliases))}" if aliases else " and no alias")


@contextlib.contextmanager
def answers(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ConfigError(f"track.uri={uri}: the registry refuses or does not answer ({reason}); try again when it is up") from None
