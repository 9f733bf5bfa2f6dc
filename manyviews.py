"""The front door: `manyviews VERB ...`. Every verb is a class: its fields are its options. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from methods.parts.errors import ConfigError
from pipeline.cli import early, printing
from pipeline.cli.overrides import configured, parse_settings, split, tracking_uri
from pipeline.cli.verb import CROPS, MEASURING, TRAINING, Count, File, Model, Recipe, Run, RunsVerb, Share, Switch, Text, Verb, option, read
from pipeline.export.find import resolve_model, run_or_model
from pipeline.figures import pictures
from pipeline.recipes import entries, load_recipe
from pipeline.run_folder import command, find_run, list_runs
from pipeline.shell import program
from tuning import cli as tuning_cli

# Idle threads of one process must not spin on cores that another one needs; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True, kw_only=True)
class Pretrain(RunsVerb):
    """Train a new run, evaluate it and register its backbone."""

    settings_help = TRAINING
    recipe: Recipe  # a starting point; its settings can be changed as below
    name: Annotated[Text, option("NAME", "recipe, date and time", name="run")] = None  # name of the run

    def run(self, settings: list[str]) -> int:
        config = configured(self.recipe, settings)
        from pipeline.train import launch

        return printing.conclude(launch.pretrain(config, runs_dir=self.runs_dir, run=self.name, console=printing.console()), self)

    @classmethod
    def more_help(cls) -> str:
        return printing.listing("recipes", ((entry.name, entry.summary) for entry in entries()))


@dataclass(frozen=True, kw_only=True)
class Resume(RunsVerb):
    """Go on with an interrupted run or sweep: same data order, same settings, from its last checkpoints."""

    name: Annotated[Positional[str], option("RUN_OR_SWEEP")]  # name or folder of the run or sweep

    def run(self, settings: list[str]) -> int:
        try:
            folder = find_run(self.name, self.runs_dir)
        except ConfigError:
            if (code := tuning_cli.resume(self.name, self, printing.write_json, printing.console())) is None:
                raise
            return code
        from pipeline.train import launch

        return printing.conclude(launch.resume(folder, runs_dir=self.runs_dir, console=printing.console()), self)


@dataclass(frozen=True, kw_only=True)
class Continue(RunsVerb):
    """Start a new phase from a run's full last state, with a new schedule.

    manyviews continue RUN --train.epochs 50
    """

    settings_help = TRAINING
    earlier: Run  # name or folder of the finished run
    #: changes of the run's settings, before those given. high-resolution: large crops for a ViT, 10,000 steps, a tenth of the rate
    phase: Annotated[Literal["", "high-resolution"], option("high-resolution", "none")] = ""
    name: Annotated[Text, option("NAME", "RUN-continued, date and time", name="run")] = None  # name of the new run

    def run(self, settings: list[str]) -> int:
        earlier = find_run(self.earlier, self.runs_dir)
        from pipeline import phase
        from pipeline.config import from_yaml

        before = from_yaml(earlier.config_text())
        start = phase.high_resolution(before) if self.phase else before
        config = parse_settings(start, settings, f"{program()} continue {earlier.name}")
        from pipeline.train import launch

        screen, shorten = printing.console(), bool(self.phase)
        result = launch.continue_run(earlier, config, runs_dir=self.runs_dir, run=self.name, console=screen, shorten=shorten)
        return printing.conclude(result, self)


@dataclass(frozen=True, kw_only=True)
class Evaluate(RunsVerb):
    """Measure a backbone by kNN or probes, beside the untrained backbone.

    manyviews evaluate RUN --protocol linear lowshot
    """

    settings_help = MEASURING
    model: Model  # a run, an exported folder, or models:/NAME@best
    #: what to measure: knn (also of raw pixels), linear (all labels), lowshot (a few images per class)
    protocol: Annotated[tuple[Literal["knn", "linear", "lowshot"], ...], option("PROTOCOL ...")] = ("knn",)

    def run(self, settings: list[str]) -> int:
        if not self.protocol:
            raise ConfigError("protocol: a value is missing; use knn, linear or lowshot")
        folder = resolve_model(self.model, runs_dir=self.runs_dir, uri=tracking_uri(settings))
        from pipeline.export import evaluation

        config = parse_settings(evaluation.config_of(folder), settings, f"{program()} evaluate {self.model}")
        scores, probes = evaluation.evaluate(folder, config, self.protocol)
        if scores is not None:
            printing.show_scores(scores)
        for probe in probes:
            printing.show_probe(probe)
        found = {"model": self.model} | (scores.to_dict() if scores is not None else {})
        printing.write_json(self, found | {probe.name: probe.to_dict() for probe in probes})
        return 0


@dataclass(frozen=True, kw_only=True)
class Embed(RunsVerb):
    """Write the features of a folder of images to Parquet.

    manyviews embed RUN --data.path photos/ --to features/
    """

    model: Model  # a run, an exported folder, or models:/NAME@best
    data_path: Annotated[str, option("PATH", name="data.path")]  # images, as for pretrain
    to: Annotated[Path, option("DIR")]  # where the Parquet files go
    #: GPUs of each actor that embeds, such as 1 or 0.5; 0 = CPUs
    gpus: Annotated[Share, option("N", "1 where there are GPUs")] = None
    bf16: Switch = False  # bf16 instead of float32: faster on a GPU, features are rounded
    uri: Annotated[Text, option("URI", "the runs folder's own", name="track.uri")] = None  # tracking server of models:/

    def run(self, settings: list[str]) -> int:
        early.require_exists("data.path", self.data_path)
        folder = resolve_model(self.model, runs_dir=self.runs_dir, uri=self.uri)
        from pipeline.config import DataConfig
        from pipeline.export.embed import BAD, embed

        report = embed(folder, DataConfig(path=self.data_path), self.to, gpus=self.gpus, bf16=self.bf16)
        screen = printing.console()
        screen.print(f"{report.rows:,} embeddings in {self.to} ({report.images_per_s:,.0f} images/s)", highlight=False)
        if report.bad:
            screen.print(f"{report.bad} images could not be decoded; {self.to / BAD} lists them", highlight=False)
        printing.write_json(self, {"rows": report.rows, "bad": report.bad, "seconds": report.seconds, "to": str(self.to)})
        return 0


@dataclass(frozen=True, kw_only=True)
class Views(RunsVerb):
    """Draw a contact sheet: the crops and augmentations that a recipe makes of your images.

    manyviews views swav --data.path photos/
    """

    settings_help = CROPS
    recipe: Recipe  # whose crops are drawn
    images: Annotated[int, option("N")] = 6  # how many images to show
    to: Annotated[Path, option("FILE")] = Path("views.png")  # the picture

    def run(self, settings: list[str]) -> int:
        config = configured(self.recipe, settings, "views")
        from pipeline.data.sources.base import open_source
        from pipeline.figures.run_figures import views_sheet

        picture = views_sheet(config, open_source(config.data), self.to, images=self.images)
        for name, group in config.views.items():
            print(f"{name}: {group.describe()}")
        print(picture)
        printing.write_json(self, {"picture": str(picture)})
        return 0


@dataclass(frozen=True, kw_only=True)
class Figure(RunsVerb):
    """Draw a picture of a run or a model, finished or not, again or of other images.

    manyviews figure patch_pca RUN --data.path photos/
    manyviews figure masks ibot-vits16 --data.path photos/
    """

    settings_help = MEASURING
    picture: Annotated[Positional[str], option("PICTURE")]  # which picture
    model: Model  # a run, an exported folder, or models:/NAME@best; views and masks also of a recipe
    to: Annotated[File, option("FILE", "PICTURE.png")] = None  # the file

    def run(self, settings: list[str]) -> int:
        if self.picture not in (entry.name for entry in pictures.entries()):
            pictures.find(self.picture)  # says what there is
        try:
            found: Any = run_or_model(self.model, runs_dir=self.runs_dir, uri=tracking_uri(settings))
        except ConfigError:
            if self.model not in (entry.name for entry in entries()):
                raise
            found = load_recipe(self.model)
        from pipeline.figures.context import FigureContext

        picture = pictures.find(self.picture)
        subject = FigureContext.of(found)
        subject.config = parse_settings(subject.config, settings, f"{program()} figure {picture.name} {self.model}")
        path = picture.draw(subject, self.to or Path(f"{picture.name}.png"))
        print(path)
        printing.write_json(self, {"picture": str(path)})
        return 0

    @classmethod
    def more_help(cls) -> str:
        return printing.listing("pictures", ((entry.name, entry.summary) for entry in pictures.entries()))


@dataclass(frozen=True, kw_only=True)
class Methods(Verb):
    """List the methods with their papers."""

    def run(self, settings: list[str]) -> int:
        from methods.parts.contract import registered

        rows = [(e.name, e.method.paper, (sys.modules[e.method.__module__].__doc__ or "").split("\n")[0]) for e in registered().values()]
        printing.show_table(["method", "paper", "what it does"], rows)
        printing.write_json(self, [{"name": n, "paper": p, "summary": s} for n, p, s in rows])
        return 0


@dataclass(frozen=True, kw_only=True)
class Recipes(Verb):
    """List the recipes: named starting points of runs."""

    def run(self, settings: list[str]) -> int:
        printing.show_table(["recipe", "what it is"], [(e.name, e.summary) for e in entries()])
        print(f"\n{program()} pretrain RECIPE --help shows every setting; pipeline/recipes/ holds the files")
        printing.write_json(self, [{"name": e.name, "summary": e.summary} for e in entries()])
        return 0


@dataclass(frozen=True, kw_only=True)
class Tune(tuning_cli.TuneOptions):
    """Search over any settings of a recipe by Ray Tune."""

    settings_help = TRAINING

    def run(self, settings: list[str]) -> int:
        return tuning_cli.tune(self, settings, self.recipe, printing.write_json, printing.console())

    @classmethod
    def more_help(cls) -> str:
        return tuning_cli.EXAMPLES


@dataclass(frozen=True, kw_only=True)
class Report(RunsVerb):
    """Draw a sweep: a page with plots, a table and the best configuration."""

    sweep: Annotated[Positional[str], option("SWEEP")]  # name or folder of the sweep
    to: Annotated[File, option("DIR", "report/ in the sweep")] = None  # folder of the report

    def run(self, settings: list[str]) -> int:
        return tuning_cli.report(self, printing.write_json, printing.console())


@dataclass(frozen=True, kw_only=True)
class Study(RunsVerb):
    """Try a paper's finding on small data: several arms and seeds, a table and a picture."""

    settings_help = TRAINING
    name: Annotated[Positional[Text], option("[STUDY]")] = None  # which study; without a name, list what there is
    seeds: Annotated[Count, option("N", "the study's own number")] = None  # runs of each arm

    def run(self, settings: list[str]) -> int:
        return tuning_cli.study(self, settings, printing.write_json, printing.console())


