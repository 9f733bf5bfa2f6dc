"""The whole way on one machine: images in, a registered model out, through Ctrl-C and bad files. Kills: `make chaos`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from manyviews import main
from pipeline.data.sources.patches import open_patches
from tests.conftest import USERS_ENV

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parent.parent.parent
Verb = Callable[..., subprocess.CompletedProcess[str]]
TINY = [
    "--train.global-batch-size=32",
    "--backbone.width=0.125",
    "--method.projector-hidden=64",
    "--method.num-prototypes=16",
    "--evaluate.knn-every=10",
]


def manyviews(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command as a user gives it, in a process of its own."""
    command = [sys.executable, str(ROOT / "manyviews.py"), *arguments]
    done = subprocess.run(command, env=USERS_ENV, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def verb(ray_local: None) -> Verb:
    """A verb in this process, which need not start Ray and import torch anew: half the time of a short run."""
    return here


def here(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            returned = main(arguments)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert returned == code, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(arguments, returned, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of real patches as PNG and JPEG, two files that are no images, one stray text file."""
    root = tmp_path_factory.mktemp("images")
    source = open_patches("patches:per_photo=16")
    for row in source.read(np.arange(len(source))[: 19 * 16]):
        name = source.class_names[row.label]
        (root / name).mkdir(exist_ok=True)
        image = Image.open(io.BytesIO(row.image))
        image.resize((40 + row.id % 9, 44)).save(root / name / f"{row.id:05}.{'png' if row.id % 2 else 'jpg'}")
    (root / "coins" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (root / "coins" / "empty.png").write_bytes(b"")
    (root / "coins" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run `first` on the folder; returns the runs folder."""
    runs = tmp_path_factory.mktemp("runs")
    done = manyviews(
        "pretrain", "swav-small", f"--data.path={folder}", f"--runs-dir={runs}", "--run=first", "--train.steps=30", *TINY,
        f"--json={runs / 'first.json'}",
    )  # fmt: skip
    assert "step 30/30" in done.stdout
    assert "ln K" in done.stdout
    return runs


def test_a_run_leaves_a_table_pictures_points_and_a_model(finished: Path) -> None:
    said = json.loads((finished / "first.json").read_text())
    assert said["status"] == "finished"
    assert set(said["scores"]) >= {"raw_l2", "raw_cosine", "untrained", "untrained_calibrated", "trained"}
    assert 1.5 / 19 < said["scores"]["trained"] <= 1, "better than guessing"
    run = finished / "first"
    pictures = {"views.png", "curves.png", "neighbours.png", "scores.png", "clusters.png", "cluster_sizes.png", "patch_pca.png"}
    assert {p.name for p in run.glob("figures/*.png")} == pictures
    losses = [json.loads(line)["metrics"].get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss is not None]) >= 3


def test_bad_images_are_listed_and_stray_files_skipped(finished: Path) -> None:
    listed = [json.loads(line) for line in (finished / "first" / "bad_images.jsonl").read_text().splitlines()]
    assert {Path(row["path"]).name for row in listed} == {"broken.jpg", "empty.png"}
    assert all(row["reason"] for row in listed)


def test_the_registered_model_embeds_bytes_in_a_process_of_its_own(verb: Verb, finished: Path, folder: Path, tmp_path: Path) -> None:
    images = [next(folder.glob(f"coffee/*.{kind}")) for kind in ("png", "jpg")]
    big = tmp_path / "big.jpg"
    Image.open(images[0]).convert("RGB").resize((400, 300)).save(big)
    code = (
        "import sys, json, pathlib, mlflow, pandas as pd\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/swav-small@best')\n"
        "frame = pd.DataFrame({'image': [pathlib.Path(p).read_bytes() for p in sys.argv[2:]]})\n"
        "print(json.dumps([list(map(float, row)) for row in model.predict(frame)]))\n"
    )
    call = [sys.executable, "-c", code, f"sqlite:///{finished / 'mlflow.db'}", *map(str, [*images, big])]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert rows.shape[0] == 3
    assert np.isfinite(rows).all()
    verb("embed", "first", f"--runs-dir={finished}", f"--data.path={folder}", f"--to={tmp_path / 'features'}")
    table = pd.concat(pq.read_table(p).to_pandas() for p in sorted((tmp_path / "features").glob("*.parquet")))
    ours = table.set_index("path").loc[[str(p) for p in images], "embedding"]
    np.testing.assert_allclose(np.stack(list(ours)), rows[:2], atol=1e-4)
    assert len(table) == 19 * 16


def test_mlflow_holds_the_curves_and_no_run_is_left_running(finished: Path) -> None:
    from pipeline.tracking.run_tracker import mlflow_client

    client = mlflow_client(f"sqlite:///{finished / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("manyviews")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs if run.info.run_name == "first"] == ["FINISHED"]
    run = next(run for run in runs if run.info.run_name == "first")
    assert run.data.params["method.num_prototypes"] == "16"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")][-1] == 30
    assert [m.step for m in client.get_metric_history(run.info.run_id, "nmi")] == [0, 10, 20, 30]
    assert 0 < run.data.metrics["nmi"] <= 1 and run.data.metrics["cluster_max"] >= 1
    assert {"clusters.png", "cluster_sizes.png"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
    version = client.get_model_version_by_alias("swav-small", "best")
    assert version.tags["recipe"] == "swav-small"


def test_evaluate_by_run_and_by_registered_name_agree_with_the_run(verb: Verb, finished: Path, folder: Path, tmp_path: Path) -> None:
    scores = json.loads((finished / "first" / "evaluation.json").read_text())
    for reference, extra in (("first", []), ("models:/swav-small@best", [f"--data.path={folder}"])):
        verb("evaluate", reference, f"--runs-dir={finished}", f"--json={tmp_path / 'scores.json'}", *extra)
        again = json.loads((tmp_path / "scores.json").read_text())
        assert again["trained"] == pytest.approx(scores["trained"], abs=1e-6)
        assert again["protocol"] == scores["protocol"]


def test_probes_of_a_run(verb: Verb, finished: Path, tmp_path: Path) -> None:
    """Trained and untrained, with settings and spread; the kNN is left out unless asked for."""
    asked = ("--protocol", "lowshot", "linear", "--evaluate.lowshot-images", "1", "2", "--evaluate.lowshot-draws=3")
    said = verb("evaluate", "first", f"--runs-dir={finished}", f"--json={tmp_path / 'scores.json'}", *asked).stdout
    found = json.loads((tmp_path / "scores.json").read_text())
    assert set(found) == {"model", "linear", "lowshot"} and "lowshot top-1" in said and "kNN" not in said
    keys = {f"{name}_{count}{end}" for name in ("trained", "untrained") for count in (1, 2) for end in ("", "_spread")}
    assert keys <= set(found["lowshot"]) and "3 draws" in found["lowshot"]["protocol"]
    assert 0 < found["linear"]["trained"] <= 1 and found["linear"]["split"] == "held-out"
    message = verb("evaluate", "first", f"--runs-dir={finished}", "--protocol=lowshot", "--evaluate.lowshot-images=9999", code=2).stderr
    assert "evaluate.lowshot_images: 9999 asked for" in message


def test_continue_starts_a_new_phase_from_the_full_state_and_a_warm_start_from_weights(verb: Verb, finished: Path, folder: Path) -> None:
    common = [f"--runs-dir={finished}", "--track.no-register"]
    verb("continue", "first", "--run=second", "--train.steps=10", *common)
    state = json.loads((finished / "second" / "run.json").read_text())
    assert (state["status"], state["step"]) == ("finished", 10)
    assert "first_epoch: 4" in (finished / "second" / "config.yaml").read_text()  # 30 steps of 8 or 9 an epoch
    assert "run=first: it is finished" in verb("resume", "first", f"--runs-dir={finished}", code=2).stderr
    verb("pretrain", "swav-small", f"--data.path={folder}", "--run=third", "--train.steps=2", "--backbone.init=first", *TINY, *common)
    other = ["--backbone.init=first", "--backbone.name=resnet34", "--run=fourth"]
    assert "do not fit" in verb("pretrain", "swav-small", f"--data.path={folder}", *TINY, *common, *other, code=2).stderr


def test_a_phase_at_double_resolution_trains_larger_positions_with_a_gram_teacher(verb: Verb, folder: Path, tmp_path: Path) -> None:
    common = [f"--runs-dir={tmp_path}", "--track.no-register"]
    tiny = ["--train.global-batch-size=32", "--backbone.depth", "1", "--method.num-prototypes=16", "--evaluate.knn-every=10"]
    verb("pretrain", "dinov2-small", f"--data.path={folder}", "--run=low", "--train.steps=10", *tiny, *common)
    gram = ["--method.gram-weight=2", "--method.gram-refresh-steps=2"]
    phase = ["--phase=high-resolution", "--train.steps=4", "--train.keep-every=4", *gram]
    said = verb("continue", "low", "--run=high", *phase, *common).stdout
    assert "2 x 64 px" in said and "2 x 32 px" in said and "random weights" not in said
    assert "steps_per_epoch: 3" in (tmp_path / "high" / "config.yaml").read_text()  # 4 of 10 steps, of 8 an epoch
    low, start, end = (
        torch.load(tmp_path / run / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)["method"]
        for run, step in (("low", 10), ("high", 0), ("high", 4))
    )
    for name in ("backbone.pos_embed", "teacher.backbone.pos_embed"):
        grid = low[name][:, 1:].reshape(1, 4, 4, -1).movedim(-1, 1)
        wide = F.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True).movedim(1, -1).reshape(1, 64, -1)
        torch.testing.assert_close(start[name], torch.cat([low[name][:, :1], wide], dim=1))
        assert not torch.equal(end[name], start[name])
    assert torch.equal(start["teacher.head.mlp.0.weight"], low["teacher.head.mlp.0.weight"])
    points = [json.loads(line)["metrics"] for line in (tmp_path / "high" / "metrics.jsonl").read_text().splitlines()]
    assert any(point.get("gram", 0) > 0 for point in points)
    verb("embed", "high", f"--data.path={folder}", f"--to={tmp_path / 'features'}", f"--runs-dir={tmp_path}")  # at the new size


def test_too_many_bad_images_stop_the_run_with_their_count(verb: Verb, folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "images"
    bad.mkdir()
    for i, path in enumerate(sorted(folder.glob("*/*.jpg"))[:60]):
        (bad / f"{i:03}.jpg").write_bytes(path.read_bytes()[: 10 if i % 10 == 0 else None])
    done = verb(
        "pretrain", "swav-small", f"--data.path={bad}", f"--runs-dir={tmp_path}", "--run=bad", "--train.steps=5", *TINY, code=1
    )  # fmt: skip
    assert "cannot be decoded, more than data.max_bad_fraction=0.01 allows" in done.stderr
    assert json.loads((tmp_path / "bad" / "run.json").read_text())["status"] == "failed"


def test_ctrl_c_leaves_a_whole_checkpoint_and_resume_finishes(verb: Verb, folder: Path, tmp_path: Path) -> None:
    call = ["pretrain", "swav-small", f"--data.path={folder}", f"--runs-dir={tmp_path}", "--run=stopped", "--train.steps=400", *TINY]
    call += ["--track.no-register", "--train.checkpoint-every=1000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "manyviews.py"), *call],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    points = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and (not points.exists() or '"loss"' not in points.read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 1, said
    assert " resume stopped" in said
    assert "Traceback" not in said
    step = json.loads((tmp_path / "stopped" / "checkpoints" / "last.json").read_text())["step"]
    assert 10 <= step < 400
    listed = verb("runs", f"--runs-dir={tmp_path}").stdout
    assert "interrupted" in listed
    text = (tmp_path / "stopped" / "config.yaml").read_text()
    (tmp_path / "stopped" / "config.yaml").write_text(text.replace("steps: 400", f"steps: {step + 5}"))
    assert f"from step {step}" in verb("resume", "stopped", f"--runs-dir={tmp_path}").stdout
