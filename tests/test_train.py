"""The loop and what surrounds it: accumulation, guards, checkpoints, display, run folders."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from methods.parts.contract import Method, MethodConfig, ParamGroup, StepOutput
from methods.parts.errors import ConfigError
from methods.parts.hints import Hints
from methods.parts.views import CropGroup
from pipeline import checkpoint
from pipeline.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.data.crops import COLUMNS
from pipeline.data.loader import Batch, DecodeFailure
from pipeline.resolve import resolve
from pipeline.run_folder import RunFolder, create_run, find_run, list_runs
from pipeline.storage.place import Place
from pipeline.train.health import HealthMonitor, TrainingAborted, check_finite
from pipeline.train.loop import Trainer
from pipeline.train.optim import build_optimizer
from pipeline.train.progress import Display

VIEWS = {"global": CropGroup(count=2, size=8, jitter=(0, 0, 0, 0), grayscale=0, blur=0, flip=0)}


class Toy(Method):
    """Pulls two views of an image together; records every hook."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
        self.calls: list[str] = []
        self.broken_at = -1

    def start_epoch(self, progress) -> None:
        self.calls.append(f"start {progress.epoch}")

    def before_step(self, progress) -> None:
        self.calls.append(f"before {progress.step}")

    def training_step(self, views, progress, masks=None) -> StepOutput:
        a, b = (self.backbone(crop) for crop in views.crops)
        loss = (1 - nn.functional.cosine_similarity(a, b)).mean()
        if progress.step == self.broken_at:
            loss = loss * math.nan
        return StepOutput(loss=loss, metrics={"micro": float(progress.micro_step)}, outputs={"ids": views.image_ids})

    def after_step(self, outputs, progress) -> None:
        self.calls.append(f"after {progress.step} {len(outputs)}")

    def end_epoch(self, progress) -> None:
        self.calls.append(f"end {progress.epoch}")

    def param_groups(self):
        return [ParamGroup(params=list(self.backbone.parameters()))]

    def evaluation_backbone(self):
        return self.backbone


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MethodConfig):
    pass


def config(**train: object) -> RunConfig:
    settings = {"global_batch_size": 8, "steps": 6, "log_every": 2, "checkpoint_every": 2, "precision": "float32"} | train
    return RunConfig(
        data=DataConfig(num_shards=4),
        views=VIEWS,
        method=ToyConfig(),
        optim=OptimConfig(name="sgd", base_lr=0.01, weight_decay=0),
        train=TrainConfig(**settings),
    )


def batches(steps: range, bad: dict[int, list[DecodeFailure]] | None = None) -> Iterator[Batch]:
    for step in steps:
        rng = np.random.default_rng(step)
        crops = torch.from_numpy(rng.integers(0, 255, (8, 2, 8, 8, 3), dtype=np.uint8))
        table = np.zeros((8, 2, len(COLUMNS)), np.float32)
        ids = torch.arange(8)
        yield Batch(
            crops={"global": crops}, tables={"global": table}, ids=ids, labels=ids, epoch=0, step=step, bad=(bad or {}).get(step, [])
        )


def trainer(folder: Path, run: RunConfig, method: Toy | None = None, **changes: object) -> tuple[Trainer, list[tuple[int, dict]]]:
    method = method or Toy()
    resolved = resolve(run, 24)
    points: list[tuple[int, dict]] = []
    console = Console(file=io.StringIO())
    shown = Display(console, total_steps=resolved.facts.total_steps, start_step=0, batch=8, chance=None)
    made = Trainer(
        config=run,
        resolved=resolved,
        method=method,
        optimizer=build_optimizer(run.optim, method.param_groups()),
        folder=create_run(folder, None, "toy"),
        device=torch.device("cpu"),
        precision=torch.float32,
        reporter=shown,
        report=lambda step, metrics: points.append((step, dict(metrics))),
        images=24,
        **changes,
    )
    return made, points


