"""Studies: arms that can be run, what is kept, and claims that are told apart from noise."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from methods.parts.errors import ConfigError
from pipeline.config import RunConfig, flatten, to_yaml
from pipeline.resolve import resolve
from pipeline.run_folder import RunFolder, write_json
from tests.test_figures import metrics
from tuning import studies
from tuning.studies import BYOL, STUDIES, Study, StudyResults


@pytest.mark.parametrize("planned", STUDIES.values(), ids=STUDIES)
def test_the_arms_of_a_study_are_configurations_that_differ_in_what_they_say(planned: Study) -> None:
    flat = [flatten(planned.config(arm, 1)) for arm in planned.arms]
    searched = {key for arm in planned.arms for key in arm.settings}
    for first, other in itertools.pairwise(flat):
        differ = {key for key in first if first[key] != other[key]}
        assert differ and differ <= searched
    assert all(config["train.seed"] == 1 and not config["track.register"] for config in flat)
    resolve(planned.config(planned.arms[0], 0), 5000)


def test_claims_are_about_arms_and_figures_that_exist() -> None:
    for planned in STUDIES.values():
        arms, figures = {arm.name for arm in planned.arms}, {figure.key for figure in planned.figures}
        for claim in planned.claims:
            assert {claim.higher, claim.lower} <= arms and claim.figure in figures


def results(higher: list[float], lower: list[float]) -> StudyResults:
    return StudyResults(BYOL, {"fixed-target": {"linear": higher}, "random": {"linear": lower}})


def test_a_claim_holds_only_beyond_the_spread() -> None:
    claim = BYOL.claims[0]
    assert results([0.40, 0.42], [0.30, 0.31]).verdict(claim).startswith("holds (fixed-target 41.0 %, random 30.5 %, spread 1.4 %, n = 2)")
    assert results([0.40, 0.42], [0.39, 0.41]).verdict(claim).startswith("within the spread")
    assert results([0.30, 0.31], [0.40, 0.42]).verdict(claim).startswith("does not hold")
    assert results([0.40], [0.30]).verdict(claim).startswith("seen with one seed")
    assert results([0.40], []).verdict(claim) == "not measured yet"


class Trainer:
    """Stands in for the training of a run: writes what a run leaves behind."""

    def __init__(self, stop_at: int = 100) -> None:
        self.begun: list[str] = []
        self.resumed: list[str] = []
        self.stop_at = stop_at

    def pretrain(self, config: RunConfig, *, runs_dir: Path, run: str, console: Console) -> Any:
        self.begun.append(run)
        folder = RunFolder(runs_dir / run)
        folder.path.mkdir(parents=True)
        (folder.path / "config.yaml").write_text(to_yaml(config))
        score = 0.3 + 0.1 * (not run.startswith("random")) + 0.01 * config.train.seed
        metrics(folder.metrics, [{"step": 5, "knn": 0.1}, {"step": 10, "knn": score, "embedding_std": 0.08}])
        return self.ended(folder, "finished" if len(self.begun) < self.stop_at else "interrupted")

    def resume(self, folder: RunFolder, *, runs_dir: Path, console: Console) -> Any:
        self.resumed.append(folder.name)
        return self.ended(folder, "finished")

    def ended(self, folder: RunFolder, status: str) -> Any:
        write_json(folder.path / "run.json", {"name": folder.name, "status": status})
        return SimpleNamespace(status=status, message="stopped")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Study:
    """BYOL's study without its probe, which needs a trained backbone, and with two arms."""
    planned = replace(BYOL, arms=BYOL.arms[:2], figures=BYOL.figures[1:], claims=(replace(BYOL.claims[0], figure="knn"),), seeds=2)
    monkeypatch.setitem(studies.STUDIES, "byol-target", planned)
    return planned


def use(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.train import launch

    monkeypatch.setattr(launch, "pretrain", trainer.pretrain)
    monkeypatch.setattr(launch, "resume", trainer.resume)


def test_a_study_goes_on_where_it_was_interrupted(small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, console = Trainer(stop_at=3), Console(quiet=True)
    use(first, monkeypatch)
    page = studies.study("byol-target", runs_dir=tmp_path, console=console)
    assert first.begun == ["random-seed0", "fixed-target-seed0", "random-seed1"]
    assert "seen with one seed" in page.read_text()

    second = Trainer()
    use(second, monkeypatch)
    assert studies.study("byol-target", runs_dir=tmp_path, console=console) == page
    assert second.resumed == ["random-seed1"] and second.begun == ["fixed-target-seed1"]
    said = page.read_text()
    assert "| random | a random network, batch norm calibrated | 30.5 % ± 0.7 % (n = 2) | 0.08 ± 0 (n = 2) | 1.4 % |" in said
    assert "holds (fixed-target 40.5 %, random 30.5 %, spread 0.7 %, n = 2)" in said
    assert json.loads((page.parent / "study.json").read_text())["values"]["random"]["knn"] == pytest.approx([0.30, 0.31])
    assert (page.parent / "study.png").stat().st_size > 10_000


def test_runs_under_other_terms_are_not_mixed(small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Trainer(), monkeypatch)
    console = Console(quiet=True)
    studies.study("byol-target", runs_dir=tmp_path, console=console, seeds=1)
    with pytest.raises(ConfigError, match="random-seed0 ran with other settings"):
        studies.study("byol-target", runs_dir=tmp_path, console=console, seeds=1, settings={"train.steps": 99})


def test_an_unknown_study_or_setting_is_refused_before_any_run(tmp_path: Path) -> None:
    console = Console(quiet=True)
    with pytest.raises(ConfigError, match="study=byol: no such study; use one of byol-target, coke-bound"):
        studies.study("byol", runs_dir=tmp_path, console=console)
    with pytest.raises(ConfigError, match=r"method\.momentun: no such key"):
        studies.study("byol-target", runs_dir=tmp_path, console=console, settings={"method.momentun": 0.9})
    assert list(tmp_path.iterdir()) == []
