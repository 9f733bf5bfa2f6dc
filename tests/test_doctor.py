"""The doctor: a row and a remedy for what is wrong, never an exception."""

from __future__ import annotations

import http.server
import io
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import machine
from pipeline.config import DataConfig
from pipeline.doctor import report
from pipeline.machine import Check


def find(checks: list[Check], name: str) -> Check:
    (check,) = [c for c in checks if c.name == name]
    return check


def jpeg(side: int = 24) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for i in range(20):
        place = root / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:02d}.jpg").write_bytes(jpeg(24 + i))
    return root


@contextmanager
def server(status: int, words: bytes) -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(words)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{it.server_port}/"
        it.shutdown()


def look(tmp_path: Path, **given: object) -> list[Check]:
    return report.diagnose(**{"runs_dir": tmp_path / "runs", "ray": False, **given})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- the whole


def test_a_healthy_folder(tmp_path: Path, folder: Path) -> None:
    checks = look(tmp_path, data=DataConfig(path=str(folder)))
    names = [check.name for check in checks]
    assert {"Python", "packages", "cores", "memory", "bf16", "disk", "tracking", "data", "decode"} <= set(names)
    assert [c for c in checks if c.ok == "fail"] == []
    assert find(checks, "data").found.startswith("20 images, 20 labelled in 2 classes")
    assert find(checks, "decode").found.startswith("20 of 20 sampled, 34 × 34 px")
    assert not (tmp_path / "runs").exists()  # looking leaves nothing behind


def test_every_complaint_has_a_remedy(tmp_path: Path) -> None:
    checks = look(tmp_path, data=DataConfig(path=str(tmp_path / "nowhere")), uri="file:mlruns")
    wrong = [c for c in checks if c.ok != "ok"]
    assert {"data", "tracking"} <= {c.name for c in wrong}
    assert all(c.remedy for c in wrong)


def test_a_check_that_breaks_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Check]:
        raise OSError("the sensor is gone\nsecond line")

    monkeypatch.setattr(machine, "cores_and_memory", broken)
    checks = look(tmp_path)
    assert find(checks, "machine") == Check("machine", "fail", "OSError: the sensor is gone", find(checks, "machine").remedy)
    assert find(checks, "disk").ok == "ok"  # the others are still made


def test_the_table_prints_paths_as_they_are() -> None:
    from rich.console import Console

    out = io.StringIO()
    table = report.render([Check("disk", "fail", "at [/data] [bold]", "free some"), Check("cores", "ok", "2 cores")])
    Console(file=out, width=100).print(table)
    words = out.getvalue()
    assert "[/data] [bold]" in words and "✗ fix" in words and "free some" in words and "✓ ok" in words


# ---------------------------------------------------------------------------- data


def test_bad_images_are_counted_and_listed(tmp_path: Path, folder: Path) -> None:
    (folder / "cat" / "01.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("hello")
    checks = look(tmp_path, data=DataConfig(path=str(folder)))
    bad = find(checks, "bad images")
    assert bad.ok == "warn" and bad.found.startswith("1 of 20 sampled") and "01.jpg" in bad.found
    assert "notes.txt" in find(checks, "stray files").found
    assert find(checks, "decode").found.startswith("19 of 20")


def test_too_many_bad_images_fail(tmp_path: Path, folder: Path) -> None:
    for file in (folder / "cat").iterdir():
        file.write_bytes(jpeg()[:100])
    bad = find(look(tmp_path, data=DataConfig(path=str(folder))), "bad images")
    assert bad.ok == "fail" and bad.found.startswith("10 of 20") and "1%" in bad.remedy
    assert find(look(tmp_path, data=DataConfig(path=str(folder), max_bad_fraction=0.6)), "bad images").ok == "warn"


def test_a_large_sample_is_spread_over_the_data(tmp_path: Path) -> None:
    class Fake:
        asked: list[int] = []

        def __len__(self) -> int:
            return 1_000_000

        def describe(self) -> str:
            return "1,000,000 images"

    from pipeline.data import image_dataset
    from pipeline.data.sources import base

    fake = Fake()
    fake.labels, fake.class_names, fake.skipped = np.full(10, -1), [], []  # type: ignore[attr-defined]

    def read(ids: list[int]) -> list[image_dataset.Sample]:
        fake.asked += ids
        return [image_dataset.Sample(ids[0], jpeg(), -1, "x")]

    fake.read = read  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "open_source", lambda _: fake)
        checks = look(tmp_path, data=DataConfig())
    assert len(set(fake.asked)) == report.DECODED_IMAGES and min(fake.asked) == 0 and max(fake.asked) == 999_999
    assert "no labels" in find(checks, "data").found


