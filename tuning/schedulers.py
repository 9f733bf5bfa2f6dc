"""Who is tried next, who is cut, and who takes over another's state: Ray Tune's schedulers, fed from the sweep's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import Searcher

from methods.parts.errors import ConfigError
from tuning.sampling import as_value, explored
from tuning.space import Knob

REDUCTION = 3  # of the trials at a rung, one in so many goes on
Task = dict[str, Any]


def rungs(grace: int, total: int, reduction: int = REDUCTION) -> list[int]:
    """Steps at which ASHA decides: the grace period, and each time `reduction` times as many, before the end."""
    found = []
    while grace < total:
        found.append(grace)
        grace *= reduction
    return found


class Halving(ASHAScheduler):
    """ASHA (Li et al. 2018, arXiv:1810.05934) that knows trials by their number, so that a sweep can go on in a new process."""

    def __init__(self, grace: int, total: int) -> None:
        # one more than the last step: a trial that reaches its end finishes, it is not cut
        super().__init__("step", "score", "max", max_t=total + 1, grace_period=grace, reduction_factor=REDUCTION)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _by_number(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(super().on_trial_result(tune_controller, _by_number(trial), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _by_number(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _by_number(trial))

    def replay(self, number: int, scores: Sequence[tuple[int, float]]) -> None:
        """What an earlier process saw of a trial: (step, score) in order."""
        trial = SimpleNamespace(config={"number": number})
        self.on_trial_add(None, trial)
        for step, score in scores:
            self.on_trial_result(None, trial, {"step": step, "score": score})


def _by_number(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["number"])


class Population(PopulationBasedTraining):
    """PBT (Jaderberg et al. 2017, arXiv:1711.09846): a trial in the lowest quarter goes on from one in the highest, with other values."""

    def __init__(self, every: int, knobs: Sequence[Knob], seed: int) -> None:
        # all wait for each other at every exchange: who takes over from whom does not depend on whose machine is faster
        super().__init__(
            "step", "score", "max", perturbation_interval=every, custom_explore_fn=lambda config: config, log_config=False, synch=True
        )
        self.knobs, self.random = knobs, np.random.default_rng(seed)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # Ray refuses any search algorithm beside PBT, since its values would be overwritten; ours only hands out the population
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        values = explored(self.knobs, trial_to_clone.config["values"], self.random)
        came = [*trial.config["from"], trial_to_clone.config["number"]]
        return trial.config | {"values": values, "from": came}, {}


class Queue(Searcher):
    """The next trial for Ray Tune: those that wait, then those that `more` makes up.

    Args:
        more: the next trial, or None when there are enough.
        ended: told of every trial that ended: its number and last result.
        stop: asked before each; True = no other begins.
    """

    def __init__(
        self,
        waiting: list[Task],
        more: Callable[[], Task | None],
        ended: Callable[[int, dict[str, Any]], None],
        stop: Callable[[], bool],
    ) -> None:
        super().__init__(metric="score", mode="max")
        self.waiting, self.more, self.ended, self.stop = waiting, more, ended, stop
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        task = None if self.stop() else self.waiting.pop(0) if self.waiting else self.more()
        if task is None:
            return Searcher.FINISHED
        self.numbers[trial_id] = task["number"]
        return task

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.ended(self.numbers[trial_id], result or {})

    def __reduce__(self) -> Any:
        return object, ()  # a sweep goes on from its folder, not from Ray Tune's snapshots

    def get_state(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


class Optuna:
    """Values by Optuna's TPE, told of every trial that ended, one that was cut with the step at which it was.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, knobs: Sequence[Knob], seed: int, known: Sequence[dict[str, Any]]) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError('--search optuna: Optuna is not installed; pip install -e ".[tuning]", or use --search random') from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.knobs = optuna, knobs
        # other seed with each life, or the second would begin by trying what the first has tried
        self.study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed + len(known)))
        self.spaces = {knob.key: self._distribution(knob) for knob in knobs}
        self.open: dict[int, Any] = {}
        for facts in known:
            place = {
                k.key: k.choices.index(as_value(facts["values"][k.key])) if k.scale == "choice" else facts["values"][k.key] for k in knobs
            }
            score, done = facts["score"], facts["status"] == "finished"
            if score is not None:
                state = optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.PRUNED
                seen = {facts["step"]: score}
                kind = {"params": place, "distributions": self.spaces, "intermediate_values": seen, "state": state}
                self.study.add_trial(optuna.trial.create_trial(value=score, **kind))

    def _distribution(self, knob: Knob) -> Any:
        kinds = self.optuna.distributions
        if knob.scale == "choice":
            return kinds.CategoricalDistribution(list(range(len(knob.choices))))  # places: Optuna takes plain values only
        if knob.whole or knob.scale == "int":
            return kinds.IntDistribution(int(knob.low or 0), int(knob.high or 0), log=knob.scale == "log")
        return kinds.FloatDistribution(knob.low, knob.high, log=knob.scale == "log")

    def ask(self, number: int) -> dict[str, Any]:
        """Values for trial `number`."""
        trial = self.open[number] = self.study.ask(self.spaces)
        return {k.key: k.choices[trial.params[k.key]] if k.scale == "choice" else trial.params[k.key] for k in self.knobs}

    def tell(self, number: int, result: dict[str, Any]) -> None:
        """How trial `number` ended."""
        trial, states = self.open.pop(number, None), self.optuna.trial.TrialState
        if trial is None:
            return
        if "score" not in result:
            self.study.tell(trial, state=states.FAIL)
        elif result.get("state") == "finished":
            self.study.tell(trial, result["score"])
        else:
            trial.report(result["score"], result["step"])
            self.study.tell(trial, state=states.PRUNED)
