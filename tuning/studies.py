"""Studies: findings of papers, tried on small data. A study is a list of arms, run with several seeds, and what is claimed of them.

RUNS/study-NAME/ARM-seed0/ (an ordinary run folder, and study.json: its figures)   study.json  study.md  study.png

Runs that are finished are kept, so a study that was interrupted goes on when it is asked for again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.parts.errors import ConfigError, require

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config import RunConfig
    from pipeline.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration of a study."""

    name: str
    settings: Mapping[str, Any]
    words: str
    paper: str = ""  # what the paper reports for it


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What is read from a finished run: a probe of its backbone (`linear`), or the last point of one of its metrics."""

    key: str
    words: str
    probe: bool = False
    percent: bool = False

    def show(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else f"{value:,.3g}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One figure is higher in one arm than in another. `sure` = it shows in runs this short."""

    words: str
    figure: str
    higher: str
    lower: str
    sure: bool = True


@dataclass(frozen=True, kw_only=True)
class Study:
    """Equal terms for all arms: recipe, data, steps, seeds."""

    name: str
    question: str
    paper: str
    recipe: str
    settings: Mapping[str, Any]
    arms: tuple[Arm, ...]
    figures: tuple[Figure, ...]
    claims: tuple[Claim, ...]
    seeds: int = 3
    limits: str = ""

    def config(self, arm: Arm, seed: int) -> RunConfig:
        from pipeline.config import override
        from pipeline.recipes import load_recipe

        return override(load_recipe(self.recipe), {**self.settings, **arm.settings, "train.seed": seed, "track.register": False})

    def figure(self, key: str) -> Figure:
        return next(f for f in self.figures if f.key == key)


LINEAR = Figure(key="linear", words="linear accuracy", probe=True, percent=True)
KNN = Figure(key="knn", words="kNN accuracy, held-out images", percent=True)

BYOL = Study(
    name="byol-target",
    question="What does a network learn that predicts a random network, and what does a slow average of itself add?",
    paper="Grill et al. 2020, arXiv:2006.07733, section 1 and table 5a; their figures: ImageNet, linear, 300 epochs",
    recipe="byol-small",
    settings={"train.steps": 250},
    arms=(
        Arm(name="random", settings={"method.train_online": False}, words="a random network, batch norm calibrated", paper="1.4 %"),
        Arm(
            name="fixed-target",
            settings={"method.momentum": 1.0, "method.final_momentum": 1.0, "method.independent_target_init": True},
            words="predicts a fixed random network",
            paper="18.8 %",
        ),
        Arm(name="average", settings={"method.momentum": 0.9}, words="predicts a slow average of itself", paper="72.5 % (tau 0.99)"),
        Arm(
            name="no-average",
            settings={"method.momentum": 0.0, "method.final_momentum": 0.0},
            words="predicts itself (tau 0)",
            paper="0.3 %",
        ),
    ),
    figures=(LINEAR, KNN, Figure(key="embedding_std", words="spread of embeddings, 0 = collapsed")),
    claims=(
        Claim(words="even a random target teaches", figure="linear", higher="fixed-target", lower="random"),
        Claim(words="a slow average teaches more than a fixed target", figure="linear", higher="average", lower="fixed-target", sure=False),
        Claim(words="a slow average is better than none", figure="linear", higher="average", lower="no-average", sure=False),
    ),
    limits="The second and third claim need longer runs than these minutes; tau 0 need not collapse in a short run with a predictor.",
)

BOUNDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
COKE = Study(
    name="coke-bound",
    question="What does the lower bound on the size of clusters do?",
    paper="Qian et al. 2022, arXiv:2105.11527: best near 0.4, balanced clusters (1) a little worse, none (0) clearly worse",
    recipe="coke-small",
    settings={"train.steps": 400, "method.num_clusters": (60,)},
    arms=tuple(Arm(name=f"bound-{r:g}", settings={"method.constraint_ratio": r}, words=f"r' = {r:g}") for r in BOUNDS),
    figures=(
        Figure(key="smallest_cluster", words="smallest cluster, images"),
        Figure(key="largest_cluster", words="largest cluster, images"),
        Figure(key="clusters_empty_epoch", words="empty clusters", percent=True),
        Figure(key="label_agreement", words="share that keeps its label"),
        KNN,
    ),
    claims=(
        Claim(words="without a bound the smallest cluster is smaller", figure="smallest_cluster", higher="bound-0.8", lower="bound-0"),
        Claim(words="the bound of 1 is the most balanced", figure="largest_cluster", higher="bound-0", lower="bound-1"),
        Claim(words="labels change more the more balanced they must be", figure="label_agreement", higher="bound-0", lower="bound-1"),
        Claim(words="some freedom is better than balance", figure="knn", higher="bound-0.4", lower="bound-1", sure=False),
    ),
    limits="Sizes are those of the last whole pass; the constraint is online, so the smallest cluster may lie below its bound.",
)
STUDIES = {study.name: study for study in (BYOL, COKE)}


def find_study(name: str) -> Study:
    """A study by name.

    Raises:
        ConfigError: there is none of that name.
    """
    require(name in STUDIES, "study", name, f"no such study; use one of {', '.join(STUDIES)}")
    return STUDIES[name]


# ---------------------------------------------------------------------------- running


def study(name: str, *, runs_dir: Path, console: Console, settings: Mapping[str, Any] | None = None, seeds: int | None = None) -> Path:
    """Run a study, or what is left of it, and write its table and picture.

    Args:
        name: a key of `STUDIES`.
        runs_dir: the study's folder is made in it.
        console: where progress is shown.
        settings: of every arm, over those of the study, e.g. `{"data.path": "cifar10/train", "train.steps": 3000}`.
        seeds: runs of each arm; None = the study's own number.

    Returns:
        The table, `study.md`; it is written after every run, with what there is.

    Raises:
        ConfigError: no such study, or settings that cannot work.
    """
    from dataclasses import replace

    planned = find_study(name)
    planned = replace(planned, settings={**planned.settings, **(settings or {})}, seeds=seeds or planned.seeds)
    require(planned.seeds >= 1, "seeds", planned.seeds, "use 1 or more")
    plan = [(arm, seed, planned.config(arm, seed)) for seed in range(planned.seeds) for arm in planned.arms]  # refused before any runs
    folder = runs_dir / f"study-{name}"
    for arm, seed, config in plan:
        if not trained(config, folder, f"{arm.name}-seed{seed}", runs_dir, planned.figures, console):
            break
        write(planned, folder)
    return write(planned, folder)


def trained(config: RunConfig, folder: Path, run: str, runs_dir: Path, figures: Sequence[Figure], console: Console) -> bool:
    """One run of a study, trained to its end and measured, unless it is already. False: it was interrupted or failed."""
    from pipeline.config import from_yaml, override
    from pipeline.run_folder import RunFolder, write_json
    from pipeline.tracking.client import default_uri
    from pipeline.train import launch

    there = RunFolder(folder / run)
    if there.state() and not _same_terms(from_yaml(there.config_text()), config):
        raise ConfigError(f"study={folder.name}: {run} ran with other settings; use another --runs-dir, or delete {folder}")
    if there.state().get("status") != "finished":
        if there.state():
            outcome = launch.resume(there, runs_dir=folder, console=console)
        else:
            tracked = override(config, {"track.uri": config.track.uri or default_uri(runs_dir)})
            outcome = launch.pretrain(tracked, runs_dir=folder, run=run, console=console)
        if outcome.status != "finished":
            console.print(f"{run}: {outcome.message}; ask for the study again to go on", highlight=False, soft_wrap=True)
            return False
    if not (there.path / "study.json").exists():
        write_json(there.path / "study.json", measured(there, figures))
    return True


def _same_terms(ran: RunConfig, wanted: RunConfig) -> bool:
    """Are the settings equal, apart from where the run is tracked and how its paths are written?"""
    from pipeline.build import with_absolute_paths
    from pipeline.config import flatten

    ours, theirs = flatten(with_absolute_paths(wanted)), flatten(ran)
    return all(theirs.get(key) == value for key, value in ours.items() if not key.startswith("track."))


