"""The report of a sweep: what it calls best, how sure it says that is, what it cost, and that its recipe can be run."""

from __future__ import annotations

import base64
import io
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import manyviews
from methods.parts.errors import ConfigError
from pipeline.config import flatten, override, to_yaml
from pipeline.figures.style import BLUE, VERMILLION
from pipeline.recipes import load_recipe
from tests.sweeps import PROTOTYPES, TEMPERATURE, trial, write_sweep
from tests.test_figures import near, read
from tuning import best, importance, pictures, tables
from tuning.axes import AxisScale, bands
from tuning.report import summary, write_report
from tuning.results import Results
from tuning.space import Param

T, K = "method.temperature", "method.num_prototypes"


def text_of(renderable: Any) -> str:
    from rich.console import Console

    screen = io.StringIO()
    Console(width=400, file=screen).print(renderable)
    return screen.getvalue()


def words(page: Path) -> str:
    """The text of a page, without its pictures and marks."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.read_text()))


@pytest.fixture(scope="module")
def asha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials finish, three are stopped, two fail; all curves have step 50."""
    values = [{T: t, K: k} for t, k in [(0.1, 64), (0.2, 128), (0.05, 32), (0.4, 32), (0.3, 64), (0.07, 128), (0.5, 128)]]
    trials = [
        trial(values[0], {50: 0.30, 100: 0.40, 200: 0.512}),
        trial(values[1], {50: 0.28, 100: 0.41, 200: 0.45}),
        trial(values[2], {50: 0.20}, "stopped"),
        trial(values[3], {50: 0.10}, "stopped"),
        trial(values[4], {50: 0.29, 100: 0.70}, "stopped"),  # at its rung above every final score
        trial(values[5], {50: 0.95}, "failed", error="the loss is nan at step 61; lower <optim.base_lr>"),
        trial(values[6], {}, "failed"),
    ]
    return write_sweep(
        tmp_path_factory.mktemp("runs") / "asha", trials, TEMPERATURE | PROTOTYPES, scheduler="asha", rungs=[50, 100], total_steps=200
    )


@pytest.fixture(scope="module")
def page(asha: Path) -> Path:
    (asha / "config.yaml").write_text(to_yaml(override(load_recipe("swav-small"), {"train.steps": 200, "data.path": "my photos"})))
    return write_report(asha)


SEEDS = {0.1: [0.50, 0.52, 0.54], 0.2: [0.515, 0.525, 0.53], 0.4: [0.30, 0.31, 0.32]}


def with_seeds(folder: Path, scores: dict[float, list[float]] = SEEDS) -> Path:
    trials = [trial({T: t}, {250: s}, seed=i) for t, found in scores.items() for i, s in enumerate(found)]
    return write_sweep(folder, trials, seeds=3, search="grid")


# ---------------------------------------------------------------------------- the page


def test_the_page_names_the_best_setting_and_the_cost(page: Path) -> None:
    said = words(page)
    assert "51.2 % best kNN accuracy" in said
    assert "method.temperature 0.1 method.num_prototypes 64" in said
    assert "It leads the second setting by 6.2 points. Every setting ran with one seed" in said
    assert "7 trials: 2 finished, 3 stopped, 2 failed" in said
    # 200 + 200 + 50 + 50 + 100 of 5 x 200 steps were run
    assert "40 % of the steps that the 5 finished and stopped trials would have taken" in said
    images = 128 * (200 + 200 + 50 + 50 + 100 + 50)
    assert f"{images:,}, all trials together" in said and f"10.0 min, {images / 600:,.0f} images/s" in said
    assert "data my photos" in said and "it says little about other tasks" in said


def test_the_page_shows_errors_as_text(page: Path) -> None:
    assert "lower &lt;optim.base_lr&gt;" in page.read_text() and "<optim.base_lr>" not in page.read_text()
    assert "no error was recorded" in page.read_text()


