"""MinHash signatures, their bands, and what the theory of both promises.

Signatures come from rensa: 32-bit slots, each of which two sets share with a probability of their Jaccard similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import xxhash

from megatron_ttl.errors import DataError

_SEED = 1
_ROWS_AT_ONCE = 64  # few enough that rensa stays in its caller's thread: the processes are parallel already


def signature_version() -> str:
    """Return what signatures depend on beside settings and text: signatures of two versions are not compared.

    Raises:
        DataError: rensa is not installed.
    """
    algorithm = _rensa().RMinHash.ALGORITHM_VERSION
    return f"rensa {version('rensa')}, algorithm {algorithm}, seed {_SEED}"


def signatures(shingles: Sequence[np.ndarray], num_hashes: int) -> np.ndarray:
    """Return the signatures of sets of hashed shingles.

    Args:
        shingles: one array of uint64 per set, repetitions allowed, none empty.
        num_hashes: slots of a signature.

    Returns:
        Signatures.  # uint32 [sets, num_hashes]

    Raises:
        DataError: rensa is not installed.
    """
    rensa, parts = _rensa(), [np.empty((0, num_hashes), np.uint32)]
    for start in range(0, len(shingles), _ROWS_AT_ONCE):
        some = shingles[start:start + _ROWS_AT_ONCE]
        ends = np.cumsum([0, *map(len, some)], dtype=np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(some), ends, num_hashes, _SEED)
        parts.append(np.array(matrix.to_rows(), np.uint32))
    return np.concatenate(parts)


def band_keys(rows: np.ndarray, bands: int) -> np.ndarray:
    """Return the xxh3-64 of every band of every signature: sets that share one are candidates.

    Args:
        rows: signatures.  # uint32 [sets, num_hashes]
        bands: a divisor of num_hashes.

    Returns:
        Keys.  # uint64 [bands, sets]
    """
    data, size = np.ascontiguousarray(rows, "<u4").tobytes(), rows.shape[1] // bands * 4
    digest = xxhash.xxh3_64_digest
    keys = b"".join([digest(data[place:place + size]) for place in range(0, len(data), size)])
    return np.frombuffer(keys, ">u8").astype(np.uint64).reshape(len(rows), bands).T


def collision_probability(similarity: float, bands: int, rows: int) -> float:
    """Return with which probability two sets of this Jaccard similarity share a band: 1 - (1 - s^rows)^bands."""
    return 1 - (1 - similarity**rows) ** bands


def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise DataError("rensa is not installed; it is needed for near duplicates; "
                        "pip install 'megatron_ttl[corpus]'") from None
    return rensa