def measured(run: RunFolder, figures: Sequence[Figure]) -> dict[str, float]:
    """The figures of a finished run that it has."""
    from pipeline.export import evaluation
    from pipeline.figures.curve_charts import read_metrics

    found = {key: float(values[-1]) for key, (_, values) in read_metrics(run.metrics).items()}
    asked = [figure.key for figure in figures if figure.probe]
    if asked:
        _, probes = evaluation.evaluate(run.model, evaluation.config_of(run.model), asked)
        found |= {probe.name: probe.get("trained") for probe in probes}
    return {figure.key: found[figure.key] for figure in figures if figure.key in found}


# ---------------------------------------------------------------------------- what came out


@dataclass(frozen=True)
class StudyResults:
    """Figures of the runs so far: `values[arm][figure]` is a list over seeds."""

    study: Study
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def of(self, arm: str, figure: str) -> list[float]:
        return self.values.get(arm, {}).get(figure, [])

    def verdict(self, claim: Claim) -> str:
        """Does a claim hold? A difference counts when it is larger than the spread over seeds of either arm."""
        high, low = self.of(claim.higher, claim.figure), self.of(claim.lower, claim.figure)
        if not high or not low:
            return "not measured yet"
        show, gap = self.study.figure(claim.figure).show, statistics.fmean(high) - statistics.fmean(low)
        words = f"{claim.higher} {show(statistics.fmean(high))}, {claim.lower} {show(statistics.fmean(low))}"
        if min(len(high), len(low)) < 2:
            return f"{'seen' if gap > 0 else 'not seen'} with one seed ({words})"
        spread = max(statistics.stdev(high), statistics.stdev(low))
        state = "holds" if gap > spread else "does not hold" if gap < -spread else "within the spread over seeds"
        return f"{state} ({words}, spread {show(spread)}, n = {min(len(high), len(low))})"


def read_results(planned: Study, folder: Path) -> StudyResults:
    values: dict[str, dict[str, list[float]]] = {}
    for arm in planned.arms:
        for seed in range(planned.seeds):
            file = folder / f"{arm.name}-seed{seed}" / "study.json"
            for key, value in (json.loads(file.read_text()) if file.exists() else {}).items():
                values.setdefault(arm.name, {}).setdefault(key, []).append(float(value))
    return StudyResults(planned, values)


def table(results: StudyResults) -> list[list[str]]:
    """Heading and one row an arm: mean and standard deviation over seeds of each figure, and the paper's own."""
    planned = results.study
    with_paper = any(arm.paper for arm in planned.arms)
    rows = [["arm", "what it is", *(f.words for f in planned.figures), *(["paper"] if with_paper else [])]]
    for arm in planned.arms:
        cells = [_cell(results.of(arm.name, figure.key), figure.show) for figure in planned.figures]
        rows.append([arm.name, arm.words, *cells, *([arm.paper] if with_paper else [])])
    return rows


def _cell(values: Sequence[float], show: Callable[[float], str]) -> str:
    if not values:
        return "–"
    spread = f" ± {show(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{show(statistics.fmean(values))}{spread} (n = {len(values)})"


def write(planned: Study, folder: Path) -> Path:
    """`study.md`, `study.png` and `study.json` of what there is."""
    from pipeline.run_folder import write_json
    from pipeline.storage.place import write_atomic
    from tuning.study_picture import arms as draw

    results = read_results(planned, folder)
    folder.mkdir(parents=True, exist_ok=True)
    heading, *rows = table(results)
    lines = [f"# {planned.name}", "", planned.question, "", f"Paper: {planned.paper}.", ""]
    terms = ", ".join(f"{key} {value}" for key, value in planned.settings.items())
    lines += [f"Terms, equal for all arms: recipe {planned.recipe}, {terms}; mean ± standard deviation over n seeds.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rows)]
    lines += ["", "| claim | shows in short runs | found |", "| --- | --- | --- |"]
    lines += [f"| {c.words} | {'yes' if c.sure else 'not surely'} | {results.verdict(c)} |" for c in planned.claims]
    lines += ["", planned.limits, ""]
    if results.values:
        draw(results, folder / "study.png")
        lines += ["![figures of each arm](study.png)", ""]
    write_json(folder / "study.json", {"study": planned.name, "values": results.values})
    write_atomic(folder / "study.md", "\n".join(lines).encode())
    return folder / "study.md"
