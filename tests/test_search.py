"""What a search decides before Ray is started: draws, refusals, rungs, scores, folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from methods.parts.errors import ConfigError
from pipeline.config import override
from pipeline.evaluate.features import effective_rank
from pipeline.recipes import load_recipe
from pipeline.run_folder import RunFolder
from tuning import sampling, search, sweep
from tuning.best import settings_line
from tuning.search import Asked
from tuning.space import parse_space

SWAV = override(load_recipe("swav-small"), {"data.path": "patches:per_photo=16", "train.global_batch_size": 32, "backbone.width": 0.125})
SPACE = ("method.temperature=log:0.05:0.5", "method.num_prototypes=choice:16,32,64")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep is written down, but none is run."""
    monkeypatch.setattr(search, "fit", lambda made, console: 0)
    monkeypatch.setattr(search, "room", lambda *asked: {"concurrent": 1, "cluster": False, "share": {"CPU": 0.25}})


def begin(tmp_path: Path, *, config=SWAV, space=SPACE, name: str = "s", **asked) -> sweep.Sweep:
    made, _ = search.tune(config, Asked(tuple(space), **asked), runs_dir=tmp_path, name=name, console=Console(quiet=True))
    return made


def trials(made: sweep.Sweep) -> list[dict]:
    return [trial.facts() for trial in made.trials()]


# ---------------------------------------------------------------------------- draws


def test_the_same_seed_draws_the_same_trials_whatever_else_is_searched() -> None:
    both, alone = parse_space(SPACE, SWAV), parse_space(SPACE[:1], SWAV)
    first = [sampling.random_values(both, 0, n) for n in range(20)]
    assert first == [sampling.random_values(both, 0, n) for n in range(20)]
    assert [v["method.temperature"] for v in first] == [sampling.random_values(alone, 0, n)["method.temperature"] for n in range(20)]
    assert first != [sampling.random_values(both, 1, n) for n in range(20)]
    assert len({v["method.temperature"] for v in first}) == 20
    many = np.log([sampling.random_values(alone, 0, n)["method.temperature"] for n in range(400)])
    assert abs(many.mean() - (np.log(0.05) + np.log(0.5)) / 2) < 0.1, "even on the log scale"


def test_a_sweep_is_written_down_before_anything_runs(tmp_path: Path) -> None:
    made = begin(tmp_path, trials=3, seeds=2, seed=5)
    facts, found = made.facts(), trials(made)
    assert (facts["kind"], facts["trials"], facts["seeds"], facts["score"], facts["mode"]) == ("sweep", 6, 2, "knn", "max")
    assert facts["space"]["method.temperature"]["text"] == "log:0.05:0.5"
    assert [t["number"] for t in found] == list(range(6))
    assert [t["seed"] for t in found] == [0, 1] * 3, "each setting with the same seeds: compared in pairs"
    assert found[0]["values"] == found[1]["values"] != found[2]["values"]
    assert found == trials(begin(tmp_path, trials=3, seeds=2, seed=5, name="again")) or all(
        a["values"] == b["values"] for a, b in zip(found, trials(sweep.Sweep(tmp_path / "again")), strict=True)
    )
    config = (made.trial(3).path / "config.yaml").read_text()
    assert "seed: 1" in config and "score: knn" in config and "register: false" in config
    assert RunFolder(made.trial(3).path).state()["status"] == "created"


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    found = trials(begin(tmp_path, search="grid", points=2))
    assert {(t["values"]["method.temperature"], t["values"]["method.num_prototypes"]) for t in found} == {
        (t, k) for t in (0.05, 0.5) for k in (16, 32, 64)
    }


