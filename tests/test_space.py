"""Ranges by dotted name: those that stand beside settings, those on the command line, and the values in them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from methods.parts.errors import ConfigError
from pipeline.config import RunConfig, flatten, override
from pipeline.recipes import load_recipe
from tuning.space import Param, parse_space, search_ranges

SWAV = load_recipe("swav-small")


def one(word: str, config: RunConfig = SWAV) -> Param:
    (param,) = parse_space([word], config)
    return param


@pytest.mark.parametrize("recipe", ["swav-small", "coke-small", "msn-small", "dino-small", "moco-v2-small", "byol-small", "nnclr-small"])
def test_stated_ranges_give_values_that_an_override_accepts(recipe: str) -> None:
    config = load_recipe(recipe)
    for key, search in search_ranges(config).items():
        assert search.reason and key in flatten(config)
        if search.around is not None and not flatten(config)[key]:
            continue
        for value in one(key, config).corners():
            try:
                assert flatten(override(config, {key: value}))[key] == value
            except ConfigError as error:  # a queue is held against the batch by the method, not here
                raise AssertionError(f"{key}={value}: {error}") from None


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("swav-small", {"method.temperature", "method.epsilon", "method.num_prototypes", "method.queue_length", "views.local.count"}),
        ("swav-small", {"optim.base_lr", "optim.weight_decay", "train.global_batch_size", "views.global.scale"}),
        ("coke-small", {"method.constraint_ratio", "method.temperature"}),
        ("msn-small", {"method.mask_ratio", "method.target_temperature", "method.momentum"}),
        ("dino-small", {"method.teacher_temperature", "method.momentum"}),
        ("moco-v2-small", {"method.queue_length", "method.momentum"}),
    ],
)
def test_what_people_search_states_a_range(recipe: str, keys: set[str]) -> None:
    assert keys <= set(search_ranges(load_recipe(recipe)))


def test_scales_and_their_values() -> None:
    log = one("method.temperature=log:0.05:0.5")
    assert (log.at(0.0), log.at(1.0)) == (0.05, 0.5)
    assert log.at(0.5) == pytest.approx(0.05 * 10**0.5, rel=1e-3), "the geometric middle"
    assert one("optim.warmup_epochs=linear:0:2").at(0.25) == 0.5
    whole = one("method.num_prototypes=log:16:256")
    assert isinstance(whole.at(0.3), int) and whole.at(0.5) == 64, "a whole setting stays whole"
    drawn = [one("views.local.count=int:2:4").at(u) for u in np.linspace(0, 0.999, 300)]
    assert [drawn.count(n) for n in (2, 3, 4)] == [100, 100, 100], "both ends, equally often"
    choice = one("method.num_prototypes=choice:100,300,1000")
    assert [choice.at(u) for u in (0.0, 0.34, 0.99, 1.0)] == [100, 300, 1000, 1000]
    assert one("backbone.name=choice:resnet18,resnet34").choices == ("resnet18", "resnet34")
    assert one("views.local.scale=choice:[0.05,0.3],[0.1,0.5]").choices == ((0.05, 0.3), (0.1, 0.5))
    assert one("optim.weight_decay=choice:0,1e-4").choices == (0.0, 1e-4)


def test_a_grid_has_both_ends_and_no_value_twice() -> None:
    assert one("optim.warmup_epochs=linear:0:3").grid(4) == [0.0, 1.0, 2.0, 3.0]
    assert one("views.local.count=int:2:3").grid(4) == [2, 3]
    assert one("method.num_prototypes=choice:16,32").grid(9) == [16, 32]


def test_a_param_reads_as_it_was_written_and_knows_where_a_value_lies() -> None:
    words = ["method.temperature=log:0.05:0.5", "views.local.count=int:2:6", "views.local.scale=choice:[0.05,0.3],[0.1,0.5]"]
    for word in [*words, "method.num_prototypes=choice:100,300", "backbone.name=choice:resnet18,resnet34"]:
        param = one(word)
        assert one(f"{param.key}={param.text}") == param
        read = Param.from_dict(param.key, json.loads(json.dumps(param.to_dict())))
        assert dataclasses.replace(read, whole=param.whole) == param
        for u in (0.1, 0.6, 0.9):
            assert param.at(param.position(param.at(u))) == param.at(u)


def test_a_range_around_the_recipes_own_value() -> None:
    param = one("optim.base_lr")
    assert (param.low, param.high) == (pytest.approx(SWAV.optim.base_lr / 4), pytest.approx(SWAV.optim.base_lr * 4))
    assert param.scale == "log" and "recipe" in param.reason


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("method.temperatur=log:0.1:1", "did you mean method.temperature"),
        ("method.temperature=log:0:1", "begins above 0"),
        ("method.temperature=log:0.5:0.1", "use low < high"),
        ("method.temperature=cubic:0:1", "no such scale"),
        ("method.temperature=log:a:b", "not a range"),
        ("method.temperature=choice:", "needs values"),
        ("method.temperature=choice:warm,hot", "not of the kind of 0.1"),
        ("method.num_prototypes=choice:16.5", "not of the kind of 64"),
        ("views.local.count=int:1.5:3", "not whole numbers"),
        ("backbone.name=linear:0:1", "this setting is no number"),
        ("data.path", "no range stands beside this setting"),
    ],
)
def test_mistakes_are_one_sentence(word: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_space([word], SWAV)


def test_crops_go_by_global_and_local_whatever_a_recipe_names_them() -> None:
    config = load_recipe("moco-v3-small")
    stated, given = parse_space(["views.global.scale", "views.global.grayscale=choice:0,0.2"], config)
    assert stated.choices == one("views.first.scale", config).choices
    for knob in (stated, given):
        flat = flatten(override(config, {knob.key: knob.choices[-1]}))
        assert [flat[f"views.{group}.{knob.key.rsplit('.')[-1]}"] for group in ("first", "second")] == [knob.choices[-1]] * 2
    with pytest.raises(ConfigError, match="given twice"):
        parse_space(["views.global.scale", "views.second.scale"], config)


def test_the_same_key_twice_and_none_at_all() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        parse_space(["method.temperature", "method.temperature=log:0.1:1"], SWAV)
    with pytest.raises(ConfigError, match="--space: missing"):
        parse_space([], SWAV)
