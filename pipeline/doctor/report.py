"""The doctor's report: one row for each check, with a remedy. Nothing here raises."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.parts.errors import ConfigError
from pipeline import machine
from pipeline.config import DataConfig, RunConfig
from pipeline.data.ray_data import joins_cluster
from pipeline.doctor import cluster, throughput
from pipeline.machine import Check

if TYPE_CHECKING:
    from rich.table import Table

DECODED_IMAGES = 64  # at most, evenly spread over the source


def diagnose(
    *, data: DataConfig | None = None, runs_dir: Path, uri: str | None = None, config: RunConfig | None = None, ray: bool = True
) -> list[Check]:
    """Check the machine, Ray, the tracking server and the data. A check that raises becomes a row.

    Args:
        data: the images to open; None = those of `config`, or no such check.
        runs_dir: folder for runs; it is not created.
        uri: tracking server; None = the SQLite file in `runs_dir`.
        config: a run for a timed dry run, which gives images/s and hours.
        ray: start Ray and run one task; in a cluster (RAY_ADDRESS) check every node.
    """
    runs_dir = Path(runs_dir).expanduser()
    data = data or (config.data if config else None)
    checks: list[Check] = []
    for name, look in (
        ("Python", machine.python_version),
        ("packages", machine.packages),
        ("machine", machine.cores_and_memory),
        ("device", machine.device),
        ("shared memory", machine.shared_memory),
        ("disk", lambda: machine.disk(runs_dir)),
        ("tracking", lambda: _tracking(runs_dir, uri)),
    ):
        checks += _guard(name, look)
    if ray and joins_cluster():
        checks += _guard("cluster", lambda: cluster.checks(runs_dir, config, uri))
    else:
        checks += _guard("Ray", _ray) if ray else []
        checks += _guard("workers", lambda: cluster.check_placement(config)) if config else []
    if data is not None:
        checks += _guard("data", lambda: _data(data, config))
    return checks


def render(checks: Iterable[Check]) -> Table:
    """Return the checks as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    verdicts = {"ok": ("✓ ok", "green"), "warn": ("! look", "yellow"), "fail": ("✗ fix", "bold red")}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        # Text, because rich reads square brackets in paths as markup
        table.add_row(Text(check.name), Text(*verdicts[check.ok]), Text(check.found), Text(check.remedy))
    return table