def test_the_page_is_whole_without_a_network(page: Path) -> None:
    html = page.read_text()
    assert not re.search(r"https?://|<link|src=(?!\"data:image/png;base64,)", html)
    drawn = {file.read_bytes() for file in page.parent.glob("*.png")}
    shown = {base64.b64decode(code) for code in re.findall(r'base64,([^"]+)"', html)}
    assert shown == drawn and len(drawn) == 4
    assert {file.name for file in page.parent.iterdir() if file.suffix != ".png"} == {"report.html", "best.yaml", "best_recipe.py"}


def test_trials_stand_in_order_and_a_score_at_a_rung_does_not_lead(page: Path) -> None:
    body = re.search(r"<tbody>(.*?)</tbody>", page.read_text(), re.S)
    assert body is not None
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body[1], re.S)]
    assert [row[1] for row in rows] == ["0", "1", "4", "2", "3", "5", "6"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "–", "–"]
    assert rows[2][2:8] == ["0.3", "64", "70.0 %", "100", "stopped", "20 s"]


def test_a_report_may_go_elsewhere(asha: Path, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "one", [trial({T: 0.1}, {250: 0.5})])
    made = write_report(folder, to=tmp_path / "elsewhere")
    assert made == tmp_path / "elsewhere" / "report.html" and not (folder / "report").exists()
    # one trial, measured once: curves and parallel coordinates would be empty frames
    assert [file.name for file in made.parent.glob("*.png")] == ["response.png"]
    assert "No other setting has a score" in words(made)


# ---------------------------------------------------------------------------- what is best


def test_repeats_are_judged_by_their_mean_and_spread(tmp_path: Path) -> None:
    found = Results.read(with_seeds(tmp_path / "s"))
    assert found.best.values == {T: 0.2}  # 52.33 % on average, though a single 54 % belongs to 0.1
    assert found.best.mean == pytest.approx(1.57 / 3)
    assert found.best.std == pytest.approx(statistics.stdev(SEEDS[0.2]))
    pooled = math.sqrt(statistics.fmean([statistics.variance(s) for s in SEEDS.values()]))
    assert found.seed_spread == pytest.approx(pooled)
    assert found.best_trial.number == 5
    assert "by 0.3 points: within the spread over seeds (standard deviation 1.4 points, pooled over 3" in found.verdict()
    assert found.best_score() == "kNN accuracy 52.3 % ± 0.8 points (3 seeds) at step 250"
    assert "52.3 % ± 0.8 points (n = 3)" in text_of(summary(found.sweep.path))


def test_a_lead_beyond_the_spread_is_called_one(tmp_path: Path) -> None:
    found = Results.read(with_seeds(tmp_path / "s", {0.1: [0.50, 0.51, 0.52], 0.4: [0.30, 0.31, 0.32]}))
    assert "by 20.0 points: more than the spread over seeds (standard deviation 1.0 points" in found.verdict()


def test_a_setting_that_lost_seeds_to_the_scheduler_does_not_lead(tmp_path: Path) -> None:
    trials = [trial({T: 0.1}, {250: s}, seed=i) for i, s in enumerate([0.50, 0.51, 0.52])]
    trials += [trial({T: 0.2}, {250: 0.60}), trial({T: 0.2}, {50: 0.1}, "stopped", seed=1), trial({T: 0.2}, {50: 0.1}, "stopped", seed=2)]
    found = Results.read(write_sweep(tmp_path / "s", trials, seeds=3, scheduler="asha"))
    assert found.best.values == {T: 0.1}
    assert "A setting with fewer seeds scored 9.0 points more" in found.verdict()


