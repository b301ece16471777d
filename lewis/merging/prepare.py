"""The way into a merge: a config and opened models become a `Merge`, checked and ready to run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lewis.allocation.densities import ScalesByTensor
from lewis.merging.prepared import Expert
from lewis.merging.run import Merge
from lewis.merging.settings import resolve
from lewis.merging.sliced import Stack, placed
from lewis.models.model import Model
from lewis.recipe.config import MergeConfig

logger = logging.getLogger(__name__)


def prepare(
    config: MergeConfig,
    base: Model | None,
    experts: Sequence[Expert],
    held_back: ScalesByTensor | None = None,
    device: str = "cpu",
) -> Merge:
    """Check that the models fit together, and the parameters and what guides the merge fit the models.

    Args:
        config: what is merged and how.
        base: the config's `base_model`, opened; None if it names none.
        experts: opened, as `MergeConfig.experts` lists them, with what guides them. With slices, their densities are
            by the tensors of the result, and their scales by their own.
        held_back: factors that merged deltas are multiplied with (`lewis.allocation.aim`), by the base's tensors;
            tensors that are left out are not held back.
        device: where the methods compute, by torch's name; on `cpu` in compiled loops if the method has them. Part of
            the digest, as `lewis.devices.merge_device` says.

    Raises:
        RecipeError: naming each filter and range of layers that matches nothing.
        InputError: naming every tensor, vocabulary or parameter that does not fit.
    """
    settings, first = resolve(config), base or experts[0].model
    if settings.slices:
        named = {settings.base: base} if settings.base and base else {}
        settings = placed(settings, named | {expert.ref: expert.model for expert in experts})
    if not settings.slices:
        settings.check_filters([*first.tensors, *first.tied])
    kind = Stack if settings.slices else Merge
    made = kind.of(settings, base, experts, held_back, device)
    logger.debug("prepared the merge %s", made.digest)
    return made
