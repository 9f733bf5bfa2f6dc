"""The front door: mistakes are one sentence with a remedy and exit code 2, before Ray starts; help needs no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import manyviews
from pipeline.cli import early, printing
from pipeline.cli.overrides import keys, parse_settings, split
from pipeline.cli.verb import read
from pipeline.config import flatten, override
from pipeline.recipes import load_recipe
from pipeline.run_folder import command

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
        (["--train.epochs", "many"], "error: train.epochs=many: use a number\n"),
        (["--views.global.size", "2"], "views.global.size=2: use 4 or more"),
        (["--method.temperature", "0.0"], "error: method.temperature=0.0: use a positive number, e.g. 0.1\n"),
        (["--train.steps", "many"], "error: train.steps=many: use None or INT\n"),
        (["--views.global.scale", "0.3", "low"], "error: views.global.scale='0.3', 'low': use numbers\n"),
        (["--train.global-batch-size"], "error: train.global_batch_size: a value is missing; it needs 1\n"),
        (["--evaluate.path", "nowhere"], "error: evaluate.path="),
        (["--optim.name", "adam"], "error: optim.name=adam: use one of 'larc', 'lars', "),
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


def test_too_few_images_and_those_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "images", 2)
    (folder / "001.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    err = mistake([*SMALL, "--data.path", str(folder), "--runs-dir", str(tmp_path / "runs")], capsys)
    assert "larger than the 2 training images (of 2 images 1 cannot be read; other files that are no images: 1); use 8 or fewer" in err


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


def test_options_and_settings_in_any_order() -> None:
    for words in (
        ["swav", "--protocol", "linear", "lowshot", "--data.path", "photos", "--json", "x.json", "--views.global.scale", "0.3", "1.0"],
        ["--json=x.json", "--data.path=photos", "swav", "--views.global.scale", "0.3", "1.0", "--protocol", "linear", "lowshot"],
    ):
        verb, settings = read(manyviews.VERBS, ["evaluate", *words]) or (None, [])
        assert isinstance(verb, manyviews.Evaluate)
        assert (verb.model, verb.protocol, str(verb.json), str(verb.runs_dir)) == ("swav", ("linear", "lowshot"), "x.json", "runs")
        assert dict(split(settings)) == {"data.path": ["photos"], "views.global.scale": ["0.3", "1.0"]}


def test_a_search_space_may_be_given_in_parts() -> None:
    verb, settings = read(manyviews.VERBS, ["tune", "swav", "--space", "a=log:1:2", "b", "--train.steps=5", "--space=c"]) or (None, [])
    assert isinstance(verb, manyviews.Tune) and settings == ["--train.steps=5"]
    assert verb.space == ["a=log:1:2", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs", "--runs-dir", "empty"], ""),
        (["runs", "nothing"], "run=nothing: no such run"),
        (["resume", "nothing"], "run=nothing: no such run"),
        (["continue", "nothing", "--train.steps", "5"], "run=nothing: no such run"),
        (["report", "nothing"], "sweep=nothing: no such sweep"),
        (["pretrain", "swav-smal"], "recipe=swav-smal: unknown; did you mean swav-small"),
        (["tune", "swav-smal"], "recipe=swav-smal: unknown; did you mean swav-small"),
        ([*SMALL, "--data.path", "nowhere"], "data.path=nowhere: does not exist"),
        ([*SMALL, "--evaluate.path=nowhere"], "evaluate.path=nowhere: does not exist"),
        (["embed", "mine", "--to", "x", "--data.path", "nowhere"], "data.path=nowhere: does not exist"),
        ([*SMALL, "--method.temperatur", "1"], "method.temperatur: no such key; did you mean method.temperature"),
        ([*SMALL, "--views.local.cuont=1"], "views.local.cuont: no such key; did you mean views.local.count"),
        ([*SMALL, "--method.msak-ratio", "1"], "method.msak_ratio: no such key"),
        (["evaluate", "mine", "other"], "other: one word too many"),
        (["figure", "scors", "mine"], "figure=scors: unknown"),
        (["figure", "scores", "mine"], "model=mine: neither a run in runs"),
        (["evaluate", "mine"], "model=mine: neither a run in runs"),
        (["evaluate", "models:/mine@best"], "model=models:/mine@best: there is no registry"),
        (["embed", "mine", "--to", "x", "--data.path", "."], "model=mine: neither a run in runs"),
        (["evaluate", "mine", "--evaluate.knnk", "3"], "evaluate.knnk: no such key; did you mean evaluate.knn_k"),
        (["evaluate", "mine", "--protocol", "lin"], "protocol=lin: use one of 'knn', 'linear', 'lowshot'"),
        (["views", "swav-smal"], "recipe=swav-smal: unknown"),
        (["views", "swav", "--data.path=nowhere"], "data.path=nowhere: does not exist"),
        (["doctor", "swav-smal"], "recipe=swav-smal: unknown"),
        (["doctor", "--data.path", "nowhere"], "data.path=nowhere: does not exist"),
        (["tune", "swav-small", "--trials", "few"], "trials=few: use None or INT"),
        ([*SMALL, "--epochs", "3"], "epochs: no such key; did you mean train.epochs"),
        (["embed", "mine"], "data.path: missing"),
        (["pertrain", "swav"], "invalid choice: 'pertrain' is no verb; did you mean pretrain"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_before_torch_is_loaded(arguments: list[str], words: str, tmp_path: Path) -> None:
    code = f"import sys, manyviews; code = manyviews.main({arguments}); assert 'torch' not in sys.modules; sys.exit(code)"
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if words else 0), done.stderr
    assert done.stderr.startswith(f"error: {words}" if words else "")


def test_settings_are_those_that_the_classes_have() -> None:
    config = load_recipe("swav-small")
    expected = {"method": vars(config.method), "views": vars(config.views["global"]), "backbone": vars(config.backbone)}
    expected |= {group: vars(getattr(config, group)) for group in early.GROUPS}
    assert early.declared("swav-small") == {group: list(names) for group, names in expected.items()}
    assert set(early.declared()) == {field.name for field in dataclasses.fields(config)} - {"recipe"}


def test_settings_go_by_their_names_in_the_config() -> None:
    config = load_recipe("moco-v3-small")
    words = ["--train.no-deterministic", "--train.global_batch_size", "32", "--views.global.no-grayscale-first", "--views.global.flip=0"]
    first_and_second = {f"views.{group}.{key}" for group in ("first", "second") for key in ("grayscale_first", "flip")}
    assert keys(config, words) == {"train.deterministic", "train.global_batch_size"} | first_and_second
    on = override(config, {"train.deterministic": True, "views.global.grayscale_first": True})
    parsed = flatten(parse_settings(on, words, "manyviews"))
    assert [parsed[key] for key in sorted(keys(config, words))] == [False, 32, 0.0, False, 0.0, False]


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


@pytest.mark.parametrize(
    ("words", "on_path", "program"),
    [
        (["{bin}/manyviews"], True, "manyviews"),
        (["{bin}/manyviews"], False, "'{bin}/manyviews'"),
        (["python", "manyviews.py"], False, "python manyviews.py"),
        (["python", "-m", "manyviews"], False, "python -m manyviews"),
        (["python", "-m", "pytest"], False, "manyviews"),
    ],
)
def test_commands_are_printed_as_this_one_was_given(
    words: list[str], on_path: bool, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my bin"
    folder.mkdir()
    (folder / "manyviews").touch(mode=0o755)
    given = [word.replace("{bin}", str(folder)) for word in words]
    script = given[0] if len(given) == 1 else f"{given[-1].removesuffix('.py')}.py"
    monkeypatch.setattr(sys, "argv", [script, "runs", "a"])
    monkeypatch.setattr(sys, "orig_argv", [*(given if len(given) > 1 else ["python", *given]), "runs", "a"])
    monkeypatch.setenv("PATH", str(folder) if on_path else "")
    monkeypatch.chdir(tmp_path)
    program = program.replace("{bin}", str(folder))
    assert command("resume", "a b", runs_dir=tmp_path / "runs") == f"{program} resume 'a b'"
    assert command("runs", runs_dir=Path("my runs")) == f"{program} runs --runs-dir 'my runs'"


def test_a_server_is_an_address_and_a_database_a_command() -> None:
    assert printing.browse("http://tracking:5000") == "http://tracking:5000"
    assert printing.browse("sqlite:///my runs/mlflow.db").endswith("mlflow ui --backend-store-uri 'sqlite:///my runs/mlflow.db'")


def test_only_a_run_that_is_not_finished_can_be_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "images", 20)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    call = [*SMALL, "--data.path", str(folder), "--train.global-batch-size", "16", "--runs-dir", str(tmp_path / "runs"), "--run", "mine"]
    for status, resumes in (("interrupted", True), ("finished", False)):
        (tmp_path / "runs" / "mine" / "run.json").write_text(json.dumps({"status": status}))
        assert (f"resume mine --runs-dir {tmp_path / 'runs'}" in mistake(call, capsys)) == resumes


def test_views_draws_what_training_sees(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", 12)
    picture = tmp_path / "views.png"
    assert manyviews.main(["views", "swav-small", "--data.path", str(folder), "--images", "3", "--to", str(picture)]) == 0
    with Image.open(picture) as drawn:
        assert drawn.width > 600
        assert np.asarray(drawn.convert("L")).std() > 20  # pictures, not an empty page