def test_hooks_run_once_a_step_and_epoch_and_points_come_every_log_step(tmp_path: Path) -> None:
    made, points = trainer(tmp_path, config())
    made.run(batches(range(6)))
    assert made.method.calls[:6] == ["start 0", "before 0", "after 0 1", "before 1", "after 1 1", "before 2"]
    epochs = [call for call in made.method.calls if call.startswith(("start", "end"))]
    assert epochs == ["start 0", "end 0", "start 1", "end 1"]
    assert [step for step, _ in points] == [2, 4, 6]
    assert all(math.isfinite(metrics["loss"]) and metrics["lr"] > 0 for _, metrics in points)


def test_a_batch_of_another_step_is_refused(tmp_path: Path) -> None:
    """The stream begins before the checkpoint is loaded: it must have begun where that one ends."""
    made, _ = trainer(tmp_path, config())
    with pytest.raises(RuntimeError, match="batch of step 2, but that of step 0 is due"):
        made.run(batches(range(2, 6)))


def test_accumulation_is_exact(tmp_path: Path) -> None:
    """Two and four micro-batches give the weights of one, to rounding; hooks still run once a step."""
    ends = []
    for parts in (1, 2):
        made, _ = trainer(tmp_path, config(accumulation_steps=parts))
        made.run(batches(range(6)))
        ends.append(made.method.backbone[1].weight.detach().double())
        assert made.method.calls.count("before 3") == 1
        assert f"after 3 {parts}" in made.method.calls
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=0)
    assert not torch.equal(ends[0], Toy().backbone[1].weight.double())


def test_a_loss_that_is_no_number_stops_with_step_and_remedy_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    method = Toy()
    method.broken_at = 4
    made, _ = trainer(tmp_path, config(), method)
    with pytest.raises(TrainingAborted, match=r"loss is nan at step 5; the checkpoint of step 4 is good\. Try a lower optim\.base_lr"):
        made.run(batches(range(6)))
    state = checkpoint.load(checkpoint.pointed_to(made.folder.checkpoints))
    assert state["position"]["step"] == 4
    assert all(bool(value.isfinite().all()) for value in state["method"].values())


def test_which_step_broke_is_found_between_points() -> None:
    check_finite([1.0, 2.0], 1, None)
    with pytest.raises(TrainingAborted, match="at step 12; there is no checkpoint yet"):
        check_finite([1.0, math.inf, math.nan], 11, None)


def test_stop_leaves_a_whole_checkpoint_from_which_the_rest_is_bit_equal(tmp_path: Path) -> None:
    whole, _ = trainer(tmp_path, config())
    whole.run(batches(range(6)))
    first, _ = trainer(tmp_path, config(), stop=lambda: first.position.step == 3)
    first.run(batches(range(6)))
    assert first.position.step == 3
    second, _ = trainer(tmp_path, config())
    second.restore(checkpoint.load(checkpoint.pointed_to(first.folder.checkpoints)))
    second.run(batches(range(3, 6)))
    assert checkpoint.state_hash(second.state()) == checkpoint.state_hash(whole.state())
    assert checkpoint.state_hash(first.state()) != checkpoint.state_hash(whole.state())


def test_best_by_knn_is_kept_beside_last_and_every_nth(tmp_path: Path) -> None:
    accuracies = iter([0.1, 0.3, 0.9, 0.5])
    run = config(keep_every=2)
    made, points = trainer(tmp_path, run, online=lambda backbone: {"knn": next(accuracies)})
    object.__setattr__(made.resolved, "knn_every", 2)
    made.run(batches(range(6)))
    assert checkpoint.pointed_to(made.folder.checkpoints, "best").name == "step-00000004"
    assert checkpoint.pointed_to(made.folder.checkpoints).name == "step-00000006"
    assert set(made.folder.checkpoints.folders()) == {"step-00000002", "step-00000004", "step-00000006"}
    assert [metrics["knn"] for _, metrics in points if "knn" in metrics] == [0.1, 0.3, 0.9, 0.5]
    assert (made.position.best_knn, made.position.best_step) == (0.9, 4)


