"""Ray Tune's schedulers and searchers, set up for a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import Searcher

from methods.parts.errors import ConfigError
from pipeline.shell import install
from tuning.sampling import Check, perturb, refusal, setting_checker
from tuning.space import Param, as_value
from tuning.sweep import Sweep, Trial

REDUCTION = 3  # ASHA lets one trial in three go on from a rung


def asha_rungs(grace: int, total: int) -> list[int]:
    """Return the steps before the end at which ASHA decides."""
    rungs = []
    while grace < total:
        rungs.append(grace)
        grace *= REDUCTION
    return rungs


def make_scheduler(sweep: Sweep, params: Sequence[Param]) -> Any:
    """Return the scheduler of a sweep; None = every trial runs to its end."""
    if sweep.scheduler == "asha" and sweep.rungs:
        # ASHA (Li et al. 2018, arXiv:1810.05934); one step past the end, because a trial that gets there finishes and is not cut
        end = sweep.total_steps + 1
        return ASHAScheduler("step", "score", "max", max_t=end, grace_period=sweep.rungs[0], reduction_factor=REDUCTION)
    if sweep.scheduler == "pbt":
        # PBT (Jaderberg et al. 2017, arXiv:1711.09846): a trial in the lowest quarter goes on from one in the highest, with other values;
        # all wait for each other at every exchange, so that the faster machine does not decide who takes over from whom
        return PopulationBasedTraining(
            "step",
            "score",
            "max",
            perturbation_interval=sweep.rungs[0],
            custom_explore_fn=partial(explore, params, np.random.default_rng(sweep.facts["seed"])),
            require_attrs=False,  # a trial that failed has no score
            log_config=False,
            synch=True,
        )
    return None


def explore(params: Sequence[Param], random: np.random.Generator, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a trial that takes over another's state: that one's, with other values."""
    values = {key: as_value(value) for key, value in config["trial"]["values"].items()}
    return {**config, "trial": {**config["trial"], "values": perturb(params, random, values)}}


class OptunaTrials(Searcher):
    """Makes trials of the values that Ray's `OptunaSearch` suggests.

    Each setting gets its seeds, each trial its folder; a setting that cannot work is written down as failed, and another is asked for.
    Optuna is told of the first seed of each setting.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, sweep: Sweep, params: Sequence[Param]) -> None:
        super().__init__(metric="score", mode="max")
        self.path, self.params = sweep.path, list(params)
        self.check: Check | None = None
        self.names: dict[str, str] = {}  # of trials by Ray Tune's id
        self.suggested: set[str] = set()  # names of the trials whose values Optuna suggested and of whose end it waits to be told
        known = [trial for trial in sweep.trials() if trial.has_ended]  # where a search goes on without Ray Tune's own state of it
        self.searcher = optuna_search(params, sweep.facts["seed"] + len(known))  # the same seed would draw the same values again
        for trial in known:
            if trial.score is not None:
                self.searcher.add_evaluated_point(self._encoded(trial.values), trial.score, pruned=trial.status != "finished")

    def suggest(self, trial_id: str) -> Any:
        sweep = Sweep.read(self.path)
        if sweep.stopping:
            return None
        trial = self._waiting(sweep) or self._new(sweep)
        if trial is None:
            return Searcher.FINISHED
        self.names[trial_id] = trial.folder.name
        return {"trial": task_of(trial)}

    def _waiting(self, sweep: Sweep) -> Trial | None:
        """Return a trial that Ray Tune has lost: its snapshot was older than the trial when the driver was killed."""
        known = set(self.names.values())
        return next((t for t in sweep.trials() if not t.has_ended and t.folder.name not in known), None)

    def _new(self, sweep: Sweep) -> Trial | None:
        self.check = self.check or setting_checker(sweep.config())
        base = sweep.config().train.seed
        trials = sweep.trials()
        for number in range(len(trials), sweep.facts["trials"]):
            repeat, name = number % sweep.seeds, f"trial-{number:03d}"
            values = sweep.trial(number - 1).values if repeat else self._decoded(self.searcher.suggest(name))
            error = refusal(self.check, values)
            trial = sweep.add(number, values, base + repeat, error)
            if error is None:
                self.suggested |= set() if repeat else {name}
                return trial
            if not repeat:
                self.searcher.on_trial_complete(name, error=True)
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        name = self.names[trial_id]
        if name in self.suggested and "score" in result:
            self.searcher.on_trial_result(name, {"score": result["score"], "training_iteration": result["step"]})

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        name = self.names[trial_id]
        if name in self.suggested:
            result = result or {}
            self.on_trial_result(trial_id, result)
            self.suggested.remove(name)
            # without a score Optuna takes a trial as cut where it was last measured, or as failed
            told = {"score": result["score"]} if result.get("state") == "finished" else None
            self.searcher.on_trial_complete(name, told, error=error or "score" not in result)

    def get_state(self) -> dict[str, Any]:
        """Return what Ray Tune keeps; it keeps the state of `searcher` by itself."""
        return {"names": dict(self.names), "suggested": set(self.suggested)}

    def set_state(self, state: dict[str, Any]) -> None:
        self.names, self.suggested = state["names"], state["suggested"]

    # Optuna takes plain values only, so a choice goes as its place in the list
    def _encoded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {p.key: p.choices.index(values[p.key]) if p.choices else values[p.key] for p in self.params}

    def _decoded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {p.key: p.choices[values[p.key]] if p.choices else values[p.key] for p in self.params}


def optuna_search(params: Sequence[Param], seed: int) -> Any:
    """Return Ray's `OptunaSearch` over the params.

    Raises:
        ConfigError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        remedy = f"install it with `{install('tuning')}`, or use --search random"
        raise ConfigError(f"--search optuna: Optuna is not installed; {remedy}") from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = OptunaSearch.convert_search_space({param.key: _domain(param) for param in params})
    return OptunaSearch(space, metric="score", mode="max", seed=seed)


def _domain(param: Param) -> Any:
    if param.choices:
        return tune.choice(list(range(len(param.choices))))
    whole, low, high = param.whole or param.scale == "int", param.low or 0, param.high or 0
    if whole:
        draw = tune.lograndint if param.scale == "log" else tune.randint
        return draw(round(low), round(high) + 1)
    return (tune.loguniform if param.scale == "log" else tune.uniform)(low, high)


def task_of(trial: Trial) -> dict[str, Any]:
    """Return what Ray Tune hands from the driver to a trial."""
    return {"name": trial.folder.name, "values": trial.values}
