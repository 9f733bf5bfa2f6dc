"""Setting a training process up: precision, determinism, and advice about memory and idle GPUs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from methods.parts.errors import ConfigError
from pipeline import machine
from pipeline.config import RunConfig, TrainConfig, override
from pipeline.machine import choose_device, memory_advice, set_precision
from pipeline.recipes import load_recipe
from pipeline.train import placement

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def restored_flags() -> object:
    backends = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), backends.allow_tf32, backends.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    backends.allow_tf32, backends.benchmark = before[1:]
    torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("asked", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_auto_does_not_take_bf16_that_a_gpu_only_emulates(monkeypatch: pytest.MonkeyPatch, asked: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)  # a V100 or T4
    assert choose_device(RunConfig(train=TrainConfig(precision=asked))) == (CUDA, dtype)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_cpu_takes_bf16_with_amx_only(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "cpu_has", lambda feature: native and feature == "amx_bf16")
    assert choose_device(RunConfig()) == (CPU, dtype)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_float32_is_never_tf32(restored_flags: None, device: torch.device) -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    set_precision(device)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark is (device.type == "cuda")


def test_deterministic_mode_is_set_on_a_cpu_and_refused_on_a_gpu(restored_flags: None) -> None:
    with pytest.raises(ConfigError, match=r"^train\.deterministic=True: .*CUDA_VISIBLE_DEVICES="):
        set_precision(CUDA, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    set_precision(CPU, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------------------- out of memory

FULL = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is free. Process 7 has"


def config_warnings(recipe: str, **changes: object) -> str:
    config = override(load_recipe(recipe), {f"train.{key}": value for key, value in changes.items()})
    return memory_advice(torch.OutOfMemoryError(FULL), config)


def test_out_of_memory_names_what_was_asked_and_the_settings_that_need_less() -> None:
    words = config_warnings("mae-vitb16", precision="float32")
    assert "Tried to allocate 2.50 GiB" in words and "79.10 GiB" in words and "Process 7" not in words
    assert "train.global_batch_size=4096" in words and "train.accumulation_steps=1" in words and "train.workers=0" in words
    assert "--train.gradient-checkpointing" in words and "train.precision=bf16" in words


def test_out_of_memory_names_no_setting_that_would_be_refused_or_is_on() -> None:
    assert "accumulation" not in config_warnings("swav-imagenet"), "codes need the whole batch"
    assert "checkpointing" not in config_warnings("moco-v2"), "a ResNet has none"
    assert "checkpointing" not in config_warnings("mae-vitb16", gradient_checkpointing=True)
    assert "precision" not in config_warnings("mae-vitb16", precision="bf16")


# ---------------------------------------------------------------------------- idle GPUs


@pytest.mark.parametrize(
    ("gpus", "here", "workers", "words"),
    [
        (8, True, 0, "uses one of 8 GPUs; --train.workers 8 trains on 8"),
        (6, True, 0, "--train.workers 4 trains on 4"),  # divides the eight shards
        (2, False, 0, "uses none of 2 GPUs; --train.workers 2"),  # a driver without a GPU
        (1, True, 0, ""),
        (0, False, 0, ""),
        (8, True, 8, ""),
        (8, True, "2:8", ""),
    ],
)
def test_gpus_left_idle_are_told(monkeypatch: pytest.MonkeyPatch, gpus: int, here: bool, workers: int | str, words: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    sentences = placement.placement_advice(override(load_recipe("moco-v2"), {"train.workers": workers}), gpus)
    assert (words in sentences[0]) if words else sentences == []


def test_lanes_that_no_two_workers_can_share_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (sentence,) = placement.placement_advice(override(load_recipe("moco-v2"), {"data.num_shards": 1}), 4)
    assert "data.num_shards=1" in sentence and "--train.workers 4" in sentence


@pytest.mark.parametrize(
    ("recipe", "workers", "enough"),
    [("swav-imagenet", 0, 8), ("swav-imagenet", 8, None), ("mae-vitb16", 0, 2), ("simclr", 2, 4), ("swav-batch256", 0, None)],
)
def test_a_batch_for_many_gpus_on_few_processes_is_told(recipe: str, workers: int, enough: int | None) -> None:
    sentences = placement.placement_advice(override(load_recipe(recipe), {"train.workers": workers}), 0)
    assert [f"--train.workers {enough}" in s for s in sentences] == ([] if enough is None else [True])


def test_small_recipes_get_no_advice() -> None:
    for recipe in ("swav-small", "dino-small", "swav-photos-small"):
        assert placement.placement_advice(load_recipe(recipe), 0) == []


def test_micro_batches_count_as_a_smaller_batch() -> None:
    config = load_recipe("mae-vitb16")
    assert placement.placement_advice(dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=4)), 0) == []
