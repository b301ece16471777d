"""What a pass for second-order statistics takes, from the sizes of a model, before anything is run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from lewis.devices import one_thread
from lewis.importance.grams import tokens_per_pass
from lewis.lazy_torch import torch
from lewis.methods.arithmetic.gram import packed_length
from lewis.methods.arithmetic.regression import DUAL_ABOVE, DUAL_TOKENS, keeps_rows
from lewis.models.network.module_tree import Network
from lewis.models.network.network_class import input_embeddings


def operations_per_second() -> float:
    """How many fp32 operations one core does in a second, measured with a product of matrices."""
    with one_thread(), torch.inference_mode():
        square = torch.ones(1024, 1024)
        square @ square
        begun = time.perf_counter()
        square @ square
        return 2 * 1024**3 / (time.perf_counter() - begun)


def bytes_of(network: Network, tokens: int) -> int:
    """Bytes on disk that the statistics of a model take at most, as if no two projections shared their inputs.

    Args:
        network: its modules.
        tokens: of the calibration set. Of stacked experts, each is taken to see an even share, which takes most room.
    """
    return sum(each.stack * _bytes_of_input(each.size, each.tokens) for _, each in _stacks(network, tokens))


def operations_of(network: Network, tokens: int) -> float:
    """Floating-point operations of the pass, roughly: the products with the weights, and those of the inputs.

    Args:
        network: its modules.
        tokens: of the calibration set.
    """
    total = 0
    for parameter, each in _stacks(network, tokens):
        products = 0 if keeps_rows(each.size, each.tokens) else packed_length(each.size) * each.stack
        total += each.tokens * (network.empty(parameter).numel() + products)
    return 2.0 * total


def share_of_tokens(network: Network, parameter: str) -> float:
    """The share of all tokens that one of the matrices of a parameter sees, if a router sends out even shares."""
    return next(each.tokens for name, each in _stacks(network, 1 << 20) if name == parameter) / (1 << 20)


def memory_of(network: Network, tokens: int, threads: int) -> int:
    """Bytes of memory that the pass needs beside the weights, roughly.

    These are the statistics of a block, the hidden states of all tokens (and the embeddings that they began as), and
    for each thread what a batch leaves on its way through a block.

    Args:
        network: the model's modules.
        tokens: of the calibration set.
        threads: of the pass.
    """
    blocks = max(len(network.blocks), 1)
    inputs = sum(each.size * min(each.stack * each.tokens, tokens) / tokens for _, each in _stacks(network, tokens))
    hidden = input_embeddings(network.module).embedding_dim
    in_passes = 3 * threads * tokens_per_pass(network) * inputs / blocks
    return int(bytes_of(network, tokens) / blocks + 4 * (2 * tokens * hidden + in_passes))


class _Stack(NamedTuple):
    """A covered parameter: number of inputs, how many are stacked in it, and the tokens that each of them sees."""

    size: int
    stack: int
    tokens: int


def _stacks(network: Network, tokens: int) -> Iterator[tuple[str, _Stack]]:
    chosen = getattr(network.module.config.get_text_config(), "num_experts_per_tok", None) or 1
    for parameter, transposed in {each.parameter: each.transposed for each in network.covered}.items():
        shape = network.empty(parameter).shape
        stack = shape[0] if len(shape) == 3 else 1
        seen = -(-tokens * min(chosen, stack) // stack) if stack > 1 else tokens
        yield parameter, _Stack(shape[-2 if transposed else -1], stack, seen)


def _bytes_of_input(size: int, tokens: int) -> int:
    kept = min(tokens, DUAL_TOKENS) if size > DUAL_ABOVE else tokens
    return 4 * (size + (size * kept if keeps_rows(size, tokens) else packed_length(size)))
