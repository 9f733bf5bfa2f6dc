"""Data and run folders in an S3 store of this test's own: train, die, lose the local copy, resume."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.sources.patches import open_patches
from tests.conftest import USERS_ENV
from tests.store import SECRET, s3_store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, str]]]:
    """A client with a bucket of images, and the environment that leads to it."""
    with s3_store() as (client, environment):
        source = open_patches("patches:per_photo=16")
        rows = list(source.read(np.arange(len(source))))
        file = tmp_path_factory.mktemp("data") / "a.parquet"
        pq.write_table(pa.table({"image": [r.image for r in rows], "label": [r.label for r in rows]}), file, row_group_size=64)
        client.upload_file(str(file), "lake", "images/a.parquet")
        yield client, environment


def start(arguments: list[str], environment: dict[str, str], cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "manyviews.py"), *arguments]
    env = USERS_ENV | environment | {"MANYVIEWS_CACHE": str(cache)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def in_store(client: Any, key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(client.get_object(Bucket="lake", Key=key)["Body"].read()))
    except client.exceptions.NoSuchKey:
        return {}


def test_a_run_in_the_store_goes_on_without_its_local_copy(store: tuple[Any, dict[str, str]], tmp_path: Path) -> None:
    """Two workers write to the store from other processes than the driver's; then the driver itself goes on from there."""
    client, environment = store
    name, where = "first", "--runs-dir=s3://lake/runs"
    settings = [
        "--train.steps=12",
        "--train.global-batch-size=32",
        "--train.checkpoint-every=4",
        "--backbone.width=0.125",
        "--train.threads=1",
    ]
    first = start(
        ["pretrain", "swav-small", "--data.path=s3://lake/images", where, f"--run={name}", "--train.workers=2", *settings],
        environment,
        tmp_path / "cache",
    )
    while in_store(client, f"runs/{name}/checkpoints/last.json").get("step", 0) < 4:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    said = first.communicate()[0]
    shutil.rmtree(tmp_path / "cache")
    config = client.get_object(Bucket="lake", Key=f"runs/{name}/config.yaml")["Body"].read().decode()
    assert "  workers: 2\n" in config
    fewer = config.replace("  workers: 2\n", "  workers: 0\n")
    client.put_object(Bucket="lake", Key=f"runs/{name}/config.yaml", Body=fewer.encode())

    second = start(["resume", name, where], environment, tmp_path / "other")
    said += second.communicate()[0]
    assert second.returncode == 0, said
    assert "from step 0" not in said and " steps of 32 images from step " in said
    state = in_store(client, f"runs/{name}/run.json")
    assert (state["status"], state["step"]) == ("finished", 12)
    keys = {item["Key"] for item in client.list_objects_v2(Bucket="lake", Prefix=f"runs/{name}/")["Contents"]}
    left = {key.removeprefix(f"runs/{name}/") for key in keys}
    assert {"config.yaml", "metrics.jsonl", "evaluation.json", "model/backbone.safetensors", "figures/curves.png"} <= left
    folders = {key.split("/")[1] for key in left if key.startswith("checkpoints/step-")}
    pointers = {in_store(client, f"runs/{name}/checkpoints/{which}.json").get("folder") for which in ("last", "best")} - {None}
    assert folders == pointers, "what is not pointed to is removed"
    assert not list((tmp_path / "other").rglob("state.pt")), "checkpoints lie in the store only"
    lines = client.get_object(Bucket="lake", Key=f"runs/{name}/metrics.jsonl")["Body"].read().decode().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)["metrics"]]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    assert SECRET not in said and not any(SECRET in path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())


def test_a_wrong_bucket_is_one_sentence(store: tuple[Any, dict[str, str]], tmp_path: Path) -> None:
    process = start(["pretrain", "swav-small", "--data.path=s3://lake/images", "--runs-dir=s3://no-such-lake/runs"], store[1], tmp_path)
    said = process.communicate()[0]
    assert process.returncode == 2 and "runs_dir=s3://no-such-lake/runs" in said and "bucket" in said, said
    assert "Traceback" not in said and SECRET not in said
