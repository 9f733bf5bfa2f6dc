"""Exports, the registry, the served model in a process that does not know this project, and finding models."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.errors import ConfigError
from pipeline.export import registry
from pipeline.export.model_code import SERVED, sources
from pipeline.export.registry import Registered, export, init_backbone, load_export, register, resolve_model
from pipeline.tracking.client import default_uri, mlflow_client
from pipeline.tracking.run_tracker import Tracker

CONFIG = BackboneConfig(name="resnet18", width=0.25, depth=(1, 1, 1, 1), stem="full", drop_path=0.1)
OTHERS = {
    "selective-kernels": BackboneConfig(name="resnet50", width=0.25, depth=(1, 1, 1, 1), selective_kernels=True, stem="strided"),
    "vit": BackboneConfig(
        name="vit_tiny_patch16_224", depth=(2,), image_size=48, patch_size=8, positions="learned-offset", registers=2, swiglu=True
    ),
    "vit-sincos": BackboneConfig(name="vit_tiny_patch16_224", depth=(2,), image_size=32, positions="sincos", layer_scale=0.1),
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def backbone(seed: int = 0, config: BackboneConfig = CONFIG) -> nn.Module:
    torch.manual_seed(seed)
    net = build_backbone(config)
    for module in net.modules():  # statistics as after training, so that evaluation mode matters
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net


def write(folder: Path, seed: int = 0, config: BackboneConfig = CONFIG) -> Path:
    return export(backbone(seed, config), config, folder, size=32, mean=MEAN, std=STD, facts={"method": "swav", "scores": {"knn": 0.5}})


def picture(height: int = 40, width: int = 50, seed: int = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def expected(folder: Path, image: bytes) -> np.ndarray:
    """The embedding as evaluation computes it."""
    from pipeline.data.decode import decode, evaluation_crop
    from pipeline.evaluate.features import extract

    net, spec = load_export(folder)
    crop = torch.from_numpy(evaluation_crop(decode(image), spec.size).copy())
    return extract(net, crop[None], mean=spec.mean, std=spec.std).numpy()[0]


# ---------------------------------------------------------------------------- exports


def test_an_export_gives_the_same_backbone_back(tmp_path: Path) -> None:
    net = backbone().train()
    folder = export(net, CONFIG, tmp_path / "model", size=32, mean=MEAN, std=STD, facts={"method": "swav"})
    loaded, spec = load_export(folder)
    images = torch.randn(2, 3, 32, 32)
    assert net.training and not loaded.training
    assert torch.equal(loaded(images), net.eval()(images))
    assert (spec.backbone, spec.size, spec.mean, spec.std, spec.features) == (CONFIG, 32, MEAN, STD, 128)
    assert spec.facts == {"method": "swav"}
    assert sorted(p.name for p in folder.iterdir()) == ["backbone.json", "backbone.safetensors"]  # nothing half-written stays


def test_an_export_is_float32_with_timm_names_whatever_the_backbone_was(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    net = backbone().double().to(memory_format=torch.channels_last)
    folder = export(net, CONFIG, tmp_path, size=32, mean=MEAN, std=STD, facts={})
    weights = load_file(folder / "backbone.safetensors")
    assert weights.keys() == build_backbone(CONFIG).state_dict().keys()
    assert all(w.dtype in (torch.float32, torch.int64) and w.is_contiguous() for w in weights.values())
    assert next(net.parameters()).dtype == torch.float64


def test_damaged_exports_are_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    whole = (folder / "backbone.safetensors").read_bytes()
    (folder / "backbone.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be read as an export"):
        load_export(folder)
    (folder / "backbone.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"backbone\.safetensors is missing"):
        load_export(folder)
    (folder / "backbone.safetensors").write_bytes(whole)
    tree = json.loads((folder / "backbone.json").read_text())
    tree["backbone"]["width"] = 0.5
    (folder / "backbone.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="of another shape"):
        load_export(folder)


def test_warm_start_fills_or_explains(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", seed=3)
    net = backbone(seed=4)
    init_backbone(net, str(folder), runs_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), backbone(seed=3).state_dict().values(), strict=True))

    other = build_backbone(BackboneConfig(name="resnet18", width=0.25, depth=(1, 1, 1, 2), stem="full"))
    with pytest.raises(ConfigError, match=r"backbone\.init=.*width=0\.25 depth=\(1, 1, 1, 1\).*missing \(layer4\.1\."):
        init_backbone(other, str(folder), runs_dir=tmp_path)
    wide = build_backbone(BackboneConfig(name="resnet18", width=0.5, depth=(1, 1, 1, 1), stem="full"))
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    with pytest.raises(ConfigError, match=r"of another shape \(conv1\.0\.weight is 8x3x3x3, not 16x3x3x3"):
        init_backbone(wide, str(folder), runs_dir=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())  # all or nothing


def test_warm_start_from_bare_weights_leaves_out_the_classifier(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    classifier = timm.create_model("resnet18", pretrained=False, num_classes=7)
    save_file(classifier.state_dict(), tmp_path / "resnet18.safetensors")
    net = build_backbone(BackboneConfig(name="resnet18"))
    init_backbone(net, str(tmp_path / "resnet18.safetensors"), runs_dir=tmp_path)
    assert torch.equal(net.layer4[0].conv1.weight, classifier.layer4[0].conv1.weight)


# ---------------------------------------------------------------------------- the registry


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A runs folder with one exported run, registered, and its registry."""
    runs = tmp_path_factory.mktemp("world") / "runs"
    uri = default_uri(runs)
    folder = write(runs / "first" / "model")
    (runs / "first" / "run.json").write_text(json.dumps({"name": "first", "status": "finished", "created": 1.0}))
    (runs / "begun").mkdir()
    (runs / "begun" / "run.json").write_text(json.dumps({"name": "begun", "status": "created", "created": 2.0}))
    tracker = Tracker.open(runs / "first", uri=uri, experiment="tests", name="first", params=lambda: {"lr": 1}, tags={})
    run_id = tracker.run_id()
    assert run_id
    tags = {"method": "swav", "recipe": "swav-small", "data_fingerprint": "abc"}
    registered = register(folder, name="swav-small", uri=uri, run_id=run_id, tags=tags, held_out_knn=0.4)
    tracker.close()
    return {"runs": runs, "uri": uri, "folder": folder, "run_id": run_id, "registered": registered}


