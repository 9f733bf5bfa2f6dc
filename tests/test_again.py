"""A run with workers that goes on: when its workers may begin before the driver has loaded anything slow, and when not."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pipeline.train.attend import WorkersLost
from pipeline.train.group import CPU_WORKER, Group, Shape, kept
from rich.console import Console

from methods.parts.errors import ConfigError
from pipeline.config import from_yaml, override, to_yaml
from pipeline.points import append_line, encode, read_points
from pipeline.recipes import load_recipe
from pipeline.runs import RunFolder, create_run
from pipeline.train import again, relay_actor
from pipeline.train.display import Display
from pipeline.train.prepare import prepare_again


@pytest.mark.parametrize(("workers", "status", "saved", "begins"), [
    ("2", "running", True, True),
    ("2", "finished", True, False),
    ("2", "running", False, False),  # its first weights may be another run's, which the driver looks up
    ("1:2", "running", True, False),  # how many there will be is not known yet
    ("64", "running", True, False),  # they do not fit now
])  # fmt: skip
def test_a_run_goes_on_with_workers_that_prepare_it_themselves(
    workers: str, status: str, saved: bool, begins: bool, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shape = begun_run(tmp_path, int(workers.split(":")[-1]), again=":" not in workers)
    folder.update(status=status)
    if not saved:
        (folder.checkpoints / "last.json").unlink()
    groups: list[Group] = []
    done = SimpleNamespace(step=3, complete=False)
    monkeypatch.setattr(relay_actor.Relay, "train", lambda self, settings, group: (None, ""))

    def attend(group: Group, folder: RunFolder, **how: Any) -> Any:
        groups.append(group)
        how["before"](2)
        how["screen"].update(3, loss=1.0)
        return done

    monkeypatch.setattr(again, "attend", attend)
    out = io.StringIO()
    outcome = again.resume(folder, console=Console(file=out, width=120))
    assert (outcome is not None) == bool(groups) == begins
    if outcome is not None:
        assert (groups[0].shape, groups[0].prepares) == (shape, True)
        assert (outcome.status, folder.state()["status"]) == ("interrupted", "interrupted")
        assert "2 workers go on from step 2" in out.getvalue() and "step 3/9  loss 1.000 (ln K 2.500)" in out.getvalue()
        assert [point["step"] for point in read_points(folder.path)] == [1, 2], "what lies behind the checkpoint is forgotten"
        groups[0].end()


def test_what_rank_0_refuses_ends_the_run_with_its_words(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = begun_run(tmp_path, 2)

    def refused(*_: Any, **__: Any) -> Any:
        raise ConfigError("data.path=photos: the images have changed since the run began")

    monkeypatch.setattr(relay_actor.Relay, "train", lambda self, settings, group: (None, ""))
    monkeypatch.setattr(again, "attend", refused)
    with pytest.raises(ConfigError, match="the images have changed"):
        again.resume(folder, console=Console(quiet=True))
    assert folder.state()["status"] == "failed" and "the images have changed" in folder.state()["message"]


def test_a_run_goes_on_with_the_images_it_began_with_or_not_at_all(tmp_path: Path) -> None:
    folder, _ = begun_run(tmp_path, 2)
    small = override(from_yaml(folder.config_text()), {"data.path": "patches:per_photo=8", "backbone.width": 0.125})
    (folder.path / "config.yaml").write_text(to_yaml(small))
    folder.update(fingerprint=prepare_again(folder).manifest.fingerprint)
    assert prepare_again(folder).config == small
    (folder.path / "config.yaml").write_text(to_yaml(override(small, {"data.path": "patches:per_photo=9"})))
    with pytest.raises(ConfigError, match=r"data\.path=patches:per_photo=9: the images have changed since the run began"):
        prepare_again(folder)


def test_a_run_that_another_process_works_on_is_left_alone(ray_local: None, tmp_path: Path) -> None:
    folder, _ = begun_run(tmp_path, 2)
    with folder.working(), pytest.raises(ConfigError, match=r"run=run: process \d+ on .* is training it; stop that one first"):
        again.resume(folder, console=Console(quiet=True))


@pytest.mark.parametrize("facts", [
    {"group": None},
    {"group": {"workers": 2, "of another version": True}},
    {"chance": ["no number", "ln K"]},
    {"global_batch_size": None},
])  # fmt: skip
def test_facts_that_another_version_wrote_are_not_relied_on(facts: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = begun_run(tmp_path, 2)
    folder.update(**facts)
    assert again.resume(folder, console=Console(quiet=True)) is None
    assert not folder.locked() and folder.state().get("pid") is None, "nothing was begun"


def test_lost_workers_that_ray_train_gives_up_are_started_by_a_driver_that_prepares_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said, calls = begun_run(tmp_path, 2)[0], io.StringIO(), []
    done = SimpleNamespace(step=9, complete=True)

    def lost(*_: Any, **__: Any) -> Any:
        raise WorkersLost("lost worker 1")

    monkeypatch.setattr(again, "attend", lost)
    monkeypatch.setattr("pipeline.train.prepare.prepare_again", lambda folder: f"prepared {folder.name}")
    monkeypatch.setattr(
        "pipeline.train.workers.train_with_workers", lambda ready, *_, **how: calls.append((ready, how["doubtful"])) or done
    )
    screen = Display(Console(file=said, width=120), total_steps=9, start_step=2, batch=4, chance=None)
    tracker = SimpleNamespace(wake=None, rewind=None)
    assert again._train(None, folder, tracker, screen, lambda: False) is done  # type: ignore[arg-type]
    assert calls == [("prepared run", True)] and "lost worker 1; starting again" in said.getvalue()


def begun_run(runs: Path, workers: int, again: bool = True) -> tuple[RunFolder, Shape]:
    """A run with a checkpoint at step 2 of 9, and a point behind it."""
    folder = create_run(runs, "run", "swav-small")
    shape = Shape(workers, CPU_WORKER, again=again, timeout_s=5.0, wait_s=5.0, max_restarts=1)
    folder.update(total_steps=9, global_batch_size=4, chance=[2.5, "ln K"], **kept(shape))
    (folder.path / "config.yaml").write_text(to_yaml(override(load_recipe("swav-small"), {"track.uri": "http://127.0.0.1:9"})))
    for step in (1, 2, 3):
        append_line(folder.path, encode(step, {"loss": 1.0}))
    (folder.checkpoints / "step-00000002").mkdir()
    (folder.checkpoints / "step-00000002" / "state.pt").touch()
    (folder.checkpoints / "last.json").write_text('{"folder": "step-00000002", "step": 2}')
    return folder, shape


def test_nothing_slow_is_loaded_for_it() -> None:
    code = "import json, sys, manyviews, pipeline.train.again; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout))
    assert not loaded & {"torch", "torchvision", "timm", "mlflow", "sklearn", "matplotlib", "pandas"}
