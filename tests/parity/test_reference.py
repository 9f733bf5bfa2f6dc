"""Every method against losses stored in the repository: they need no other folder, and come from literal float64 equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.parts.contract import registered
from tests.parity.common import SINGLE
from tests.parity.make_reference import make
from tests.parity.reference_cases import CASES, FOLDER, train


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)


def test_every_method_has_stored_losses_and_no_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(CASES) == set(registered())
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 500_000


@pytest.mark.parametrize("name", sorted(CASES))
def test_losses_of_a_short_run_equal_the_stored_ones(name: str) -> None:
    values = stored(name)
    found = train(name, {key: torch.from_numpy(value) for key, value in values.items()})
    np.testing.assert_allclose(found, values["losses"], **SINGLE)


@pytest.mark.parametrize("name", sorted(CASES))
def test_script_makes_what_is_stored(name: str) -> None:
    values, again = stored(name), make(name)
    assert values.keys() == again.keys()
    for key, value in values.items():
        np.testing.assert_allclose(again[key], value, rtol=1e-6, atol=1e-7, err_msg=key)