def test_a_version_carries_its_origin(world: dict[str, Any]) -> None:
    assert world["registered"] == Registered("swav-small", 1, "models:/swav-small/1", True)
    client = mlflow_client(world["uri"])
    version = client.get_model_version_by_alias("swav-small", "best")
    assert version.run_id == world["run_id"]
    assert version.tags["method"] == "swav" and version.tags["data_fingerprint"] == "abc" and float(version.tags["knn_held_out"]) == 0.4
    run = client.get_run(world["run_id"])
    assert run.info.status == "FINISHED" and len(run.outputs.model_outputs) == 1


def test_best_follows_the_highest_score_and_nothing_else(world: dict[str, Any]) -> None:
    moves = []
    for score in (None, 0.4, 0.6, 0.5, float("nan"), 0.7):
        moves.append(register(world["folder"], name="ladder", uri=world["uri"], held_out_knn=score).alias_best)
    # the first always; a score beats none; then only higher ones
    assert moves == [True, True, True, False, False, True]
    assert int(mlflow_client(world["uri"]).get_model_version_by_alias("ladder", "best").version) == 6


def test_a_model_that_cannot_be_loaded_is_not_registered(world: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (folder / "backbone.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError):
        register(folder, name="broken", uri=world["uri"])
    assert "broken" not in [m.name for m in mlflow_client(world["uri"]).search_registered_models()]
    with pytest.raises(ConfigError, match=r"track\.model_name=a/b"):
        register(world["folder"], name="a/b", uri=world["uri"])


def test_nothing_in_the_registered_model_is_pickled(world: dict[str, Any]) -> None:
    version = mlflow_client(world["uri"]).get_model_version("swav-small", "1")
    folder = Path(version.source.removeprefix("file://"))
    files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert {"MLmodel", "manyviews_model.py", "artifacts/model/backbone.safetensors"} <= set(files)
    assert [f for f in files if f.endswith(".py")] == ["manyviews_model.py"]
    assert not [f for f in files if f.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".pyc"))]


def test_the_code_of_a_model_needs_little_and_finds_its_own_modules() -> None:
    needed: set[str] = set()
    for name, text in sources(SERVED).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):  # `import pipeline.x` would be a module of the user's
                names = {alias.name.split(".")[0] for alias in node.names}
                assert not names & {"methods", "pipeline"}, name
                needed |= names
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, name
                needed.add(str(node.module).split(".")[0])
    libraries = {"torch", "torchvision", "timm", "numpy", "PIL", "pandas", "safetensors", "mlflow"}
    assert needed - set(sys.stdlib_module_names) <= libraries | {"methods", "pipeline"}


