"""Random numbers that can be drawn at any place: number i of a stream depends only on the stream's key and i.

It is SplitMix64 (Steele, Lea and Flood, doi 10.1145/2660193.2660195), whose i-th output is a hash of key + i * gamma.
So the same elements are dropped however a tensor is cut into chunks, and on any number of threads.
"""

from dataclasses import dataclass

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
_CHUNK = 1 << 18  # numbers that are drawn at a time: they fit the cache


@dataclass
class Stream:
    """The random stream of one expert's tensor.

    Attributes:
        key: which stream, in [0, 2^64).
        place: index of the next number to be drawn.
    """

    key: int
    place: int = 0

    def random(self, count: int) -> np.ndarray:
        """Draw the next `count` numbers: uniform in [0, 1), fp32, multiples of 2^-24."""
        numbers = np.empty(count, np.float32)
        for start in range(0, count, _CHUNK):
            stop = min(start + _CHUNK, count)
            z = np.arange(self.place + start + 1, self.place + stop + 1, dtype=np.uint64)
            z *= GAMMA
            z += np.uint64(self.key)
            z ^= z >> np.uint64(30)
            z *= MIX_1
            z ^= z >> np.uint64(27)
            z *= MIX_2
            z ^= z >> np.uint64(31)
            numbers[start:stop] = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        self.place += count
        return numbers
