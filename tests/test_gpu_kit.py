"""The benchmark for GPUs runs to its end without one, so that its code is right on the day there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.e2e
@pytest.mark.slow
def test_the_benchmark_measures_a_tiny_recipe_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--seconds", "0.2", "--recipe", "simclr", "--json", str(file)]
    done = subprocess.run([*BENCHMARK, *words], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert found["device"] == "CPU" and row["recipe"] == "simclr" and row["images"] == 16
    for key in ("loader", "step", "fed", "float32_step", "bf16_gain", "launches", "colour_launches"):
        assert row[key] > 0, key
    assert row["colour_launches"] < row["launches"] and row["wait_ms"] >= 0 and row["memory_gib"] is None
    assert "| simclr | 16 |" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", "gpu.json"])
    gpu.main()
    assert "No GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())
