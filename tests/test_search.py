"""What a search decides before Ray is started: draws, refusals, rungs, scores, folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from ray.tune import Tuner
from ray.tune.experiment import Trial as TuneTrial
from rich.console import Console

from methods.parts.errors import ConfigError
from pipeline.config import override
from pipeline.evaluate.features import effective_rank
from pipeline.recipes import load_recipe
from pipeline.run_folder import RunFolder
from pipeline.storage.place import Place
from tests.sweeps import trial, write_sweep
from tuning import sampling, search, sweep
from tuning.best import settings_line
from tuning.callback import SweepCallback, outcome
from tuning.results import rank
from tuning.schedulers import OptunaTrials, explore, make_scheduler, task_of
from tuning.search import TuneArgs
from tuning.space import parse_space
from tuning.trainable import TrialProcess, resolve_pointer
from tuning.tuner import new_tuner, trial_name

SWAV = override(load_recipe("swav-small"), {"data.path": "patches:per_photo=16", "train.global_batch_size": 32, "backbone.width": 0.125})
SPACE = ("method.temperature=log:0.05:0.5", "method.num_prototypes=choice:16,32,64")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep is written down, but none is run."""
    monkeypatch.setattr(search, "fit", lambda made, console: 0)
    monkeypatch.setattr(search, "plan_resources", lambda *asked: {"concurrent": 1, "cluster": False, "share": {"CPU": 0.25}, "tasks": 2})


def begin(tmp_path: Path, *, config=SWAV, space=SPACE, name: str = "s", **asked) -> sweep.Sweep:
    made, _ = search.tune(config, TuneArgs(tuple(space), **asked), runs_dir=tmp_path, name=name, console=Console(quiet=True))
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
    facts, found = made.facts, trials(made)
    assert (facts["kind"], facts["trials"], facts["seeds"], facts["score"], facts["mode"]) == ("sweep", 6, 2, "knn", "max")
    assert facts["space"]["method.temperature"]["text"] == "log:0.05:0.5"
    assert [t["number"] for t in found] == list(range(6))
    assert [t["seed"] for t in found] == [0, 1] * 3, "each setting with the same seeds: compared in pairs"
    assert found[0]["values"] == found[1]["values"] != found[2]["values"]
    assert found == trials(begin(tmp_path, trials=3, seeds=2, seed=5, name="again")) or all(
        a["values"] == b["values"] for a, b in zip(found, trials(sweep.Sweep.read(tmp_path / "again")), strict=True)
    )
    config = (made.trial(3).folder / "config.yaml").read_text()
    assert "seed: 1" in config and "score: knn" in config and "register: false" in config
    assert RunFolder(made.trial(3).folder).state()["status"] == "created"


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    found = trials(begin(tmp_path, search="grid", points=2))
    assert {(t["values"]["method.temperature"], t["values"]["method.num_prototypes"]) for t in found} == {
        (t, k) for t in (0.05, 0.5) for k in (16, 32, 64)
    }


def test_pbt_moves_within_the_range() -> None:
    params = parse_space(["method.temperature=log:0.05:0.5", "method.epsilon=choice:0.02,0.03,0.05"], SWAV)
    random, values = np.random.default_rng(0), {"method.temperature": 0.05, "method.epsilon": 0.02}
    for _ in range(200):
        before, values = values, sampling.perturb(params, random, values)
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
        ({"scheduler": "pbt", "search": "optuna", "space": SPACE[:1]}, "Optuna is not installed|pbt chooses new values itself"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path, asked: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        begin(tmp_path, **asked)
    assert not list(tmp_path.iterdir())


def test_optuna_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"-m pip install -e '?\S+\[tuning\]'?`"):
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
    assert "rank" in begin(tmp_path, config=config, score="rankme").facts["score_words"]


def test_a_used_name(tmp_path: Path) -> None:
    begin(tmp_path, trials=1)
    with pytest.raises(ConfigError, match="name=s: already exists"):
        begin(tmp_path, trials=1)
    with pytest.raises(ConfigError, match="not a plain name"):
        begin(tmp_path, trials=1, name="../s")


# ---------------------------------------------------------------------------- rungs and scores


def test_rungs_come_after_the_warm_up_and_the_queue_and_leave_room() -> None:
    from tuning.schedulers import asha_rungs

    assert asha_rungs(50, 250) == [50, 150] and asha_rungs(250, 250) == []
    config = override(SWAV, {"train.steps": 900, "evaluate.knn_every": 10})

    def first(**changes) -> int:
        return search.plan_schedule(override(config, changes), TuneArgs(scheduler="asha"), 288, 320)["rungs"][0]

    assert first() == 100, "a ninth: two more rungs fit"
    assert first(**{"optim.warmup_epochs": 20}) == 180, "9 steps an epoch"
    assert first(**{"method.queue_length": 320, "method.queue_start_epoch": 30}) == 280, "270 until it fills, 10 until it is full"
    assert search.plan_schedule(config, TuneArgs(grace=33), 288, 320)["rungs"] == [40, 120, 360]
    assert search.plan_schedule(config, TuneArgs(scheduler="pbt", grace=300), 288, 320)["rungs"] == [300, 600]


