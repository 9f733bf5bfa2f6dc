"""Overrides, YAML, rules into numbers, recipes."""

from __future__ import annotations

import re

import pytest
import yaml

from methods.parts.errors import RENAMED, ConfigError
from pipeline.cli.overrides import parse_settings
from pipeline.config import flatten, from_yaml, override, to_yaml
from pipeline.recipes import entries, load_recipe
from pipeline.resolve import resolve

NAMES = [entry.name for entry in entries()]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_survives_yaml(name: str) -> None:
    config = load_recipe(name)
    assert config.recipe == name
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_resolves_for_an_imagenet_sized_source(name: str) -> None:
    config = load_recipe(name)
    numbers = resolve(config, 1_281_167)
    assert numbers.facts.steps_per_epoch == (config.train.steps_per_epoch or 1_281_167 // config.train.global_batch_size)
    assert numbers.window % numbers.chunk == 0
    assert numbers.chunk * config.data.num_shards == config.train.global_batch_size


def test_recipes_are_listed_with_a_summary() -> None:
    assert {"swav", "swav-imagenet", "swav-batch256", "swav-cifar10", "swav-small", "swav-cifar10-small"} <= set(NAMES)
    assert all(len(entry.summary) > 20 for entry in entries())


def test_paper_settings_of_the_large_run() -> None:
    config = load_recipe("swav-imagenet")
    numbers = resolve(config, 1_281_167)
    assert (numbers.facts.steps_per_epoch, numbers.warmup_steps) == (312, 3120)
    assert (numbers.lr, numbers.start_lr, numbers.final_lr) == (4.8, 0.3, 0.0048)
    small = load_recipe("swav-batch256")
    assert (small.method.queue_length, small.method.queue_start_epoch, small.optim.base_lr) == (3840, 15, 0.6)


@pytest.mark.parametrize(
    ("name", "optim", "lr", "warmup_epochs", "decay", "batch", "epochs", "method"),
    [
        ("simclr", "lars", 4.8, 10, 1e-6, 4096, 1000, {"temperature": 0.1, "projector_layers": 2, "memory_size": 0}),
        ("simclr-v2", "lars", 6.4, 40, 1e-4, 4096, 800, {"projector_layers": 3, "memory_size": 65536, "memory_momentum": 0.999}),
        ("simclr-v2-nomemory", "lars", 6.4, 40, 1e-4, 4096, 800, {"temperature": 0.1, "projector_layers": 3, "memory_size": 0}),
        ("moco-v1", "sgd", 0.03, 0, 1e-4, 256, 200, {"temperature": 0.07, "projector_layers": 1, "queue_length": 65536}),
        ("moco-v2", "sgd", 0.03, 0, 1e-4, 256, 200, {"temperature": 0.2, "projector_layers": 2, "momentum": 0.999}),
        ("nnclr", "lars", 4.8, 10, 1e-6, 4096, 1000, {"temperature": 0.1, "projection_dim": 256, "support_set_size": 98304}),
    ],
)
def test_paper_settings_of_contrastive_recipes(
    name: str, optim: str, lr: float, warmup_epochs: float, decay: float, batch: int, epochs: float, method: dict
) -> None:
    config = load_recipe(name)
    numbers = resolve(config, 1_281_167)
    assert numbers.lr == pytest.approx(lr) and numbers.warmup_steps == warmup_epochs * numbers.facts.steps_per_epoch
    assert (config.optim.name, config.optim.weight_decay) == (optim, decay)
    assert (config.train.global_batch_size, config.train.epochs) == (batch, epochs)
    assert {key: getattr(config.method, key) for key in method} == method
    assert numbers.milestones == ((0.6, 0.8) if name == "moco-v1" else None)
    assert sum(group.count for group in config.views.values()) == 2


def test_overrides_reach_every_level_and_are_validated_together() -> None:
    config = override(load_recipe("swav-small"), {"method.temperature": 0.2, "views.local.count": 5, "train.seed": 7})
    assert (config.method.temperature, config.views["local"].count, config.train.seed) == (0.2, 5, 7)
    assert config.views["global"] == load_recipe("swav-small").views["global"]
    with pytest.raises(ConfigError, match=r"method\.temperature=-1: use a positive number"):
        override(config, {"method.temperature": -1})
    # each of the two alone would be refused
    assert override(config, {"views.local.scale": (0.5, 0.9)}).views["local"].scale == (0.5, 0.9)


@pytest.mark.parametrize(
    ("key", "near"),
    [("method.temperatur", "method.temperature"), ("data.held_aut", "data.held_out"), ("views.local.cuont", "views.local.count")],
)
def test_misspelt_keys_are_refused_with_the_nearest_name(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: no such key; did you mean .*{near}"):
        override(load_recipe("swav-small"), {key: 1})


def test_global_and_local_crops_are_known_to_every_recipe() -> None:
    config = parse_settings(load_recipe("byol"), ["--views.global.size", "32", "--views.global.scale", "0.3", "1.0"], "x")
    assert [(group.size, group.scale) for group in config.views.values()] == [(32, (0.3, 1.0))] * 2
    sizes = {"views.global.size": 48, "views.local.size": 24, "views.local.count": 3}
    crops = {name: (group.count, group.size) for name, group in override(load_recipe("msn-vits16"), sizes).views.items()}
    assert crops == {"target": (1, 48), "random": (1, 48), "focal": (3, 24)}
    with pytest.raises(ConfigError, match=r"views\.global\.count: no such key; did you mean .*views\.first\.count"):
        override(load_recipe("byol"), {"views.global.count": 2})
    with pytest.raises(ConfigError, match=r"views\.local\.size: no such key"):
        override(load_recipe("byol"), {"views.local.size": 16})


@pytest.mark.parametrize(
    ("words", "column_term"),
    [
        (["--method.column_term"], True),
        (["--method.column-term", "--train.steps", "3"], True),
        (["--method.column_term", "True", "--train.steps", "3"], True),
        (["--method.column_term=true", "--method.no-column-term"], False),
        (["--method.column_term", "--method.column_term=false"], False),
        (["--method.column_term", "--method.column_term", "false"], False),
    ],
)
def test_a_switch_takes_the_value_that_advice_gives_it(words: list[str], column_term: bool) -> None:
    config = parse_settings(load_recipe("nnclr-small"), words, "manyviews pretrain")
    assert config.method.column_term is column_term  # type: ignore[attr-defined]
    assert ("--train.steps" in words) == (config.train.steps == 3)


@pytest.mark.parametrize("words", [["--method.column_term=maybe"], ["--method.column_term", "maybe"]])
def test_a_switch_with_another_value_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"method\.column_term=maybe: .*true or false"):
        parse_settings(load_recipe("nnclr-small"), words, "manyviews pretrain")


def test_a_length_in_epochs_replaces_one_in_steps() -> None:
    config = load_recipe("swav-small")
    assert config.train.steps is not None
    assert resolve(override(config, {"train.epochs": 3}), 1280).facts.total_steps == 30
    assert resolve(override(config, {"train.epochs": 3, "train.steps": 4}), 1280).facts.total_steps == 4


def test_learning_rate_rules() -> None:
    config = override(load_recipe("swav-batch256"), {"train.global_batch_size": 64, "optim.lr_rule": "linear", "optim.final_lr": 0.4})
    assert resolve(config, 1000).lr == pytest.approx(0.6 / 4)
    assert resolve(config, 1000).final_lr == pytest.approx(0.1)
    assert resolve(override(config, {"optim.lr_rule": "sqrt"}), 1000).lr == pytest.approx(0.3)


def test_a_batch_larger_than_the_data_names_a_size_that_works() -> None:
    config = load_recipe("swav-small")
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=128: larger than the 100 training images; use 96 or fewer"):
        resolve(config, 100)
    assert resolve(override(config, {"train.global_batch_size": 96}), 100).facts.steps_per_epoch == 1


def test_a_batch_that_lanes_cannot_share_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=100: not a multiple of data\.num_shards=8; use 96 or 104"):
        resolve(override(load_recipe("swav-small"), {"train.global_batch_size": 100}), 1000)


def test_yaml_with_an_unknown_key_is_refused() -> None:
    text = to_yaml(load_recipe("swav-small")).replace("held_out:", "held_uot:")
    with pytest.raises(ConfigError, match=r"data\.held_uot: no such key; did you mean data\.held_out"):
        from_yaml(text)


def test_flat_names_are_unique_and_complete() -> None:
    flat = flatten(load_recipe("swav"))
    assert flat["views.global.size"] == 224
    assert flat["method.num_prototypes"] == 300
    assert not any(isinstance(value, dict) for value in flat.values())


def test_settings_that_had_other_names_are_read_in_old_files_and_refused_by_them() -> None:
    config = override(load_recipe("msn-small"), {"data.num_shards": 4, "data.augment_on": "tasks", "train.resource_timeout_s": 7.0})
    old = to_yaml(config).replace("num_shards:", "lanes:").replace("images_per_task:", "window:").replace("augment_on:", "finish:")
    old = old.replace("zero_lr_epochs:", "idle_epochs:").replace("schedule_stretch:", "horizon:").replace("resource_timeout_s:", "wait_s:")
    assert from_yaml(old) == config and set(RENAMED) <= {
        f"{s}.{k}" for s, keys in yaml.safe_load(old).items() if isinstance(keys, dict) for k in keys
    }
    for key, new in RENAMED.items():
        with pytest.raises(ConfigError, match=f"^{re.escape(key)}: is called {re.escape(new)} now$"):
            override(config, {key: 1})


def test_a_value_that_had_another_name_is_read_in_old_files_and_refused_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    import manyviews

    config = override(load_recipe("msn-small"), {"data.augment_on": "tasks"})
    assert from_yaml(to_yaml(config).replace("augment_on: tasks", "augment_on: workers")) == config
    with pytest.raises(ConfigError, match=r"^data\.augment_on=workers: use device, or tasks "):
        override(config, {"data.augment_on": "workers"})
    assert manyviews.main(["pretrain", "msn-small", "--data.augment-on", "workers"]) == 2
    assert "tasks" in capsys.readouterr().err
@pytest.mark.parametrize("name", ["msn-small", "dino-small", "coke-two-views", "byol-small"])
def test_files_from_before_groups_had_roles_are_read(name: str) -> None:
    config = load_recipe(name)
    tree = yaml.safe_load(to_yaml(config))
    for group in tree["views"].values():
        del group["role"]
    assert from_yaml(yaml.safe_dump(tree)) == config
