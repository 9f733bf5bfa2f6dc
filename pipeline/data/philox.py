"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A number depends only on its key and counter, not on the numbers drawn before. So the views of an image do not depend on
the number of workers or on a resume.
"""

from __future__ import annotations

import numpy as np

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

# The fourth counter word of `uniforms` is view * 2^16 + block. Numbers of views from here up are streams for other purposes.
FIRST_RESERVED_VIEW = 0xF000
HELD_OUT, PATCH, TILE, SPAN_ORDER, ROW_ORDER, TASK_ORDER = range(FIRST_RESERVED_VIEW, FIRST_RESERVED_VIEW + 6)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Apply ten rounds of Philox4x32 to every counter.

    Args:
        counter: `(n, 4)` uint32.
        key: `(2,)` uint32.

    Returns:
        `(n, 4)` uint32, uniformly distributed.
    """
    c0, c1, c2, c3 = (np.ascontiguousarray(word, dtype=np.uint64) for word in np.asarray(counter, dtype=np.uint32).T)
    k0, k1 = int(key[0]), int(key[1])
    low, half = np.uint64(MASK), np.uint64(32)
    for _ in range(10):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> half) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def words(seed: int, epoch: int, ids: np.ndarray, view: int, draws: int) -> np.ndarray:
    """Return random 32-bit words `(len(ids), draws)` uint32, one row for each id, keyed by (seed, epoch, id, view, draw)."""
    ids = np.asarray(ids).astype(np.uint64)
    blocks = -(-draws // 4)
    counter = np.empty((len(ids), blocks, 4), np.uint32)
    counter[..., 0] = (ids & np.uint64(MASK))[:, None]
    counter[..., 1] = (ids >> np.uint64(32))[:, None]
    counter[..., 2] = epoch & MASK
    counter[..., 3] = (view << 16) + np.arange(blocks)
    key = np.array([seed & MASK, (seed >> 32) & MASK], np.uint32)
    return philox4x32(counter.reshape(-1, 4), key).reshape(len(ids), 4 * blocks)[:, :draws]


def uniforms(seed: int, epoch: int, ids: np.ndarray, view: int, draws: int) -> np.ndarray:
    """Return uniform numbers in [0, 1) with 32 random bits, `(len(ids), draws)` float64, keyed by (seed, epoch, id, view, draw)."""
    return words(seed, epoch, ids, view, draws) * (1 / 2**32)


def permutation(seed: int, epoch: int, count: int, view: int, first: int = 0) -> np.ndarray:
    """Return a random order of 0 .. count-1, `(count,)` int64.

    Args:
        first: number of the stream, below 2^32.
    """
    blocks = np.arange(-(-count // 4), dtype=np.uint64) + (np.uint64(first) << np.uint64(32))
    return np.argsort(words(seed, epoch, blocks, view, 4).reshape(-1)[:count], kind="stable")