STRANGER = """
import base64, json, sys
import mlflow, numpy as np, pandas as pd
from PIL import Image
assert not any((__import__("pathlib").Path(p) / "pipeline" / "export").exists() for p in sys.path if p), sys.path
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/swav-small@best")
data = open(sys.argv[2], "rb").read()
pixels = np.asarray(Image.open(sys.argv[2]))
cells = [data, base64.b64encode(data).decode(), pixels, open(sys.argv[3], "rb").read()]
together = model.predict(pd.DataFrame({"image": cells}))
assert together.dtype == np.float32, together.dtype
alone = [model.predict(pd.DataFrame({"image": [cell]}))[0].tolist() for cell in cells]
try:
    model.predict(pd.DataFrame({"image": [data, b"not an image"]}))
    error = None
except Exception as raised:
    error = str(raised)
from mlflow.pyfunc.scoring_server import init  # what `mlflow models serve` runs
from fastapi.testclient import TestClient
client = TestClient(init(model))
records = [{"image": base64.encodebytes(data).decode()}, {"image": base64.b64encode(cells[3]).decode()}]
answer = client.post("/invocations", json={"dataframe_records": records})
refused = client.post("/invocations", json={"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(b"no").decode()]]}})
rest = {"rest": answer.json(), "refused": [refused.status_code, refused.text]}
taken = sorted({name.split(".")[0] for name in sys.modules} & {"pipeline", "methods"})
import pipeline, methods  # the user's
again = mlflow.pyfunc.load_model("models:/swav-small@best").predict(pd.DataFrame({"image": cells}))
users = [pipeline.WHOSE, methods.WHOSE, sys.modules["pipeline"] is pipeline, sys.modules["methods"] is methods]
models = {name: mlflow.pyfunc.load_model(f"models:/{name}/1") for name in sys.argv[4:]}
others = {name: model.predict(pd.DataFrame({"image": cells}))[[0, 3]].tolist() for name, model in models.items()}
found = {"together": together.tolist(), "alone": alone, "again": again.tolist(), "error": error}
print(json.dumps(found | {"taken": taken, "users": users, "others": others} | rest))
"""


@pytest.fixture(scope="module")
def strange(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process sees that has neither this project nor its folder, but modules of the same names."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("pipeline", "methods"):
        (folder / f"{name}.py").write_text("WHOSE = 'the user'")
    for name, config in OTHERS.items():
        register(write(world["runs"] / name / "model", config=config), name=name, uri=world["uri"])
    (folder / "a.png").write_bytes(picture())
    (folder / "b.jpg").write_bytes(picture(31, 90, 1, "JPEG", "CMYK"))
    script = folder / "stranger.py"
    script.write_text(STRANGER)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, str(script), world["uri"], str(folder / "a.png"), str(folder / "b.jpg"), *OTHERS]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr[-3000:]
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer | {"stderr": ran.stderr, "images": [(folder / "a.png").read_bytes(), (folder / "b.jpg").read_bytes()]}


def test_bytes_text_and_arrays_give_the_embedding_of_evaluation(world: dict[str, Any], strange: dict[str, Any]) -> None:
    first, second = (expected(world["folder"], image) for image in strange["images"])
    for given in (strange["together"], strange["alone"]):
        np.testing.assert_allclose(given, [first, first, first, second], atol=1e-5)
    assert np.abs(first - second).max() > 1e-2


