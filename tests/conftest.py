"""What tests share: the reference folder, one Ray for the whole session, small images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray settles the mode once for a process and the servers it starts read the environment: one value for all of a session's
# Rays, or the second of two that differ cannot talk to its own server. The e2e tests start processes with USERS_ENV.
USERS_ENV = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
os.environ["RAY_AUTH_MODE"] = "disabled"
ROOT = Path(__file__).parent.parent
os.environ.setdefault("MANYVIEWS_REFERENCE", str(ROOT.parent / "shared"))  # processes that tests start read it too
EXIT_STATUS = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave without tearing the interpreter down.

    After many Rays, MLflow stores and S3 clients in one process, threads of their native libraries are still there, and now
    and then one of them touches what Python has freed: a segmentation fault after the last test has passed. What a verb does
    at its end is tested where it runs as a process.
    """
    if EXIT_STATUS in config.stash and not hasattr(config, "workerinput"):  # pytest-xdist ends its processes itself
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


@pytest.fixture(scope="session")
def reference() -> Path:
    """Reference values and data; tests that need them are skipped where they are not."""
    folder = Path(os.environ["MANYVIEWS_REFERENCE"])
    if not folder.is_dir():
        pytest.skip(f"no reference folder at {folder}; set MANYVIEWS_REFERENCE")
    return folder


@pytest.fixture(scope="session")
def golden(reference: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """Reader of `golden/NAME.npz`."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(reference / "golden" / f"{name}.npz") as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def _ray_ends() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def ray_local(_ray_ends: None) -> None:
    """One Ray for all tests of this process; started again where another file, with a cluster of its own, has ended it."""
    from pipeline.data.ray_data import start_ray

    start_ray()