def test_a_timed_dry_run_and_a_batch_that_does_not_fit(tmp_path: Path) -> None:
    from pipeline.config import override
    from pipeline.recipes import load_recipe

    config = override(load_recipe("swav-small"), {"data.path": "patches:per_photo=20", "train.steps": 100})
    fits = find(look(tmp_path, config=config), "timed dry run")
    assert fits.ok == "ok" and "images/s" in fits.found and "100 steps" in fits.found
    too_large = find(look(tmp_path, config=override(config, {"train.global_batch_size": 80_000})), "timed dry run")
    assert too_large.ok == "fail" and too_large.found == "train.global_batch_size=80000"


# ---------------------------------------------------------------------------- machine


def test_a_runs_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").write_text("a file")
    assert find(look(tmp_path), "disk").ok == "fail"

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    check = find(report.diagnose(runs_dir=tmp_path / "other", ray=False), "disk")
    assert check.ok == "fail" and "Permission denied" in check.found and "--runs-dir" in check.remedy


@pytest.mark.parametrize(("free", "verdict"), [(6, "ok"), (3, "warn"), (0.5, "fail")])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, verdict: str) -> None:
    usage = type("Usage", (), {"free": free * machine.GIB})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    (check,) = machine.disk(tmp_path)
    assert check.ok == verdict and bool(check.remedy) == (verdict != "ok")


def test_missing_and_untested_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "project", lambda: (">=3.99", ["numpy>=2,<3", "pillow>=900", "no-such-package[extra]>=1,<2"]))
    missing, outside = machine.packages()
    assert missing.ok == "fail" and missing.remedy.endswith("-m pip install 'no-such-package<2,>=1'")
    assert outside.ok == "warn" and "pillow" in outside.found and "numpy" not in outside.found
    (python,) = machine.python_version()
    assert python.ok == "fail" and ">=3.99" in python.remedy


@pytest.mark.parametrize(
    ("cores", "load", "verdict", "word"), [(8, 0.5, "ok", ""), (8, 9.0, "warn", "other programs"), (1, 0.5, "warn", "2 or more")]
)
def test_few_or_busy_cores(monkeypatch: pytest.MonkeyPatch, cores: int, load: float, verdict: str, word: str) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: cores)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0))
    check = next(iter(machine.cores_and_memory()))
    assert check.ok == verdict and word in check.remedy and f"load {load}" in check.found


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_cores_respect_the_affinity_mask() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert machine.available_cores() <= 1
    finally:
        os.sched_setaffinity(0, before)


# ---------------------------------------------------------------------------- services


def test_a_tracking_server_that_answers_refuses_or_is_down(tmp_path: Path) -> None:
    with server(200, b"OK") as uri:
        assert find(look(tmp_path, uri=uri), "tracking").ok == "ok"
    assert find(look(tmp_path, uri=uri), "tracking").ok == "fail"  # now it is down
    with server(401, b"") as uri:
        check = find(look(tmp_path, uri=uri), "tracking")
        assert check.ok == "fail" and "MLFLOW_TRACKING_USERNAME" in check.remedy
    with server(200, b"<html>a coffee machine") as uri:
        assert find(look(tmp_path, uri=uri), "tracking").ok == "warn"


def test_a_tracking_database_that_is_whole_locked_or_broken(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "mlflow.db"
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE t (x)")
        assert find(look(tmp_path), "tracking").ok == "ok"
        database.execute("BEGIN EXCLUSIVE")
        assert "locked" in find(look(tmp_path), "tracking").found
    file.write_bytes(b"this is no database, whatever its name says" * 100)
    check = find(look(tmp_path, uri=f"sqlite:///{file}"), "tracking")
    assert check.ok == "fail" and "not a database" in check.found


def test_ray_sends_a_task_round(tmp_path: Path, ray_local: None) -> None:
    import ray

    check = find(report.diagnose(runs_dir=tmp_path), "Ray")
    assert check.ok == "ok" and "CPUs" in check.found
    assert ray.is_initialized()  # a Ray that was there before stays