def test_modules_of_the_user_stay_the_users(strange: dict[str, Any]) -> None:
    assert strange["taken"] == []
    assert strange["users"] == ["the user", "the user", True, True]
    np.testing.assert_allclose(strange["again"], strange["together"], atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_backbone_is_built_as_in_evaluation(world: dict[str, Any], strange: dict[str, Any], name: str) -> None:
    there = [expected(world["runs"] / name / "model", image) for image in strange["images"]]
    np.testing.assert_allclose(strange["others"][name], there, atol=1e-5)
    assert np.abs(there[0] - there[1]).max() > 1e-3


def test_two_versions_in_one_process_have_their_own_code(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    mlflow_client(world["uri"])
    mlflow.set_tracking_uri(world["uri"])
    code = registry.model_code()
    assert code.count(".float().cpu()") == 1
    for text in (code, code.replace(".float().cpu()", ".float().cpu() * 2"), code):
        monkeypatch.setattr(registry, "model_code", lambda text=text: text)
        register(world["folder"], name="twins", uri=world["uri"])
    models = [mlflow.pyfunc.load_model(f"models:/twins/{version}") for version in (1, 2, 3)]
    first, second, third = (model.predict(pd.DataFrame({"image": [picture()]}))[0] for model in models)
    np.testing.assert_allclose(first, expected(world["folder"], picture()), atol=1e-5)
    np.testing.assert_allclose(second, 2 * first, rtol=1e-6)
    np.testing.assert_array_equal(third, first)
    packages = [type(model.unwrap_python_model()).__module__.split(".")[0] for model in models]
    assert packages[0] == packages[2] != packages[1] and all(package.startswith("manyviews_") for package in packages)


def test_the_rest_server_answers_and_refuses(world: dict[str, Any], strange: dict[str, Any]) -> None:
    np.testing.assert_allclose(strange["rest"]["predictions"], [expected(world["folder"], i) for i in strange["images"]], atol=1e-5)
    assert strange["refused"][0] == 400 and "image 0 (counted from 0)" in strange["refused"][1]


def test_a_bad_image_is_named_by_its_position(strange: dict[str, Any]) -> None:
    assert "image 1 (counted from 0)" in strange["error"]


def test_long_requests_go_in_batches(world: dict[str, Any]) -> None:
    import mlflow

    mlflow_client(world["uri"])
    mlflow.set_tracking_uri(world["uri"])
    model = mlflow.pyfunc.load_model("models:/swav-small/1")
    images = [picture(20 + i % 7, 25, seed=i) for i in range(70)]  # more than one batch
    embeddings = model.predict(pd.DataFrame({"image": images}, index=range(100, 170)))
    assert embeddings.shape == (70, 128)
    np.testing.assert_allclose(embeddings[[0, 63, 64, 69]], [expected(world["folder"], images[i]) for i in (0, 63, 64, 69)], atol=1e-5)
    arrays = [np.asarray(Image.open(io.BytesIO(image))) for image in images[:3]]
    np.testing.assert_allclose(model.predict(pd.DataFrame({"image": arrays})), embeddings[:3], atol=1e-5)
    text = [base64.b64encode(image).decode() for image in images[:3]]
    np.testing.assert_allclose(model.predict(pd.DataFrame({"image": text})), embeddings[:3], atol=1e-5)


# ---------------------------------------------------------------------------- finding a model


def test_every_way_to_name_a_model(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, folder = world["runs"], world["folder"].resolve()
    for reference in ("first", str(runs / "first"), str(folder)):
        assert resolve_model(reference, runs_dir=runs) == folder
    single = folder / "backbone.safetensors"
    first_conv = load_export(folder)[0].state_dict()["conv1.0.weight"]
    assert torch.equal(load_export(resolve_model(str(single), runs_dir=runs))[0].state_dict()["conv1.0.weight"], first_conv)
    shutil.copy(single, tmp_path / "mine.safetensors")
    with pytest.raises(ConfigError, match=r"mine\.json is missing"):
        resolve_model(str(tmp_path / "mine.safetensors"), runs_dir=runs)
    shutil.copy(folder / "backbone.json", tmp_path / "mine.json")
    assert load_export(resolve_model(str(tmp_path / "mine.safetensors"), runs_dir=runs))[1].features == 128

    for reference in ("models:/swav-small@best", "models:/swav-small/1"):
        found = load_export(resolve_model(reference, runs_dir=runs, uri=world["uri"]))[0]
        assert torch.equal(found.state_dict()["conv1.0.weight"], first_conv)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("frist", "finished runs: first"),
        ("begun", "no exported model yet.*resume begun"),
        ("models:/swav-small@champion", "has versions 1 and aliases best"),
        ("models:/swav-small/99", "has versions 1 and aliases best"),
        ("models:/nothing@best", "it has .*swav-small"),
        ("models:/swav-small", "not an address"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(world: dict[str, Any], reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(reference, runs_dir=world["runs"], uri=world["uri"])


def test_a_registry_that_is_down_is_said_in_one_sentence(world: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"track\.uri=http://127\.0\.0\.1:9: the registry .*does not answer"):
        register(world["folder"], name="swav-small", uri="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"track\.uri=http://127\.0\.0\.1:9: the registry .*does not answer"):
        resolve_model("models:/swav-small@best", runs_dir=world["runs"], uri="http://127.0.0.1:9")


def test_the_models_requirements_are_the_projects() -> None:
    import tomllib

    from pipeline.export.registry import REQUIREMENTS

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(REQUIREMENTS) <= set(project["dependencies"])


def test_no_registry_is_made_by_asking_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="there is no registry"):
        resolve_model("models:/a@best", runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_environments_server_is_asked_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'elsewhere.db'}")
    with pytest.raises(ConfigError, match=r"no registry at sqlite:///.*elsewhere\.db"):
        resolve_model("models:/a@best", runs_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"no registry at sqlite:///.*given\.db"):
        resolve_model("models:/a@best", runs_dir=tmp_path, uri=f"sqlite:///{tmp_path / 'given.db'}")
