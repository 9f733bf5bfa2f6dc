"""Counter-based random numbers: known answers, keys, uniformity."""

import numpy as np
import pytest

from pipeline.data.philox import permutation, philox4x32, uniforms


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    numbers = [np.array([int(word, 16) for word in text.split()], np.uint32) for text in (counter, key, expected)]
    assert (philox4x32(numbers[0][None], numbers[1]) == numbers[2]).all()


def test_a_row_depends_on_its_own_key_only() -> None:
    ids = np.array([7, 2**40 + 7, 3])
    together = uniforms(5, 2, ids, 1, 10)
    assert (together[[1]] == uniforms(5, 2, ids[1:2], 1, 10)).all()
    assert (together[:, :3] == uniforms(5, 2, ids, 1, 3)).all()


@pytest.mark.parametrize("changed", [dict(seed=6), dict(seed=5 + 2**32), dict(epoch=3), dict(ids=np.array([8])), dict(view=2)])
def test_every_part_of_the_key_counts(changed: dict) -> None:
    base = dict(seed=5, epoch=2, ids=np.array([7]), view=1, draws=8)
    assert not np.isin(uniforms(**base), uniforms(**(base | changed))).any()


def test_high_half_of_the_id_counts() -> None:
    assert (uniforms(0, 0, np.array([2**32]), 0, 4) != uniforms(0, 0, np.array([0]), 0, 4)).all()


def test_uniform_and_in_range() -> None:
    numbers = uniforms(0, 0, np.arange(20_000), 0, 6)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert np.abs(counts / numbers.size * 20 - 1).max() < 0.05
    assert np.abs(np.corrcoef(numbers.T) - np.eye(6)).max() < 0.03


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1001])
def test_permutation_is_one(count: int) -> None:
    order = permutation(3, 1, count, 0xF004)
    assert sorted(order) == list(range(count))


def test_permutations_differ_by_stream() -> None:
    base = permutation(3, 1, 100, 0xF004).tolist()
    others = [
        permutation(4, 1, 100, 0xF004),
        permutation(3, 2, 100, 0xF004),
        permutation(3, 1, 100, 0xF005),
        permutation(3, 1, 100, 0xF004, 9),
    ]
    assert all(base != other.tolist() for other in others)
