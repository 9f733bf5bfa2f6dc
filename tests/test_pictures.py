"""Pictures by name: of a run, of one that is not finished, of an exported backbone; and what cannot be drawn says why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import manyviews
from pipeline import checkpoint
from pipeline.build import prepare
from pipeline.config import RunConfig, override, to_yaml
from pipeline.evaluate.final import Scores
from pipeline.export import registry
from pipeline.export.find import run_or_model
from pipeline.figures import inversion_pictures, pictures
from pipeline.figures.context import FigureContext
from pipeline.recipes import load_recipe
from pipeline.run_folder import create_run

DATA = "patches:pixels=16,per_photo=6"


def small(recipe: str = "swav-small", **changes: object) -> RunConfig:
    """A recipe with a network and images so small that a picture takes a second."""
    tiny = {"data.path": DATA, "data.num_shards": 2, "train.global_batch_size": 16, "train.steps": 2, "evaluate.size": 16}
    return override(load_recipe(recipe), tiny | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs that were never trained: `swav` is finished, `msn` has a checkpoint and no export."""
    folder = tmp_path_factory.mktemp("runs")
    vit = {"backbone.depth": (1,), "backbone.image_size": 16, "views.target.size": 16, "views.random.size": 16, "views.focal.size": 8}
    for name, config in (("swav", small()), ("msn", small("msn-small", **vit))):
        run, ready = create_run(folder, name, "test"), prepare(config)
        run.update(fingerprint=ready.dataset.fingerprint)
        (run.path / "config.yaml").write_text(to_yaml(ready.config))
        state = {"method": ready.method.state_dict(), "id_tables": {}}
        checkpoint.save(run.checkpoints, state, step=2)
        if name == "swav":
            backbone, data = ready.method.evaluation_backbone(), config.data
            registry.export(backbone, config.backbone, run.model, size=16, mean=data.mean, std=data.std, facts={})
            run.metrics.write_text(json.dumps({"step": 1, "metrics": {"loss": 4.0}}) + "\n")
    return folder


def test_names_are_those_of_the_files_and_help_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    names = {entry.name for entry in pictures.entries()}
    assert {"views", "curves", "neighbours", "clusters", "cluster_sizes", "attention", "reconstructions", "scores"} <= names
    assert all(entry.summary for entry in pictures.entries())
    assert manyviews.main(["figure", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)


def drawn(path: Path) -> bool:
    """Whether there is more than an empty sheet."""
    with Image.open(path) as picture:
        return bool(np.asarray(picture.convert("L")).std() > 5)


@pytest.mark.parametrize("name", ["curves", "clusters"])
def test_pictures_of_a_finished_run(runs: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"{name}.png"
    assert manyviews.main(["figure", name, "swav", "--runs-dir", str(runs), "--to", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    assert drawn(path)


@pytest.mark.parametrize("name", ["attention", "patch_pca"])
def test_pictures_of_a_run_without_an_export(runs: Path, name: str, tmp_path: Path) -> None:
    path = pictures.find(name).draw(FigureContext.of(run_or_model("msn", runs_dir=runs)), tmp_path / "picture.png")
    assert drawn(path)


@pytest.mark.parametrize("run", ["swav", "msn"])
def test_what_features_keep(runs: Path, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a ResNet and of a ViT, with a decoder that learns next to nothing."""
    monkeypatch.setattr(inversion_pictures, "STEPS", 3)
    path = pictures.find("keeps").draw(FigureContext.of(run_or_model(run, runs_dir=runs)), tmp_path / "keeps.png")
    assert drawn(path)


def test_other_images_than_the_runs(runs: Path, tmp_path: Path) -> None:
    """Fewer than one batch, and of another size: what was trained stays as it was."""
    folder = tmp_path / "images" / "cats"
    folder.mkdir(parents=True)
    for i in range(9):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    call = ["figure", "clusters", "swav", "--runs-dir", str(runs), "--to", str(tmp_path / "a.png"), "--data.path", str(folder.parent)]
    assert manyviews.main(call) == 0
    assert drawn(tmp_path / "a.png")


def test_pictures_say_of_which_images_they_are(runs: Path, tmp_path: Path) -> None:
    """Only images of the run itself are held out; of others, any are drawn."""
    own = FigureContext.of(run_or_model("swav", runs_dir=runs))
    images, source = own.a_few_images(count=3)
    assert len(images) == 3 and source == "held-out images of patches:pixels=16,per_photo=6"

    def of(**changes: object) -> FigureContext:
        subject = FigureContext.of(run_or_model("swav", runs_dir=runs))
        subject.config = override(subject.config, changes)
        return subject

    assert of(**{"data.held_out": 0.5}).a_few_images()[1] == "images of patches:pixels=16,per_photo=6"  # some were trained on
    folder = tmp_path / "elsewhere" / "zoo"
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (20, 20), (90 * i, 0, 0)).save(folder / f"{i}.png")
    images, source = of(**{"data.path": str(folder)}).a_few_images()
    assert source == "images of elsewhere/zoo" and len(images) == 2


def test_an_exported_backbone_has_features_but_no_clusters(runs: Path, tmp_path: Path) -> None:
    outside = tmp_path / "model"
    (runs / "swav" / "model").rename(outside)
    try:
        subject = FigureContext.of(run_or_model(str(outside), runs_dir=runs))
        subject.config = dataclasses.replace(subject.config, data=dataclasses.replace(subject.config.data, path=DATA))
        assert drawn(pictures.find("neighbours").draw(subject, tmp_path / "n.png"))
        for name in ("clusters", "curves"):
            with pytest.raises(pictures.NothingToDraw, match="give the run that made it"):
                pictures.find(name).draw(subject, tmp_path / "none.png")
    finally:
        outside.rename(runs / "swav" / "model")


def test_maps_of_few_patches_are_not_drawn(runs: Path) -> None:
    subject = FigureContext.of(run_or_model("msn", runs_dir=runs))
    subject.require_fine(8, 8)
    with pytest.raises(pictures.NothingToDraw, match="7 x 9 patches at 224 pixels are too few"):
        subject.require_fine(7, 9)


def test_what_cannot_be_drawn_says_why(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = {
        ("curvs", "swav"): "figure=curvs: unknown; did you mean curves",
        ("attention", "swav"): "has no CLS token",
        ("reconstructions", "swav"): "paints no masked patches",
        ("curves", "msn"): "holds no points yet",
        ("curves", "swaf"): "neither a run in",
        ("curves",): "RUN_OR_MODEL: missing",
        ("clusters", "swav-small"): "recipe=swav-small: is not trained; give a run of it",
        ("masks", "swav-small"): "its method hides no patches; give a run or a recipe of one of dinov2, ibot, mae, msn",
    }
    for arguments, words in calls.items():
        assert manyviews.main(["figure", *arguments, "--runs-dir", str(runs), "--to", str(tmp_path / "none.png")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_a_finished_run_gets_what_it_has(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what it has nothing for, nor what takes minutes."""
    subject = FigureContext.of(run_or_model("swav", runs_dir=runs))
    monkeypatch.setitem(vars(subject), "scores", Scores((), "no labels", "none"))
    drawn = {path.stem for path in pictures.draw_for_run(subject, tmp_path)}
    assert (
        {"views", "curves", "neighbours", "clusters", "cluster_sizes", "patch_pca"} == drawn == {path.stem for path in tmp_path.iterdir()}
    )
