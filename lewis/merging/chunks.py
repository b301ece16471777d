"""A tensor in chunks: the compiled loops read and write one at a time, so that memory does not follow its size."""

from collections.abc import Iterator

CHUNK = 1 << 19  # elements; a multiple of the blocks that `kernels` sums over


def chunks(size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each chunk of a tensor of `size` elements."""
    return ((start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))