def test_bad_images_are_counted_once_and_too_many_stop_the_run(tmp_path: Path) -> None:
    one, two = DecodeFailure(3, "a.jpg", "truncated"), DecodeFailure(4, "b.jpg", "empty")
    run = config()
    run = RunConfig(**{**vars(run), "data": DataConfig(num_shards=4, max_bad_fraction=0.05)})
    made, _ = trainer(tmp_path, run)
    made.run(batches(range(6), {0: [one], 3: [one]}))
    assert [json.loads(line)["path"] for line in made.folder.bad_images.read().splitlines()] == ["a.jpg"]
    again, _ = trainer(tmp_path, run)
    with pytest.raises(TrainingAborted, match=r"2 of 24 images cannot be decoded, more than data\.max_bad_fraction=0\.05 allows .*b\.jpg"):
        again.run(batches(range(6), {0: [one], 3: [two]}))


# ---------------------------------------------------------------------------- guards


STUCK = Hints(chance_loss=(math.log(64), "ln K"), uniform_metric="code_entropy", remedies="try something")


def test_a_loss_at_chance_is_warned_of_once_after_the_patience() -> None:
    guards = HealthMonitor(STUCK, patience_steps=10)
    stuck = {"loss": 0.99 * math.log(64), "code_entropy": 0.99, "embedding_std": 0.8}
    assert list(guards.warnings(9, stuck)) == []
    (warning,) = guards.warnings(10, stuck)
    assert "sticks at ln K" in warning
    assert "try something" in warning
    assert list(guards.warnings(11, stuck)) == []
    assert list(HealthMonitor(STUCK, 10).warnings(10, stuck | {"loss": 3.0})) == []


def test_a_part_of_the_loss_at_chance_is_warned_of() -> None:
    parts = Hints(chance_parts={"cls_loss": (math.log(64), "ln K of CLS")}, remedies="try something")
    stuck = {"loss": 9.0, "cls_loss": 0.99 * math.log(64), "embedding_std": 0.8}
    (warning,) = HealthMonitor(parts, 10).warnings(10, stuck)
    assert "sticks at ln K of CLS: 4.117 of 4.159" in warning
    assert list(HealthMonitor(parts, 10).warnings(9, stuck)) == []
    assert list(HealthMonitor(parts, 10).warnings(10, stuck | {"cls_loss": 3.0})) == []


def test_collapsed_embeddings_are_warned_of() -> None:
    (warning,) = HealthMonitor(STUCK, 10).warnings(5, {"loss": 1.0, "embedding_std": 0.01})
    assert "embeddings collapse" in warning


def test_targets_of_a_handful_of_prototypes_are_warned_of_without_a_chance_loss() -> None:
    guards = HealthMonitor(Hints(remedies="try something"), 10)
    assert list(guards.warnings(9, {"loss": 1.0, "prototypes_used": 0.01})) == []
    assert list(guards.warnings(10, {"loss": 1.0, "prototypes_used": 0.5})) == []
    (warning,) = guards.warnings(11, {"loss": 1.0, "prototypes_used": 0.03})
    assert "uses 3 % of the prototypes" in warning
    assert "try something" in warning


# ---------------------------------------------------------------------------- checkpoints and run folders