def test_pbt_moves_within_the_range() -> None:
    knobs = parse_space(["method.temperature=log:0.05:0.5", "method.epsilon=choice:0.02,0.03,0.05"], SWAV)
    random, values = np.random.default_rng(0), {"method.temperature": 0.05, "method.epsilon": 0.02}
    for _ in range(200):
        before, values = values, sampling.explored(knobs, values, random)
        assert 0.05 <= values["method.temperature"] <= 0.5 and values["method.epsilon"] in (0.02, 0.03, 0.05)
    assert values != before


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"score": "loss"}, "a loss is not comparable across temperatures"),
        ({"score": "train_loss"}, "a loss is not comparable"),
        ({"score": "accuracy"}, "use knn, linear, rankme"),
        ({"search": "bayes"}, "--search bayes: unknown"),
        ({"scheduler": "hyperband"}, "--scheduler hyperband: unknown"),
        ({"trials": 0}, "--trials 0: use 1 or more"),
        ({"gpus": 2.0}, "0 < GPUS <= 1"),
        ({"search": "grid", "trials": 5}, "a grid tries all its combinations"),
        ({"grace": 500}, "not below the 250 steps of a trial"),
        ({"space": ("method.temperature=linear:-0.1:0.5",)}, "method.temperature=linear:-0.1:0.5: -0.1 cannot work"),
        ({"space": ("method.queue_length=choice:32,100",)}, "100 cannot work: method.queue_length=100: not a multiple"),
        ({"space": ("train.global_batch_size=choice:32,4096",)}, "larger than the .* training images"),
        ({"scheduler": "pbt"}, "method.num_prototypes: cannot change in mid-run"),
        ({"scheduler": "pbt", "seeds": 2, "space": SPACE[:1]}, "none is repeated"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path, asked: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        begin(tmp_path, **asked)
    assert not list(tmp_path.iterdir())


def test_optuna_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[tuning\]"'):
        begin(tmp_path, search="optuna")


def test_values_that_only_work_together_are_not_refused_and_a_pair_that_cannot_is_a_failed_trial(tmp_path: Path) -> None:
    space = ("method.queue_length=choice:48,64", "train.global_batch_size=choice:32,48")  # 48 of 48, 64 of 32
    found = trials(begin(tmp_path, space=space, search="grid", config=override(SWAV, {"data.num_shards": 4})))
    states = {(t["values"]["method.queue_length"], t["values"]["train.global_batch_size"]): t for t in found}
    assert {pair: t["status"] for pair, t in states.items()} == {
        (48, 48): "waiting", (64, 32): "waiting", (48, 32): "failed", (64, 48): "failed"
    }  # fmt: skip
    assert "not a multiple" in states[48, 32]["error"]


def test_no_labels_no_knn(tmp_path: Path) -> None:
    config = override(SWAV, {"data.held_out": 0.0})
    with pytest.raises(ConfigError, match="use --score rankme"):
        begin(tmp_path, config=config)
    assert "rank" in begin(tmp_path, config=config, score="rankme").facts()["score_words"]


def test_a_used_name(tmp_path: Path) -> None:
    begin(tmp_path, trials=1)
    with pytest.raises(ConfigError, match="name=s: already exists"):
        begin(tmp_path, trials=1)
    with pytest.raises(ConfigError, match="not a plain name"):
        begin(tmp_path, trials=1, name="../s")


# ---------------------------------------------------------------------------- rungs and scores


def test_rungs_come_after_the_warm_up_and_the_queue_and_leave_room() -> None:
    from tuning.schedulers import rungs

    assert rungs(50, 250) == [50, 150] and rungs(250, 250) == []
    config = override(SWAV, {"train.steps": 900, "evaluate.knn_every": 10})

    def first(**changes) -> int:
        return search.planned(override(config, changes), Asked(scheduler="asha"), 288, 320)["rungs"][0]

    assert first() == 100, "a ninth: two more rungs fit"
    assert first(**{"optim.warmup_epochs": 20}) == 180, "9 steps an epoch"
    assert first(**{"method.queue_length": 320, "method.queue_start_epoch": 30}) == 280, "270 until it fills, 10 until it is full"
    assert search.planned(config, Asked(grace=33), 288, 320)["rungs"] == [40, 120, 360]
    assert search.planned(config, Asked(scheduler="pbt", grace=300), 288, 320)["rungs"] == [300, 600]


def test_asha_goes_on_where_an_earlier_process_stopped() -> None:
    from types import SimpleNamespace

    from tuning.schedulers import Halving

    made = Halving(10, 90)
    for number, score in enumerate([0.5, 0.6, 0.7]):
        made.replay(number, [(10, score)])

    def asked(number: int, step: int, score: float) -> str:
        trial = SimpleNamespace(config={"number": number})
        made.on_trial_add(None, trial)
        return made.on_trial_result(None, trial, {"step": step, "score": score})

    assert asked(3, 10, 0.55) == "STOP"
    assert asked(4, 10, 0.9) == "CONTINUE"
    assert asked(1, 10, 0.1) == "CONTINUE", "its rung was decided in the first life"
    assert asked(5, 10, 0.65) == "STOP", "between the second and the third of five: not in the best third"


def test_rankme_is_the_number_of_directions_in_use() -> None:
    rows = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    assert 55 < effective_rank(rows) <= 64.01
    flat = rows[:, :3] @ torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert 1 < effective_rank(flat) < 3.1
    assert effective_rank(torch.ones(20, 8)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(rows[:10]) <= 10.01


def test_ranking_keeps_cut_trials_behind_finished_ones() -> None:
    def trial(number, status, score, step, temperature=0.1):
        values = {"method.temperature": temperature}
        return {"number": number, "status": status, "score": score, "step": step, "values": values, "seed": 0, "error": None}

    found = [trial(0, "stopped", 0.9, 50), trial(1, "finished", 0.5, 90), trial(2, "finished", 0.7, 90, 0.2), trial(3, "failed", None, 0)]
    found += [trial(4, "finished", 0.9, 90), trial(5, "finished", float("nan"), 90, 0.3)]
    assert [t["number"] for t in sweep.ranked(found)][:3] == [4, 2, 1]


def test_the_best_setting_as_a_command_line() -> None:
    from pipeline.cli.overrides import parse_settings

    values = {"method.temperature": 0.2, "views.local.scale": [0.1, 0.3], "method.hard_codes": True, "backbone.name": "resnet34"}
    line = settings_line(values)
    config = parse_settings(SWAV, line.split(), "manyviews pretrain")
    assert (config.method.temperature, config.views["local"].scale, config.backbone.name) == (0.2, (0.1, 0.3), "resnet34")
    assert config.method.hard_codes and dataclasses.is_dataclass(config)


def test_optuna_is_told_how_trials_end_and_goes_on_from_what_is_known() -> None:
    pytest.importorskip("optuna", reason="an extra: pip install -e '.[tuning]'")
    from tuning.schedulers import Optuna

    knobs = parse_space([*SPACE[:1], "method.num_prototypes=log:16:256", "views.local.scale=choice:[0.1,0.3],[0.2,0.5]"], SWAV)

    def asked(known: list[dict], count: int) -> tuple[list[dict], list[str]]:
        made, found = Optuna(knobs, 0, known), []
        for number in range(len(known), count):
            found.append(made.ask(number))
            state = ["finished", "running", "failed"][number % 3]
            made.tell(number, {"state": state} | ({} if state == "failed" else {"score": found[-1]["method.temperature"], "step": 50}))
        return found, [trial.state.name for trial in made.study.trials]

    first, states = asked([], 6)
    assert asked([], 6)[0] == first, "the same seed, the same trials"
    assert states == ["COMPLETE", "PRUNED", "FAIL"] * 2
    assert all(16 <= v["method.num_prototypes"] <= 256 and v["views.local.scale"] in ((0.1, 0.3), (0.2, 0.5)) for v in first)
    known = [
        {"values": v | {"views.local.scale": list(v["views.local.scale"])}, "score": 0.5, "step": 9, "status": "stopped"} for v in first
    ]
    again, states = asked(known, 8)
    assert states == ["PRUNED"] * 6 + ["COMPLETE", "PRUNED"] and not any(v in first for v in again)