def _guard(name: str, look: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(look())
    except ConfigError as error:
        key, _, remedy = str(error).partition(": ")
        return [Check(name, "fail", key, remedy or key)]
    except Exception as error:  # a failing check is a row
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return [Check(name, "fail", f"{type(error).__name__}: {reason}", "this check itself broke; the error is on the left")]


# ---------------------------------------------------------------------------- services


def _tracking(runs_dir: Path, uri: str | None) -> Iterable[Check]:
    from pipeline.tracking.run_tracker import default_uri

    uri = uri or default_uri(runs_dir)
    if uri.startswith("sqlite:///"):
        yield _sqlite(Path(uri.removeprefix("sqlite:///")))
    elif uri.startswith(("http://", "https://")):
        yield _server(uri.rstrip("/"))
    elif uri.startswith(("postgresql", "mysql", "mssql", "databricks")):
        yield Check("tracking", "warn", uri.split("@")[-1], "a database or Databricks is not tried from here; the first run will tell")
    else:
        yield Check("tracking", "fail", f"track.uri={uri}", "use http://HOST:PORT, sqlite:////ABSOLUTE/PATH.db, or leave it out")


def _sqlite(file: Path) -> Check:
    if not file.exists():
        place = file.resolve().parent
        while not place.exists():
            place = place.parent
        good = os.access(place, os.W_OK)
        return Check("tracking", "ok" if good else "fail", f"{file}, made by the first run", "" if good else f"make {place} writable")
    try:
        with closing(sqlite3.connect(file, timeout=2)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        return Check("tracking", "fail", f"{file}: {error}", "close what else uses it, or move it away: a new one is made")
    return Check("tracking", "ok", f"{file}, {file.stat().st_size / 2**20:.1f} MiB")


def _server(uri: str, timeout_s: float = 3.0) -> Check:
    import urllib.error
    import urllib.request

    start = time.perf_counter()
    remedy = "start it (mlflow server), or check --track.uri; training goes on without it, `sync RUN` sends the figures later"
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=timeout_s) as answer:
            body = answer.read(64).decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return Check("tracking", "fail", f"{uri} answers {error.code} {error.reason}", remedy)
    except (OSError, ValueError) as error:
        return Check("tracking", "fail", f"{uri}: {getattr(error, 'reason', error)}", remedy)
    if body != "OK":
        return Check("tracking", "warn", f"{uri} answers, but not as MLflow does", remedy)
    return Check("tracking", "ok", f"{uri} answers in {1000 * (time.perf_counter() - start):.0f} ms")


def _ray() -> Iterable[Check]:
    import ray

    from pipeline.data.ray_data import start_ray

    started, begin = ray.is_initialized(), time.perf_counter()
    try:
        start_ray()

        @ray.remote(num_cpus=1)
        def worker() -> bool:
            import importlib.util

            return all(importlib.util.find_spec(room) for room in ("pipeline", "methods"))

        reference = worker.remote()
        try:
            imports = ray.get(reference, timeout=20)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            yield Check("Ray", "fail", "a task found no free CPU in 20 s", "see `ray status`: other jobs hold every CPU")
            return
        seconds = time.perf_counter() - begin
        nodes = [node for node in ray.nodes() if node["Alive"]]
        resources = ray.cluster_resources()
        found = f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
        found += f"; {'first task' if started else 'start and first task'} {seconds:.1f} s"
        remedy = "" if imports else "workers cannot import Manyviews: install it on every node, or submit with --working-dir ."
        yield Check("Ray", "ok" if imports else "fail", found, remedy)
    finally:
        if not started and ray.is_initialized():
            ray.shutdown()


# ---------------------------------------------------------------------------- data


def _data(data: DataConfig, config: RunConfig | None) -> Iterable[Check]:
    import numpy as np

    from pipeline.data.sources.base import open_source

    begin = time.perf_counter()
    dataset = open_source(data)
    seconds = time.perf_counter() - begin
    labelled = int((dataset.labels >= 0).sum())
    labels = f"{labelled:,} labelled in {len(dataset.class_names)} classes" if labelled else "no labels"
    found = f"{dataset.describe()}, {labels}; opened in {seconds:.1f} s"
    yield Check("data", "ok", found, "" if labelled else "fine for training; kNN figures need labels (class folders, or a label column)")
    if dataset.skipped:
        listed = _listed(dataset.skipped)
        yield Check("stray files", "warn", f"{len(dataset.skipped):,} skipped\n{listed}", "nothing, if these are no images of yours")

    ids = np.unique(np.linspace(0, len(dataset) - 1, DECODED_IMAGES).round().astype(np.int64))
    good, sizes, bad, seconds = _decode(dataset, ids)
    if sizes:
        rate = len(sizes) / max(seconds, 1e-9)
        heights, widths = zip(*sizes, strict=True)
        middle = f"{sorted(widths)[len(sizes) // 2]} × {sorted(heights)[len(sizes) // 2]} px in the middle"
        yield Check("decode", "ok", f"{len(sizes)} of {len(ids)} sampled, {middle}, {rate:,.0f} images/s on one core")
    if bad:
        stops = len(bad) > max(2, data.max_bad_fraction * len(ids))
        remedy = "remove or repair them; a run skips and lists bad images and stops when more than "
        yield Check(
            "bad images",
            "fail" if stops or not sizes else "warn",
            f"{len(bad)} of {len(ids)} sampled\n{_listed(bad)}",
            f"{remedy}{data.max_bad_fraction:.0%} are bad (data.max_bad_fraction)",
        )
    if config is not None and sizes:
        yield from _guard("loader", lambda: [throughput.loader(config, dataset.num_training(config.data.held_out))])
        yield from _guard("timed dry run", lambda: throughput.report(config, dataset, good))


def _listed(files: list[tuple[str, str]], most: int = 20) -> str:
    lines = [f"{path}: {reason}" for path, reason in files[:most]]
    return "\n".join(lines + ([f"and {len(files) - most:,} more"] if len(files) > most else []))


def _decode(dataset: Any, ids: Any) -> tuple[list[int], list[tuple[int, int]], list[tuple[str, str]], float]:
    """Decode images in this thread. Return ids and (height, width) of good ones, bad ones with reasons, and the seconds of decoding."""
    import torch

    from pipeline.data.decode import BadImage, decode

    good: list[int] = []
    sizes: list[tuple[int, int]] = []
    bad: list[tuple[str, str]] = []
    seconds, threads = 0.0, torch.get_num_threads()
    torch.set_num_threads(1)  # the speed of one core, as in a Ray Data task
    try:
        for id in ids:
            try:
                (row,) = dataset.read([int(id)])
                if not sizes:
                    decode(row.image)  # warm-up: imports
                begin = time.thread_time()  # CPU time, which does not depend on other processes
                image = decode(row.image)
                seconds += time.thread_time() - begin
                good.append(int(id))
                sizes.append((image.shape[0], image.shape[1]))
            except BadImage as error:
                bad.append((row.path, str(error)))
            except OSError as error:
                bad.append((dataset.path(int(id)), error.strerror or str(error)))
    finally:
        torch.set_num_threads(threads)
    return good, sizes, bad, seconds
