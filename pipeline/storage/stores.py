"""Object stores: addresses, their `pyarrow` file systems, and their errors in one sentence.

File systems are made once per process, when they are first needed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shlex
import sys
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from methods.parts.errors import ConfigError

SCHEMES = ("s3", "gs", "hf")


def is_remote(path: str) -> bool:
    """Return whether a path is the URI of an object store."""
    return "://" in path


def resolve(path: str, key: str = "data.path") -> str:
    """Return an absolute local path, or a checked URI without its last slash.

    Args:
        key: the setting with this path, for messages.

    Raises:
        ConfigError: an unknown scheme, or credentials inside the URI (the message does not repeat them).
    """
    path = path.removeprefix("file://")
    if not is_remote(path):
        return str(Path(path).expanduser().resolve())
    scheme, _, rest = path.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at and user != "anonymous":
        raise ConfigError(f"{key}={scheme}://...: holds credentials, which would be stored with the run; {_remedies(scheme)[1]}")
    scheme = {"gcs": "gs", "s3a": "s3"}.get(scheme, scheme)
    if scheme not in SCHEMES:
        raise ConfigError(f"{key}={path}: {scheme}:// is not known; use s3://, gs://, hf://datasets/OWNER/NAME or a local path")
    if not rest.strip("/") or rest.startswith("/"):
        raise ConfigError(f"{key}={path}: names no bucket; use {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{rest.rstrip('/')}"


# ---------------------------------------------------------------------------- file systems


def at(uri: str, attempts: int) -> tuple[Any, str]:
    """Return the file system of a URI and the path inside it. The path is not percent-decoded."""
    scheme, _, rest = uri.partition("://")
    bucket, slash, key = rest.partition("/")
    user, _, bucket = bucket.rpartition("@")
    # an endpoint is part of the key, so that a changed environment is followed
    return _file_system(scheme, bucket if scheme == "s3" else "", user == "anonymous", attempts, _endpoint()), bucket + slash + key


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


@lru_cache(maxsize=16)
def _file_system(scheme: str, bucket: str, anonymous: bool, attempts: int, endpoint: str | None) -> Any:
    from pyarrow import fs

    if scheme == "hf":
        try:
            from huggingface_hub import HfFileSystem
        except ImportError:
            remedy = shlex.join([sys.executable, "-m", "pip", "install", "huggingface_hub"])
            raise ConfigError(f"data.path=hf://...: needs huggingface_hub; {remedy}") from None
        return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem()))
    if scheme == "gs":
        patience = datetime.timedelta(seconds=2 * attempts)  # Google's default is 15 minutes
        return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=patience)
    return fs.S3FileSystem(
        anonymous=anonymous,
        region=None if endpoint else fs.resolve_s3_region(bucket),  # a bucket answers only in its own region
        endpoint_override=endpoint,
        connect_timeout=5,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


# ---------------------------------------------------------------------------- errors

_KINDS = {  # patterns of error messages; the order matters, because a missing credential is also reported as "unavailable"
    "bucket": r"NO_SUCH_BUCKET|[Bb]ucket '[^']*' not found|bucket does not exist",
    "rights": (
        r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE|EXPIRED|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|HTTP status 40[13]|40[13] Client"
        r"|PERMISSION_DENIED|UNAUTHENTICATED|OAuth2|[Cc]redentials|gated|Unauthorized|Forbidden"
    ),
    "missing": r"RESOURCE_NOT_FOUND|NO_SUCH_KEY|NOT_FOUND|404 Client|does not exist",
    "network": (
        r"NETWORK_CONNECTION|REQUEST_TIMEOUT|UNAVAILABLE|[Tt]imed? ?out"
        r"|[Rr]esolve|[Nn]ame or service|[Cc]onnect|unreachable|offline|curlCode"
    ),
}


def _kind(text: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, text)), "other")


def missing(error: Exception) -> bool:
    """Return whether an error means that there is no object of this name."""
    return isinstance(error, FileNotFoundError) or _kind(str(error)) == "missing"


def _remedies(scheme: str) -> tuple[str, str]:
    """Return the remedies for network errors and for missing rights."""
    return {
        "s3": (
            "check the network, and AWS_ENDPOINT_URL if the store is not Amazon's",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use s3://anonymous@BUCKET for a public bucket",
        ),
        "gs": (
            "check the network",
            "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login, "
            "or use gs://anonymous@BUCKET for a public bucket",
        ),
        "hf": (
            "check the network, or download the files and give the local folder",
            "set HF_TOKEN, and accept the data set's terms on its page",
        ),
    }.get(scheme, ("check the network", "put credentials into the environment"))


def short(error: Exception) -> str:
    """Return the first line of an error without the values of secrets."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    for name, value in os.environ.items():
        if len(value) >= 6 and re.search(r"KEY|SECRET|TOKEN|PASSWORD", name):
            text = text.replace(value, "***")
    return re.sub(r"\s*\(Request ID[^)]*\)", "", text)[:200]


@contextlib.contextmanager
def explained(path: str, key: str = "data.path") -> Iterator[None]:
    """Turn errors of an object store into one sentence with a remedy; local errors pass.

    Raises:
        ConfigError: no such bucket or key, no right to read it, or no answer.
    """
    try:
        yield
    except Exception as error:  # fsspec file systems raise exceptions of their clients
        if not is_remote(path) or isinstance(error, (ValueError, tarfile.TarError)):  # damaged content, or a ConfigError
            raise
        scheme = path.partition("://")[0]
        network, rights = _remedies(scheme)
        kind = "missing" if missing(error) else _kind(str(error))
        what = {
            "bucket": "there is no such bucket; check its name" + (" and AWS_ENDPOINT_URL" if scheme == "s3" and _endpoint() else ""),
            "rights": f"it may not be {'read' if key == 'data.path' else 'written'} with the credentials found; {rights}",
            "missing": "there is nothing of this name; check it, capitals included"
            + ("; options after ? are not read, use AWS_ENDPOINT_URL" if "?" in path else ""),
            "network": f"the store does not answer; {network}",
        }.get(kind, f"the store answers with an error ({short(error)}); {network}")
        raise ConfigError(f"{key}={path}: {what}") from None