@dataclass(frozen=True, kw_only=True)
class Runs(RunsVerb):
    """List runs and sweeps, their state and how to go on; with a name, show one in detail."""

    name: Annotated[Positional[Text], option("[RUN_OR_SWEEP]")] = None  # name or folder of a run or sweep

    def run(self, settings: list[str]) -> int:
        if self.name and tuning_cli.shown(self.name, self, printing.write_json, printing.console()):
            return 0
        folders = [find_run(self.name, self.runs_dir)] if self.name else list_runs(self.runs_dir)
        states = [folder.state() | {"folder": str(folder.path)} for folder in folders]
        sweeps = [] if self.name else tuning_cli.listed(self.runs_dir)
        if self.name:
            printing.show_run(states[0], self)
        elif states or sweeps:
            printing.show_runs(states, sweeps, self)
        else:
            print(f"no runs in {self.runs_dir}; start one with: {command('pretrain', 'swav-small', runs_dir=self.runs_dir)}")
        printing.write_json(self, [*states, *sweeps])
        return 0


@dataclass(frozen=True, kw_only=True)
class Sync(RunsVerb):
    """Send a run's points to MLflow that did not arrive while the server was down."""

    name: Run  # name or folder of the run

    def run(self, settings: list[str]) -> int:
        find_run(self.name, self.runs_dir)
        from pipeline.train import registration

        sent, model = registration.sync(self.name, runs_dir=self.runs_dir)
        print(f"{sent} points sent to MLflow" + (f"; registered as {model.uri}" if model else ""))
        printing.write_json(self, {"run": self.name, "sent": sent, "registered": model.uri if model else None})
        return 0