def test_a_failed_write_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place.of(tmp_path)
    checkpoint.save(place, {"a": torch.ones(3)}, step=1)

    def full(state: object, file: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(checkpoint.DiskFull, match=r"checkpoint of step 2 could not be written .*MB free.*No space left"):
        checkpoint.save(place, {"a": torch.zeros(3)}, step=2, keep_every=1)
    assert checkpoint.pointed_to(place).name == "step-00000001"
    assert torch.equal(checkpoint.load(checkpoint.pointed_to(place))["a"], torch.ones(3))
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", "last.json"}


def test_a_run_tells_of_a_checkpoint_when_it_is_whole_and_ends_where_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = trainer(tmp_path, config())
    write = torch.save

    def full_from_step_4(content: dict, file: object) -> None:
        if content["position"]["step"] >= 4:
            raise OSError(28, "No space left on device")
        write(content, file)

    monkeypatch.setattr(torch, "save", full_from_step_4)
    with pytest.raises(checkpoint.DiskFull, match="checkpoint of step 4"):
        made.run(batches(range(6)))
    assert made.position.step == 6, "it is told by the next save"
    assert made.folder.state()["step"] == checkpoint.last_step(made.folder.checkpoints) == 2


def test_leftovers_of_a_killed_write_are_ignored_and_removed(tmp_path: Path) -> None:
    place = Place.of(tmp_path)
    checkpoint.save(place, {"a": 1}, step=1)
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}").mkdir()  # never pointed to
        (tmp_path / f"step-0000000{step}" / "labels-0.pt").touch()
    assert checkpoint.pointed_to(place).name == "step-00000001"
    folder = checkpoint.save(place, {"a": 2}, step=3, keep_every=2)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000003", "last.json"}
    assert [p.name for p in Path(folder.uri).iterdir()] == ["state.pt"]


def test_a_checkpoint_that_is_pointed_to_is_never_written_to(tmp_path: Path) -> None:
    """A trial takes over the state of another at the same step: its own must stay whole until the new one is."""
    place = Place.of(tmp_path)
    checkpoint.save(place, {"a": 1}, step=4, best=True)
    for value in (2, 3):
        folder = checkpoint.save(place, {"a": value}, step=4)
        assert (checkpoint.load(folder)["a"], checkpoint.last_step(place)) == (value, 4)
        assert checkpoint.load(checkpoint.pointed_to(place, "best"))["a"] == 1
        assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "step").mkdir()
    torch.save({"a": Evil()}, tmp_path / "step" / "state.pt")
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.load(Place.of(tmp_path / "step"))


def test_hash_sees_every_value_but_not_the_memory_layout() -> None:
    x = torch.randn(2, 3, 4, 4)
    base = checkpoint.state_hash({"x": x, "step": 3})
    assert checkpoint.state_hash({"step": 3, "x": x.to(memory_format=torch.channels_last)}) == base
    changed = x.clone()
    changed[1, 2, 3, 3] += 1e-6
    assert checkpoint.state_hash({"x": changed, "step": 3}) != base
    assert checkpoint.state_hash({"x": x, "step": 4}) != base


def test_run_folders_know_whether_a_process_is_at_work(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "mine", "toy")
    with folder.working():
        assert folder.state()["status"] == "running"
        with pytest.raises(ConfigError, match=r"run=mine: process \d+ on .* is training it"), RunFolder(folder.path).working():
            pass
    assert folder.state()["status"] == "interrupted", "its process let go without a word"
    folder.update(status="finished")
    assert find_run("mine", tmp_path).state()["status"] == "finished"
    assert find_run(str(folder.path), Path("elsewhere")).path == folder.path
    assert [f.name for f in list_runs(tmp_path)] == ["mine"]
    with pytest.raises(ConfigError, match="did you mean mine"):
        find_run("mime", tmp_path)


def test_display_without_a_terminal_prints_a_few_whole_lines() -> None:
    out = io.StringIO()
    with Display(Console(file=out), total_steps=1000, start_step=0, batch=8, chance=(4.16, "ln K")) as display:
        for step in range(1, 1001):
            display.update(step, loss=3.0, knn=0.5 if step > 500 else None)
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[-1].startswith("step 1000/1000")
    assert "loss 3.000 (ln K 4.160)" in lines[0]
    assert "kNN 50.0 %" in lines[-1]
    assert "\x1b" not in out.getvalue()


def test_display_tells_no_rate_and_no_end_of_one_step() -> None:
    out = io.StringIO()
    with Display(Console(file=out), total_steps=2, start_step=0, batch=8, chance=None) as display:
        display.update(1, loss=3.0)
        time.sleep(0.01)
        display.update(2, loss=2.0)
    first, second = out.getvalue().splitlines()[:2]
    assert first.split() == ["step", "1/2", "loss", "3.000"]
    assert "images/s" in second and "eta" in second