def test_asha_keeps_its_rungs_over_a_resume(tmp_path: Path) -> None:
    """Ray Tune's snapshot leaves the scheduler out; the state of the callback holds it."""
    facts = {"scheduler": "asha", "rungs": [10], "total_steps": 30}

    def asha() -> Any:
        return make_scheduler(sweep.Sweep(tmp_path, facts), [])

    def decisions(scheduler: Any, scores: dict[int, float]) -> list[str]:
        found = []
        for number, score in scores.items():
            trial = TuneTrial("none", config={}, trial_id=str(number), stub=True)
            scheduler.on_trial_add(None, trial)
            found.append(scheduler.on_trial_result(None, trial, {"step": 10, "score": score}))
        return found

    first = SweepCallback(tmp_path, asha())
    assert decisions(first.scheduler, {0: 0.5, 1: 0.6, 2: 0.7}) == ["CONTINUE"] * 3
    second = SweepCallback(tmp_path, asha())
    second.set_state(first.get_state())
    asked = {3: 0.55, 4: 0.9, 1: 0.1, 5: 0.65}  # trial 1 was decided before
    assert decisions(second.scheduler, asked) == ["STOP", "CONTINUE", "CONTINUE", "STOP"]
    assert decisions(asha(), {3: 0.55}) == ["CONTINUE"], "without the state any score would do"