@dataclass(frozen=True, kw_only=True)
class Doctor(RunsVerb):
    """Check machine, packages, data and tracking before time is spent."""

    settings_help = TRAINING
    recipe: Annotated[Positional[Text], option("[RECIPE]", "swav-small")] = None  # whose settings are checked against the data

    def run(self, settings: list[str]) -> int:
        config = configured(self.recipe or "swav-small", settings, "doctor")
        from pipeline.doctor.report import diagnose, render

        checks = diagnose(data=config.data, runs_dir=self.runs_dir, uri=config.track.uri, config=config)
        printing.console().print(render(checks))
        printing.write_json(self, [vars(check) for check in checks])
        return 1 if any(check.ok == "fail" for check in checks) else 0


@dataclass(frozen=True, kw_only=True)
class Completion(Verb):
    """Print a script by which a shell completes commands: eval "$(manyviews completion bash)"."""

    shell: Annotated[Positional[Literal["bash", "zsh"]], option("{bash,zsh}")]  # the shell that reads it

    def run(self, settings: list[str]) -> int:
        from pipeline.cli import completion

        names = {"RECIPE": [e.name for e in entries()], "PICTURE": [e.name for e in pictures.entries()], "STUDY": tuning_cli.studies()}
        print(completion.script(self.shell, VERBS, names), end="")
        return 0


KINDS = (Pretrain, Resume, Continue, Evaluate, Embed, Views, Figure, Methods, Recipes, Tune, Report, Study, Runs, Sync, Doctor, Completion)
VERBS: dict[str, type[Verb]] = {kind.__name__.lower(): kind for kind in KINDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Return 0 = done, 1 = failed or interrupted, 2 = something must be changed first."""
    try:
        asked = read(VERBS, list(sys.argv[1:] if argv is None else argv))
        if asked is None:
            return 0
        verb, settings = asked
        if "--help" not in settings:
            early.check(split(settings), getattr(verb, "recipe", None))
        return verb.run(settings)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
