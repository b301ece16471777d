"""Memory that a pass through a model takes, where the weights of a block are read when the pass reaches it."""

from __future__ import annotations

from lewis.importance.batches import TOKENS_PER_BATCH
from lewis.lazy_torch import torch
from lewis.models.network.module_tree import Network
from lewis.models.network.network_class import input_embeddings

_ROOM = 64 << 20  # bytes; on its way through a block of a small model, a micro-batch takes more in any case


def room(network: Network, dtype: torch.dtype) -> int:
    """Bytes of hidden states that may wait between two blocks: those of the largest block, at least 64 MiB."""
    return max(_ROOM, _largest_block(network) * dtype.itemsize)


def held_at_once(network: Network, *, with_head: bool = False) -> int:
    """Elements of the weights that are in memory while a pass on a CPU goes through the largest block.

    These are the block's, and those in no block, without an embedding that is read by row.

    Args:
        with_head: whether the head that makes logits runs, too.
    """
    by_row = network.read_by_row(with_head=with_head)
    outside = (name for name in network.parameters_outside(with_head=with_head) if name not in by_row)
    return sum(network.empty(name).numel() for name in outside) + _largest_block(network)


def memory_of(network: Network, tokens: int, *, whole: bool = False) -> int:
    """Bytes of memory that a pass over a calibration set takes on a CPU, roughly, in addition to a process without one.

    These are the weights of `held_at_once`, what a batch leaves on its way through a block, and the hidden states that
    wait.

    Args:
        network: its weights are taken to be in fp32.
        tokens: of the set; with 0, the weights alone.
        whole: whether the set is one batch, as it is with `prune_ratio`.
    """
    widest = max(max(network.empty(each.parameter).shape[-2:]) for each in network.covered)
    batch = tokens if whole else min(tokens, TOKENS_PER_BATCH)
    waiting = 4 * 2 * tokens * input_embeddings(network.module).embedding_dim
    return 4 * (held_at_once(network) + 3 * widest * batch) + min(waiting, room(network, torch.float32))


def _largest_block(network: Network) -> int:
    return max(sum(network.empty(name).numel() for name in network.parameters_in(path)) for path in network.blocks)
