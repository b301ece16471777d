"""The covered tensors where no forward pass is needed: as the network has them, else by their names alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import prod
from pathlib import Path

from lewis.errors import InputError
from lewis.importance.measure import network_in
from lewis.importance.uncovered import uncovered
from lewis.models.names import PER_TOKEN, layer_of
from lewis.models.network.module_tree import Covered, Layer

logger = logging.getLogger(__name__)


def covered_tensors(
    folder: Path, tensors: Mapping[str, tuple[int, ...]], *, measured: bool
) -> tuple[tuple[Covered, ...], dict[str, float]]:
    """The covered tensors of a model, and what has weights but is not covered; no weight is loaded.

    Args:
        folder: with its config.json.
        tensors: name -> shape in the checkpoint.
        measured: whether a forward pass is needed. If not, a model that transformers cannot build is no error.

    Returns:
        The covered tensors; and as `uncovered.uncovered`, empty if the model cannot be built.

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
    """Every matrix, or stack of matrices, in a numbered layer."""
    found = []
    for name, shape in tensors.items():
        index = layer_of(name)
        if index is None or len(shape) not in (2, 3) or min(shape[-2:]) == 1 or name.endswith(PER_TOKEN):
            continue
        projection = name.removesuffix(".weight").rpartition(f".{index}.")[2]
        found.append(Covered(name, (Layer(name, index, projection, prod(shape)),), (None,), name, None, False))
    return found