def test_ties_go_to_the_first_and_are_told(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", [trial({T: t}, {250: s}) for t, s in [(0.3, 0.4), (0.2, 0.5), (0.1, 0.5)]])
    found = Results.read(folder)
    assert found.best.values == {T: 0.2}
    assert "2 settings share the best score; the one that ran first is shown." in tables.warnings(found)
    assert [t.number for t in tables.ordered(found)] == [1, 2, 0]


def test_nan_is_no_score(tmp_path: Path) -> None:
    nan = float("nan")
    found = Results.read(write_sweep(tmp_path / "s", [trial({T: 0.3}, {125: nan, 250: nan}), trial({T: 0.2}, {125: nan, 250: 0.2})]))
    assert found.best.values == {T: 0.2} and len(found.settings) == 1
    assert found.trials[0].score is None and found.trials[1].curve == {250: 0.2}
    assert [t.number for t in tables.ordered(found)] == [1, 0]
    assert found.show(found.trials[0].score) == "no score"


def test_while_no_trial_has_finished_those_furthest_are_compared(tmp_path: Path) -> None:
    curves = [{25: 0.3, 50: 0.35}, {25: 0.2, 50: 0.25, 75: 0.3}, {25: 0.1, 50: 0.2, 75: 0.28}, {}]
    trials = [trial({T: 0.1 * (i + 1)}, curve, "interrupted" if curve else "waiting") for i, curve in enumerate(curves)]
    trials[1]["score"] = None  # killed before it was written down: the last measurement counts
    found = Results.read(write_sweep(tmp_path / "s", trials, status="interrupted"))
    assert found.final_step == 75 and found.best.values == {T: 0.2} and found.best.mean == 0.3
    assert len(found.settings) == 2 and found.common_step == 50
    said = tables.warnings(found)
    assert "go on with: manyviews resume s" in said[0] and "best of the 2 that were measured at step 75 of 250" in said[1]
    assert found.saved is None  # nothing was stopped for good


def test_the_untrained_network_is_no_result(tmp_path: Path) -> None:
    trials = [
        trial({T: 0.1}, {0: 0.2, 50: 0.4, 250: 0.5}),
        trial({T: 0.2}, {0: 0.6}, "interrupted"),
        trial({T: 0.3}, {0: 0.2, 50: 0.3}, "stopped"),
    ]
    trials[1]["score"] = None
    found = Results.read(write_sweep(tmp_path / "s", trials, scheduler="asha", rungs=[50]))
    assert found.common_step == 50 and [t.number for t in found.ranked] == [0, 2]
    path = pictures.learning(found, tmp_path / "learning.png")
    assert near(read(path), VERMILLION).any()


def test_scores_without_percent(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", [trial({T: t}, {250: s}) for t, s in [(0.1, 0.412), (0.2, 0.4)]], score="rankme")
    found = Results.read(folder)
    assert found.best_score() == "RankMe 0.412 at step 250" and "by 0.012." in found.verdict()


# ---------------------------------------------------------------------------- a recipe that runs


def test_the_command_and_the_recipe_give_the_best_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    given = {"train.steps": None, "train.epochs": 2.5, "train.deterministic": True, "data.path": "my photos", "optim.betas": (0.8, 0.9)}
    given |= {"track.uri": "sqlite:///elsewhere.db", "views.local.count": 3}
    base = override(load_recipe("swav-small"), given)
    folder = write_sweep(
        tmp_path / "s", [trial({T: 0.1683, K: 64}, {250: 0.5}), trial({T: 0.3, K: 32}, {250: 0.4})], TEMPERATURE | PROTOTYPES
    )
    (folder / "config.yaml").write_text(to_yaml(base))
    run = best.write_best(Results.read(folder), tmp_path / "out")
    wanted = override(base, {T: 0.1683, K: 64, "track.uri": None})

    program, verb, recipe, *settings = shlex.split(run.command)
    assert (program, verb, recipe) == ("manyviews", "pretrain", "swav-small")
    assert manyviews.parse_settings(load_recipe(recipe), settings, "test") == wanted
    assert "--method.num-prototypes" in settings  # searched, though the recipe has the same value

    from pipeline import recipes

    monkeypatch.setattr(recipes, "_functions", dict(recipes._functions))
    scope: dict[str, Any] = {}
    exec(compile((tmp_path / "out" / "best_recipe.py").read_text(), "best_recipe.py", "exec"), scope)
    assert recipes._functions["swav-small-tuned"] is scope["tuned"]
    tuned = flatten(scope["tuned"]())
    assert tuned == flatten(wanted)

    from pipeline.config import from_yaml

    assert from_yaml((tmp_path / "out" / "best.yaml").read_text()) == override(base, {T: 0.1683, K: 64})


def test_without_the_sweeps_settings_the_searched_values_remain(tmp_path: Path) -> None:
    run = best.best_recipe(Results.read(write_sweep(tmp_path / "s", [trial({T: 0.1}, {250: 0.5})])))
    assert run.command == "manyviews pretrain swav-small --method.temperature 0.1" and run.yaml is None
    assert "config.yaml is missing" in run.trouble


# ---------------------------------------------------------------------------- pictures and correlations


def test_response_fills_finished_trials_only(asha: Path, tmp_path: Path) -> None:
    from skimage.measure import label

    found = Results.read(asha)
    picture = read(pictures.response(found, tmp_path / "response.png"))
    assert label(near(picture, BLUE, 40)).max() == 2 * 2 + 1  # two trials on two knobs, and the legend's
    at = read(pictures.response_at(found, 50, tmp_path / "at.png"))
    spots = label(near(at, BLUE, 40))
    assert np.sum(np.bincount(spots.ravel())[1:] > 20) == 2 * 5 + 1  # all five that did not fail


def test_axes_show_what_is_chance(tmp_path: Path) -> None:
    """The range of the untrained networks' scores, and the spread over seeds around the best setting."""
    values = {0.1: [0.50, 0.52], 0.2: [0.60, 0.62]}
    trials = [trial({T: t}, {0: 0.18 + 0.02 * i, 250: s}, seed=i) for t, found in values.items() for i, s in enumerate(found)]
    found = Results.read(write_sweep(tmp_path / "s", trials, seeds=2))
    (low, high, *_), (below, above, *_) = bands(found, spread=True)
    assert (low, high) == pytest.approx((0.18, 0.20))
    assert (below, above) == pytest.approx((0.61 - statistics.stdev([0, 0.02]), 0.61 + statistics.stdev([0, 0.02])))
    picture = read(pictures.response(found, tmp_path / "response.png"))
    tinted = [tuple(255 - 0.15 * (255 - c) for c in colour) for colour in ((213, 94, 0), (0, 114, 178))]
    chance, best_rows = (np.flatnonzero(near(picture, c, 4).mean(axis=1) > 0.4) for c in tinted)
    assert best_rows.max() < chance.min()  # above
    assert len(best_rows) / len(chance) == pytest.approx((above - below) / (high - low), rel=0.25)
    plain = Results.read(write_sweep(tmp_path / "plain", [trial({T: t}, {250: t}) for t in (0.1, 0.2)]))
    assert bands(plain, spread=True) == []


def test_scales_of_axes() -> None:
    log = AxisScale.of(Param(T, "log", 0.01, 1.0), "t", [])
    assert log.height(0.1) == pytest.approx(0.5) and log.ticks() == pytest.approx([0.01, 0.03, 0.1, 0.3, 1.0])
    choice = AxisScale.of(Param("b", "choice", choices=("x", True, None)), "b", [])
    assert [choice(v) for v in ("x", True, None)] == [0, 1, 2] and choice.tick_labels() == ["x", "True", "None"]
    whole = AxisScale.of(Param("n", "int", 0, 3), "n", [])
    assert whole.ticks() == [0, 1, 2, 3]
    single = AxisScale("n", (), 2, 2)
    assert single.height(2) == 0.5 and single.ticks() == [2]


def test_correlations_compare_trials_at_one_step(tmp_path: Path) -> None:
    space = TEMPERATURE | PROTOTYPES | {"backbone.name": {"scale": "choice", "choices": ["a", "b"]}}
    trials = []
    for i in range(8):  # the two that finish are those with the lowest scores at step 50
        values = {T: 0.05 * (i + 1), K: 128 - i, "backbone.name": "ab"[i % 2]}
        curve = {50: 0.1 + 0.01 * i} | ({250: 0.9 - 0.1 * i} if i < 2 else {})
        trials.append(trial(values, curve, "finished" if i < 2 else "stopped"))
    found = importance.correlations(Results.read(write_sweep(tmp_path / "s", trials, space)))
    assert found is not None and (found.step, found.count) == (50, 8)
    assert found.rho == {T: pytest.approx(1.0), K: pytest.approx(-1.0), "backbone.name": None}
    assert found.words(T) == "higher values scored better" and found.words(K) == "lower values scored better"
    assert found.chance == pytest.approx(1.96 / math.sqrt(7))
    few = write_sweep(tmp_path / "few", trials[:2], space)
    assert importance.correlations(Results.read(few)) is None


# ---------------------------------------------------------------------------- refusals and damage


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no sweep: it holds no sweep\.json; give the folder that `manyviews tune` made"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a single run, not a sweep"):
        write_report(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match=r"sweep\.json cannot be read"):
        summary(tmp_path)


def test_a_sweep_without_a_score_is_refused_with_its_first_error(tmp_path: Path) -> None:
    failed = trial({T: 0.1}, {50: 0.3}, "failed", error="out of memory")
    folder = write_sweep(tmp_path / "s", [trial({T: 0.2}, {}, "waiting"), failed])
    with pytest.raises(ConfigError, match=r"no trial has a score yet, 1 waiting, 1 failed \(the first error: out of memory\).*resume s"):
        write_report(folder)
    with pytest.raises(ConfigError, match="mend the cause"):
        write_report(write_sweep(tmp_path / "all", [failed]))
    with pytest.raises(ConfigError, match="none started"):
        write_report(write_sweep(tmp_path / "none", []))
    assert not (folder / "report").exists()


def test_damaged_and_missing_trial_files_do_not_stop_the_reader(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", [trial({T: 0.1}, {250: 0.5}), trial({T: 0.2}, {250: 0.6}), trial({T: 0.3}, {250: 0.7})])
    (folder / "trial-001" / "trial.json").write_text('{"number": 1, "val')
    (folder / "trial-002" / "trial.json").unlink()
    with open(folder / "trial-000" / "metrics.jsonl", "a") as file:
        file.write('{"step": 300, "metr')
    found = Results.read(folder)
    assert [t.status for t in found.trials] == ["finished", "failed", "waiting"]
    assert found.best.values == {T: 0.1} and "trial.json cannot be read" in text_of(summary(folder))


def test_what_runs_without_a_process_at_work_was_interrupted(tmp_path: Path) -> None:
    from pipeline.run_folder import RunFolder

    trials = [trial({T: 0.1}, {250: 0.5}), trial({T: 0.2}, {50: 0.3}, "running")]
    folder = write_sweep(tmp_path / "s", trials, status="running", ended=None)
    assert [t.status for t in Results.read(folder).trials] == ["finished", "interrupted"]
    assert "The search is interrupted" in tables.warnings(Results.read(folder))[0]
    (folder / "run.json").write_text("{}")
    with RunFolder(folder).working():
        assert [t.status for t in Results.read(folder).trials] == ["finished", "running"]
        assert "The search is running: these are the figures so far." in tables.warnings(Results.read(folder))


def test_the_summary_ranks_and_says_how_to_run_the_best(asha: Path, page: Path) -> None:
    said = text_of(summary(asha, most=3))
    lines = [line for line in said.splitlines() if "│" in line]
    assert len(lines) == 3 and "51.2 %" in lines[0] and "and 4 more" in said
    assert "failed" in said and "the loss is nan at step 61; lower <optim.base_lr>" in said
    assert "run it with: manyviews pretrain swav-small --method.temperature 0.1 --method.num-prototypes 64" in said
    assert "--data.path 'my photos' --train.steps 200" in said


def test_pictures_are_legible_pngs(page: Path) -> None:
    for file in page.parent.glob("*.png"):
        with Image.open(file) as image:
            assert image.width >= 800 and image.height >= 500
