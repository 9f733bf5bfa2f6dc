"""The front door: mistakes are one sentence with a remedy and exit code 2, before Ray starts; help needs no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import manyviews

ROOT = Path(__file__).parent.parent
SMALL = ["pretrain", "swav-small"]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may get as far as starting Ray."""
    import pipeline.train.launch as launch

    def refuse() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(launch, "start_ray", refuse)


def images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i:03}.jpg")
    return folder


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on standard error of a call that must end with exit code 2."""
    assert manyviews.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1, "one sentence on one line"
    assert "Traceback" not in err + out
    return err


def test_wrong_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = mistake([*SMALL, "--data.path", str(tmp_path / "nowhere"), "--runs-dir", str(tmp_path / "runs")], capsys)
    assert "data.path=" in err
    assert "nowhere" in err
    assert not (tmp_path / "runs").exists(), "a refused run leaves nothing behind"


def test_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "data.path=" in mistake([*SMALL, "--data.path", str(tmp_path)], capsys)


def test_text_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert "notes.txt" in mistake([*SMALL, "--data.path", str(tmp_path)], capsys)


def test_misspelt_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean method.temperature" in mistake([*SMALL, "--method.temperatur", "0.2"], capsys)
    assert "did you mean train.global_batch_size" in mistake([*SMALL, "--train.global-batchsize=64"], capsys)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (["--method.temperature", "-1"], "method.temperature=-1.0: use a positive number"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--views.global.size", "2"], "views.global: size=2: use 4 pixels or more"),
        (["--optim.name", "adam"], "optim.name"),
        (["--backbone.name", "resnet81"], "backbone.name=resnet81"),
        (["--train.global-batch-size", "100"], "use 96 or 104"),
        (["--method.queue-length", "100"], "method.queue_length=100: not a multiple of train.global_batch_size=128; use 128"),
        (["--train.accumulation-steps", "2"], "swav needs the whole batch at once"),
        (["--data.path", "patches:colour=3"], "patches"),
    ],
)
def test_values_that_cannot_work(setting: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in mistake([*SMALL, *setting, "--runs-dir", str(tmp_path)], capsys)


def test_batch_larger_than_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "images", 50)
    err = mistake([*SMALL, "--data.path", str(folder), "--data.held-out", "0", "--runs-dir", str(tmp_path / "runs")], capsys)
    assert "train.global_batch_size=128: larger than the 50 training images; use 48 or fewer" in err


def test_used_run_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "images", 20)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    call = [*SMALL, "--data.path", str(folder), "--train.global-batch-size", "16", "--runs-dir", str(tmp_path / "runs"), "--run", "mine"]
    assert "run=mine: already exists" in mistake(call, capsys)
    assert "not a plain name" in mistake([*call[:-1], "../mine"], capsys)


def test_unknown_recipe_run_verb_and_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "recipe=swav-smal: unknown; did you mean swav-small" in mistake(["pretrain", "swav-smal"], capsys)
    assert "run=nothing: no such run" in mistake(["resume", "nothing", "--runs-dir", str(tmp_path)], capsys)
    assert "RECIPE: missing" in mistake(["pretrain"], capsys)
    assert "invalid choice: 'pertrain'" in mistake(["pertrain"], capsys)
    assert "--all: no such option of runs" in mistake(["runs", "--all"], capsys)


def test_help_imports_no_heavy_library() -> None:
    heavy = {"torch", "ray", "mlflow", "timm", "pandas"}
    code = f"import sys, manyviews\n{{call}}\nloaded = {heavy} & set(sys.modules)\nassert not loaded, loaded"
    calls = [
        "manyviews.parser().format_help()",
        *(f"manyviews.main([{verb!r}, '--help'])" for verb in ("pretrain", "evaluate", "figure", "runs")),
    ]
    for call in [*calls, "manyviews.main(['recipes'])"]:
        done = subprocess.run([sys.executable, "-c", code.replace("{call}", call)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_of_a_recipe_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        manyviews.main(["pretrain", "swav-small", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--method.num-prototypes", "--views.local.scale", "--optim.base-lr", "--train.deterministic", "--data.held-out"):
        assert flag in shown
    assert re.search(r"--method\.num-prototypes INT.*?\(default:\s+64\)", shown, re.DOTALL)


def test_lists_for_machines(tmp_path: Path) -> None:
    for verb, known in (("recipes", "swav-small"), ("methods", "swav")):
        assert manyviews.main([verb, "--json", str(tmp_path / "list.json")]) == 0
        assert known in [row["name"] for row in json.loads((tmp_path / "list.json").read_text())]
    assert manyviews.main(["runs", "--runs-dir", str(tmp_path), "--json", str(tmp_path / "list.json")]) == 0
    assert json.loads((tmp_path / "list.json").read_text()) == []


def test_one_run_is_shown_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    facts = {"name": "mine", "status": "running", "recipe": "swav-small", "step": 40, "total_steps": 250, "knn": 0.5, "created": 1.7e9}
    facts |= {"chance": [3.4657, "ln K"], "group": {"workers": 2, "share": {"CPU": 0.25}}}
    (tmp_path / "mine" / "run.json").write_text(json.dumps(facts))
    said = tmp_path / "said.json"
    assert manyviews.main(["runs", "mine", "--runs-dir", str(tmp_path), "--json", str(said)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    assert shown["state"] == "interrupted", "no process holds it"
    assert shown["step"] == "40/250" and shown["workers"] == "2" and shown["kNN"] == "held-out  50.0 %"
    assert shown["began"].startswith("2023-11-1"), "a date, not a number of seconds"
    assert "manyviews resume mine --runs-dir" in shown["how"]
    assert "ended" not in shown and "share" not in str(shown), "what is not known or of no use is not shown"
    assert json.loads(said.read_text())[0]["group"] == facts["group"], "machines get everything"


def test_views_draws_what_training_sees(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", 12)
    picture = tmp_path / "views.png"
    assert manyviews.main(["views", "swav-small", "--data.path", str(folder), "--images", "3", "--to", str(picture)]) == 0
    with Image.open(picture) as drawn:
        assert drawn.width > 600
        assert np.asarray(drawn.convert("L")).std() > 20  # pictures, not an empty page
