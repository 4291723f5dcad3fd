"""Shuffled orders that are computed, not stored: a keyed bijection of [0, size), and its hash function.

Shapes: B numbers.
"""

import numpy as np

_ROUNDS = 4
_GOLDEN = 0x9E3779B97F4A7C15


def shuffled(places: np.ndarray, *, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The member at each place of a shuffled set: a bijection of [0, size) for each key, in constant memory.

    A Feistel network on numbers of two digits (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002,
    section 5): x = high * base + low with high < top and top * base only just above the size; each round adds a hash of
    one digit to the other. A result outside the size is mapped again until it is inside (cycle walking), which is rare.

    Args:
        places: (B,) int64, in [0, size).
        sizes: (B,) int64, at least 1.
        keys: (B,) uint64; equal keys and sizes give the same order.

    Returns:
        (B,) int64, in [0, size).
    """
    limit, x = sizes.astype(np.uint64), places.astype(np.uint64)
    base = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    top = (limit + base - np.uint64(1)) // base
    out: np.ndarray = np.empty_like(places)
    walking: np.ndarray = np.arange(len(places))
    while walking.size:
        x = _feistel(x, top=top, base=base, keys=keys)
        out[walking] = x  # some are still outside: the next pass overwrites those
        outside = x >= limit
        walking, x, limit, top, base, keys = (a[outside] for a in (walking, x, limit, top, base, keys))
    return out


def _feistel(x: np.ndarray, *, top: np.ndarray, base: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over [0, top * base); all arrays (B,) uint64."""
    high, low = np.divmod(x, base)
    for number in range(_ROUNDS):
        round_keys = keys + np.uint64((number + 1) * _GOLDEN % 2**64)
        if number % 2:
            low = (low + mix(round_keys + high) % base) % base
        else:
            high = (high + mix(round_keys + low) % top) % top
    return high * base + low


def mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a hash of 64 bits to 64 bits, arithmetic mod 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
