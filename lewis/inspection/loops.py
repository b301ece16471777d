"""The compiled loops of an inspection, which work on one block of a tensor at a time, of the base and all experts.

numba keeps the compiled code in a cache, next to this file or in the user's cache folder. The loops release Python's
global lock.
"""

from typing import Any

import numpy as np
from numba import njit, types

BLOCK = 1024  # elements summed in fp32 before they are added in fp64; blocks of all models fit the first-level cache
INFINITE = np.uint32(0x7F800000)  # the bits of infinity; read as an integer, those of finite magnitudes are smaller
_MAGNITUDE = np.uint32(0x7FFFFFFF)

_options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
_halves = types.Array(types.uint16, 1, "C", readonly=True)
_words = types.Array(types.uint32, 1, "C", readonly=True)
_floats = types.float32[::1]


@njit(types.uint32(_halves, _floats), **_options)
def load_bf16(bits: Any, out: Any) -> Any:
    """Convert bf16 elements to fp32 in `out`; return the bits of the largest magnitude."""
    wide, largest = out.view(np.uint32), np.uint32(0)
    for i in range(bits.size):
        value = np.uint32(bits[i]) << np.uint32(16)
        wide[i] = value
        largest = max(largest, value & _MAGNITUDE)
    return largest


@njit(types.uint32(_words, _floats), **_options)
def load_fp32(bits: Any, out: Any) -> Any:
    """Copy fp32 elements to `out`; return the bits of the largest magnitude."""
    wide, largest = out.view(np.uint32), np.uint32(0)
    for i in range(bits.size):
        wide[i] = bits[i]
        largest = max(largest, bits[i] & _MAGNITUDE)
    return largest


@njit(
    "void(float32[:,::1],int64,float64[:,::1],int64[::1],int64[:,::1])",
    fastmath={"reassoc", "contract", "nsz"},  # sums in any order, so that they are done several elements at a time
    **_options,
)
def measure(values: Any, count: Any, gram: Any, unchanged: Any, signs: Any) -> None:
    """Add the first `count` elements of a chunk to the measures.

    Args:
        values: finite fp32 rows of the base and of each expert; the experts' are overwritten with their task vectors.
        count: how many elements of each row are measured.
        gram: the dot products of the base and the task vectors are added to its upper triangle.
        unchanged: for each expert, the number of elements that equal the base's is added.
        signs: for each pair of experts (i, j), i < j, the number of elements that both moved is added at (i, j); of
            these, the number that moved in opposite directions at (j, i).
    """
    models = values.shape[0]
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        base = values[0, start:stop]
        for k in range(1, models):
            own, same = values[k, start:stop], np.int32(0)
            for i in range(stop - start):
                own[i] -= base[i]
                same += np.int32(own[i] == np.float32(0.0))
            unchanged[k - 1] += same
        for j in range(models):
            for k in range(j, models):
                one, other, total = values[j, start:stop], values[k, start:stop], np.float32(0.0)
                for i in range(stop - start):
                    total += one[i] * other[i]
                gram[j, k] += total
                if 0 < j < k:
                    both = against = np.int32(0)
                    for i in range(stop - start):
                        both += np.int32((one[i] != np.float32(0.0)) & (other[i] != np.float32(0.0)))
                        against += np.int32(one[i] * other[i] < np.float32(0.0))
                    signs[j - 1, k - 1] += both
                    signs[k - 1, j - 1] += against
