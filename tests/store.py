"""An S3 store of the tests' own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

SECRET = "secret-never-to-be-shown"


@contextlib.contextmanager
def s3_store() -> Iterator[tuple[Any, dict[str, str]]]:
    """A client of a server with the bucket `lake`, and the environment that leads to it."""
    moto = pytest.importorskip("moto.server", reason="needs moto[server]; pip install -e .[dev]")
    boto3 = pytest.importorskip("boto3", reason="needs boto3; pip install -e .[dev]")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIADUMMYDUMMY",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="lake")
    yield client, environment
    server.stop()
