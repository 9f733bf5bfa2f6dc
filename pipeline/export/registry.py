"""MLflow's model registry, and a start from a model's weights. `pipeline.export.weights` makes and reads the files, `find` finds them."""

from __future__ import annotations

import io
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from methods.parts.errors import ConfigError
from pipeline.export.find import answers, resolve_model
from pipeline.export.model_code import model_code
from pipeline.export.weights import ExportSpec, build_export, fill, load_export, read_export, wording
from pipeline.export.write import export
from pipeline.tracking.client import experiment_id, mlflow_client

__all__ = [
    "ExportSpec",
    "Registered",
    "build_export",
    "export",
    "init_backbone",
    "load_export",
    "read_export",
    "register",
    "resolve_model",
    "set_alias",
]

SCORE_TAG = "knn_held_out"
# ranges as in pyproject.toml: the export is plain weights, which all of these versions can run
REQUIREMENTS = [
    "mlflow>=3.17,<4",
    "torch>=2.10,<3",
    "torchvision>=0.25,<1",
    "timm>=1.0.20,<2",
    "safetensors>=0.5,<1",
    "numpy>=2.1,<3",
    "pandas>=2.2,<4",
    "pillow>=11,<14",
]


# ---------------------------------------------------------------------------- the registry


@dataclass(frozen=True)
class Registered:
    """A version in the registry, with the address `models:/NAME/VERSION`."""

    name: str
    version: int
    uri: str
    alias_best: bool  # the alias `best` has moved to this version


def register(
    folder: Path,
    *,
    name: str,
    uri: str,
    run_id: str | None = None,
    tags: Mapping[str, object] | None = None,
    held_out_knn: float | None = None,
    experiment: str = "manyviews",
) -> Registered:
    """Log an export as an MLflow model that embeds images, and register it as the next version of `name`.

    The alias `best` moves to it if its held-out kNN is higher than that of all other versions of `name`. No score is the lowest.

    Args:
        folder: the export.
        uri: tracking server and registry.
        run_id: the MLflow run of the model.
        tags: method, recipe, data fingerprint, scores.
        held_out_knn: top-1 fraction in [0, 1] on held-out training images.
        experiment: experiment of a model without a run.

    Raises:
        ConfigError: the registry rejects the name, the export cannot be read, or the server does not answer.
    """
    if not re.fullmatch(r"[\w .\-]+", name):
        raise ConfigError(f"track.model_name={name}: not a name for the registry; use letters, digits, - _ and .")
    _, spec = load_export(folder)  # raises for a damaged export
    all_tags = {key: str(value) for key, value in (tags or {}).items()}
    if held_out_knn is not None and math.isfinite(held_out_knn):
        all_tags[SCORE_TAG] = repr(float(held_out_knn))
    with answers(uri):
        version = _add_version(folder, spec, name, uri, run_id, all_tags, experiment)
        return Registered(name, int(version.version), f"models:/{name}/{version.version}", _promote(uri, version))


def set_alias(model: Registered, alias: str, uri: str) -> None:
    """Point an alias of the model's name at this version, e.g. `champion`.

    Raises:
        ConfigError: the registry does not answer.
    """
    with answers(uri):
        mlflow_client(uri).set_registered_model_alias(model.name, alias, model.version)


def _add_version(folder: Path, spec: ExportSpec, name: str, uri: str, run_id: str | None, tags: dict[str, str], experiment: str) -> Any:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    client = mlflow_client(uri)
    experiment_of_run = client.get_run(run_id).info.experiment_id if run_id else experiment_id(client, uri, experiment)
    logged = client.create_logged_model(experiment_of_run, name=name, source_run_id=run_id, tags=tags)
    with tempfile.TemporaryDirectory() as scratch:
        model = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
        _save_pyfunc(Path(scratch), folder, spec, model)
        client.log_model_artifacts(logged.model_id, f"{scratch}/model")
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A server accepts only the address of the logged model. On a database MLflow would look that up at the tracking address of the
    # process, which may differ: there the location of the files is given, and the link only with a run.
    direct = not uri.startswith("http")
    return client.create_model_version(
        name,
        logged.artifact_location if direct else logged.model_uri,
        run_id=run_id,
        tags=tags,
        model_id=None if direct and not run_id else logged.model_id,
    )


def _promote(uri: str, version: Any) -> bool:
    """Move the alias `best` to a new version if its score is higher than all others. Return whether it moved."""
    client = mlflow_client(uri)
    others = [_score(v) for v in client.search_model_versions(f"name = '{version.name}'") if int(v.version) != int(version.version)]
    best = all(_score(version) > other for other in others)
    if best:
        client.set_registered_model_alias(version.name, "best", version.version)
    return best


def _score(version: Any) -> float:
    try:
        return float(version.tags.get(SCORE_TAG, "-inf"))
    except ValueError:
        return -math.inf


def _save_pyfunc(scratch: Path, folder: Path, spec: ExportSpec, model: Any) -> None:
    import mlflow.pyfunc
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from PIL import Image

    picture = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(picture, "PNG")
    code = scratch / "manyviews_model.py"
    code.write_text(model_code())
    mlflow.pyfunc.save_model(
        scratch / "model",
        python_model=str(code),
        artifacts={"export": str(folder.resolve())},
        # `binary`: the REST server decodes base64; in Python, bytes, base64 strings and arrays are accepted
        signature=ModelSignature(
            inputs=Schema([ColSpec("binary", "image")]), outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, spec.features))])
        ),
        input_example=pd.DataFrame({"image": [picture.getvalue()]}),
        pip_requirements=REQUIREMENTS,
        mlflow_model=model,
    )


def init_backbone(backbone: nn.Module, reference: str, *, runs_dir: Path, uri: str | None = None) -> None:
    """Load the weights of a model, or of a `.safetensors` file with timm's names, into `backbone`.

    Raises:
        ConfigError: no such model, or its architecture differs; the message names the parameters and the saved settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(reference).expanduser()
    if file.suffix == ".safetensors" and file.is_file() and not file.with_suffix(".json").is_file():
        try:
            weights, saved = load_file(file), "a file without settings"
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"backbone.init={reference}: cannot be read ({error}); give a whole .safetensors file") from None
        names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
        classifiers = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
        weights = {name: value for name, value in weights.items() if not name.startswith(classifiers)} if classifiers else weights
    else:
        weights, spec = read_export(resolve_model(reference, runs_dir=runs_dir, uri=uri))
        saved = wording(spec.backbone)
    fill(backbone, weights, f"backbone.init={reference}", saved)
