"""Which tensors of a model are covered, and so measured for importance, and which possible projections are not."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

from lewis.errors import InputError
from lewis.importance.measure import network_in
from lewis.lazy_torch import nn
from lewis.models.names import PER_TOKEN, layer_of
from lewis.models.network.module_tree import Covered, Layer, Network

logger = logging.getLogger(__name__)
_LEAST = 0.001  # share of the parameters below which an uncovered tensor is not reported
_LISTED = 5


def covered_tensors(
    folder: Path, tensors: Mapping[str, tuple[int, ...]], *, measured: bool
) -> tuple[tuple[Covered, ...], dict[str, float]]:
    """Return the covered tensors of a model, and the shares of the uncovered ones; no weight is loaded.

    Args:
        folder: with its config.json.
        tensors: name -> shape in the checkpoint.
        measured: whether a forward pass is needed. If not, a model that transformers cannot build is covered by names.

    Returns:
        The covered tensors, and the result of `uncovered`, which is empty if the model cannot be built.

    Raises:
        InputError: if the model cannot be built though it is to be measured, or no tensor is covered.
    """
    try:
        network = network_in(folder, tensors)
        return network.covered, uncovered(network, tensors)
    except InputError as error:
        found = () if measured else tuple(_by_name(tensors))
        if not found:
            raise
        logger.warning("%s; no pass is needed: the %d matrices in its numbered layers are covered", error, len(found))
        return found, {}


def _by_name(tensors: Mapping[str, tuple[int, ...]]) -> list[Covered]:
    """Return every matrix, or stack of matrices, in a numbered layer as covered, by tensor names and shapes alone."""
    found = []
    for name, shape in tensors.items():
        index = layer_of(name)
        if index is None or len(shape) not in (2, 3) or min(shape[-2:]) == 1 or name.endswith(PER_TOKEN):
            continue
        projection = name.removesuffix(".weight").rpartition(f".{index}.")[2]
        found.append(Covered(name, (Layer(name, index, projection, prod(shape)),), (None,), name))
    return found


def uncovered(network: Network, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Return the tensors that may be projections but are not covered, with their shares of the parameters.

    Embeddings, heads, norms, biases and one-dimensional convolutions are known to be no projections. The tensors of a
    part outside of the blocks that text goes through (a vision tower) are counted together.

    Returns:
        Name, with `*` for every number -> share of all parameters; the largest first.
    """
    total = sum(map(prod, tensors.values())) or 1
    parameter_of = {tensor: name for name in network.parameters for tensor in network.sources(name)}
    known = {each.tensor for each in network.covered} | {
        tensor for tensor, name in parameter_of.items() if _is_known(network, name)
    }
    inside, found = tuple(f"{path}." for path in network.blocks), Counter[str]()
    for tensor, shape in tensors.items():
        if tensor not in known and len(shape) > 1 and not tensor.endswith(PER_TOKEN):
            in_block = parameter_of.get(tensor, tensor).startswith(inside)
            found[re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor) if in_block else _before_number(tensor)] += prod(shape)
    return {name: count / total for name, count in found.most_common() if count / total >= _LEAST}


def as_text(shares: Mapping[str, float]) -> str:
    """The largest shares of uncovered tensors, in one line."""
    listed = [f"{name} ({100 * share:.1f} % of the parameters)" for name, share in list(shares.items())[:_LISTED]]
    more = len(shares) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")


def _is_known(network: Network, parameter: str) -> bool:
    """Whether a parameter of the blocks belongs to an embedding or a 1-d convolution, which are no projections."""
    module = network.module.get_submodule(parameter.rpartition(".")[0])
    return isinstance(module, nn.Embedding | nn.Conv1d) and parameter.startswith(tuple(network.blocks))


def _before_number(tensor: str) -> str:
    """The part of a tensor's name before its first number: the tower that the tensor is in."""
    parts = tensor.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0]]) if numbers else tensor
