"""How the tensors of a checkpoint are divided into files."""

from collections.abc import Mapping

from lewis import settings
from lewis.errors import InputError


def parse_size(text: str) -> int:
    """`"5GB"` in bytes (decimal units, as transformers' `max_shard_size`).

    Raises:
        InputError: if the text is no such size.
    """
    try:
        return settings.parse_size(text)
    except ValueError:
        raise InputError(f"max_shard_size: expected a size such as 5GB or 500MB, got {text!r}") from None


def shard_names(count: int) -> list[str]:
    """File names as transformers chooses them."""
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def divide(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The tensors of each file, in their order.

    Args:
        sizes: tensor -> bytes.
        limit: bytes of a file; a larger tensor gets a file of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