def test_rankme_is_the_number_of_directions_in_use() -> None:
    rows = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    assert 55 < effective_rank(rows) <= 64.01
    flat = rows[:, :3] @ torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert 1 < effective_rank(flat) < 3.1
    assert effective_rank(torch.ones(20, 8)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(rows[:10]) <= 10.01


def test_ranking_keeps_cut_trials_behind_finished_ones(tmp_path: Path) -> None:
    nan = float("nan")
    scores = [
        ("stopped", {50: 0.9}),
        ("finished", {90: 0.5}),
        ("finished", {90: 0.7}),
        ("failed", {}),
        ("finished", {90: 0.9}),
        ("finished", {90: nan}),
    ]
    found = [trial({"method.temperature": 0.1 * i}, curve, status) for i, (status, curve) in enumerate(scores)]
    assert [t.number for t in rank(sweep.Sweep.read(write_sweep(tmp_path / "s", found)).trials())] == [4, 2, 1, 5, 0, 3]


def test_the_best_setting_as_a_command_line() -> None:
    from pipeline.cli.overrides import parse_settings

    values = {"method.temperature": 0.2, "views.local.scale": [0.1, 0.3], "method.hard_codes": True, "backbone.name": "resnet34"}
    line = settings_line(values)
    config = parse_settings(SWAV, line.split(), "manyviews pretrain")
    assert (config.method.temperature, config.views["local"].scale, config.backbone.name) == (0.2, (0.1, 0.3), "resnet34")
    assert config.method.hard_codes and dataclasses.is_dataclass(config)


def test_optuna_suggests_trials_and_is_told_how_they_end(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="an extra: pip install -e '.[tuning]'")
    space = [*SPACE[:1], "method.num_prototypes=log:16:256", "views.local.scale=choice:[0.1,0.3],[0.2,0.5]"]

    def suggested(made: sweep.Sweep, searcher: OptunaTrials) -> list[dict]:
        while (config := searcher.suggest(f"id{len(searcher.names)}")) != searcher.FINISHED:
            name = config["trial"]["name"]
            state = ["finished", "running", "failed"][int(name[6:]) // 2 % 3]
            score = {} if state == "failed" else {"score": config["trial"]["values"]["method.temperature"]}
            searcher.on_trial_complete(f"id{len(searcher.names) - 1}", {"state": state, "step": 50} | score)
            made.trial(name).update(status={"running": "stopped"}.get(state, state), step=50, **score)
        return [t["values"] for t in trials(made)]

    made = begin(tmp_path, space=space, search="optuna", trials=6, seeds=2, name="first")
    params = parse_space(space, SWAV)
    first = suggested(made, OptunaTrials(made, params))
    again = begin(tmp_path, space=space, search="optuna", trials=6, seeds=2, name="again")
    assert suggested(again, OptunaTrials(again, params)) == first, "the same seed, the same trials"
    assert len(first) == 12 and first[0] == first[1] != first[2] and [t["seed"] for t in trials(made)] == [0, 1] * 6
    assert all(16 <= v["method.num_prototypes"] <= 256 and v["views.local.scale"] in ([0.1, 0.3], [0.2, 0.5]) for v in first)

    made.update(trials=14)
    on = OptunaTrials(sweep.Sweep.read(made.path), params)  # as after a search whose state at Ray Tune is lost
    assert suggested(made, on)[12] not in first and len(trials(made)) == 14


def test_a_setting_of_optuna_that_cannot_work_is_a_failed_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="an extra: pip install -e '.[tuning]'")
    space = ("method.queue_length=choice:48,64", "train.global_batch_size=choice:32,48")
    made = begin(tmp_path, space=space, search="optuna", trials=8, config=override(SWAV, {"data.num_shards": 4}))
    searcher = OptunaTrials(made, parse_space(space, SWAV))
    given = []
    while (config := searcher.suggest(str(len(given)))) != searcher.FINISHED:
        given.append(config["trial"]["values"])
    assert given and all(v["method.queue_length"] % v["train.global_batch_size"] == 0 for v in given)
    assert {t["status"] for t in trials(made)} == {"waiting", "failed"} and len(trials(made)) == 8
    assert [t["values"] for t in trials(made) if t["status"] == "waiting"] == given


def test_pbt_moves_the_values_of_the_trial_that_is_copied() -> None:
    params = parse_space(SPACE[:1], SWAV)
    config = {"sweep": "s", "trial": {"name": "trial-001", "values": {"method.temperature": 0.1}}}
    new = explore(params, np.random.default_rng(0), config)
    assert new["sweep"] == "s" and new["trial"]["values"] != config["trial"]["values"]
    assert config["trial"]["values"] == {"method.temperature": 0.1}, "the other trial keeps its own"


# ---------------------------------------------------------------------------- going on


def test_a_search_is_saved_with_the_scheduler_whose_rungs_the_callback_keeps(tmp_path: Path) -> None:
    made = begin(tmp_path, trials=2, space=SPACE[:1])
    new_tuner(made)
    saved = cloudpickle.loads((made.path / "ray" / "tuner.pkl").read_bytes())
    (callback,) = saved["_run_config"].callbacks
    assert isinstance(callback, SweepCallback) and callback.scheduler is saved["_tune_config"].scheduler is not None
    assert Tuner.can_restore(made.path / "ray")


def as_tune_has_it(made: sweep.Sweep, number: int) -> TuneTrial:
    config = {"sweep": str(made.path), "trial": task_of(made.trial(number))}
    return TuneTrial("none", config=config, stub=True, trial_name_creator=trial_name)


def test_a_trial_that_ended_after_ray_tunes_snapshot_is_kept_as_it_was(tmp_path: Path) -> None:
    made = begin(tmp_path, trials=2, space=SPACE[:1])
    made.trial(0).update(status="finished", score=0.5, step=250, ended=3.0)
    before, again = made.trial(0).facts(), as_tune_has_it(made, 0)

    class Process(TrialProcess):
        trial_name = "trial-000"

    result = Process(again.config).step()
    assert result == {"state": "finished", "step": 250, "score": 0.5, "error": None, "done": True}
    callback = SweepCallback(made.path)
    callback.on_trial_start(0, [again], again)
    callback.on_trial_result(0, [again], again, result)
    again.update_last_result(result)
    callback.on_trial_complete(0, [again], again)
    assert made.trial(0).facts() == before


def test_a_trial_waits_for_the_driver_when_the_search_is_to_end(tmp_path: Path) -> None:
    made = begin(tmp_path, trials=2, space=SPACE[:1])
    (made.path / sweep.STOP).touch()

    class Process(TrialProcess):
        trial_name = "trial-001"

    result = Process(as_tune_has_it(made, 1).config).step()
    assert result == {"state": "interrupted"}, "not done: Ray Tune would not run it again after a resume"
    assert not list((made.trial(1).folder / "checkpoints").glob("*"))


def test_only_another_trials_checkpoint_that_is_new_is_followed(tmp_path: Path) -> None:
    (tmp_path / "trial-001").mkdir()
    folder = RunFolder(tmp_path / "trial-001")
    other = {"trial": "trial-000", "folder": str(tmp_path / "trial-000" / "checkpoints" / "step-00000008")}
    assert resolve_pointer(None, folder) is None
    assert resolve_pointer(other | {"trial": "trial-001"}, folder) is None, "its own last checkpoint is as new or newer"
    assert resolve_pointer(other, folder) == Place(other["folder"])
    folder.update(took_over=other["folder"])
    assert resolve_pointer(other, folder) is None, "it trained on from there before it was killed"
    assert resolve_pointer(other | {"folder": "later"}, folder) == Place("later")


def test_what_is_left_to_do_tells_how_a_sweep_ended(tmp_path: Path) -> None:
    def ended(*statuses: str, count: int | None = None) -> str:
        folder = tmp_path / "-".join([*statuses, str(count)])
        trials = [trial({}, {250: 0.5} if status == "finished" else {}, status) for status in statuses]
        made = sweep.Sweep.read(write_sweep(folder, trials))
        made.update(trials=count or len(trials))
        return outcome(made)

    assert ended("finished", "stopped", "failed") == "finished"
    assert ended("finished", "waiting") == ended("interrupted", "failed") == ended("finished", count=2) == "interrupted"
    assert ended("failed", "failed") == "failed"
