"""The allocation step: the densities of all experts, found in the store or made once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lewis import store
from lewis.allocation import densities, evidence, global_threshold
from lewis.allocation.aim import aim
from lewis.allocation.densities import Allocation
from lewis.allocation.in_result import InResult, in_result, is_stack
from lewis.allocation.scales import ScalesByTensor
from lewis.errors import InputError
from lewis.importance.architecture import Layer
from lewis.importance.coverage import covered_tensors
from lewis.importance.step import ImportanceEntry
from lewis.lazy_torch import torch
from lewis.methods import find
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe, excluded
from lewis.recipe.schema import ModelEntry
from lewis.store import kinds
from lewis.store.reference import JsonReference

logger = logging.getLogger(__name__)


class AllocationEntry(JsonReference):
    """Densities of all experts in the store, and those of the uniform baseline with the same means.

    Attributes:
        measured: expert -> the measurement whose activations its task vector is pruned by; empty if by magnitude.
        base: the base's measurements, if the merged delta is held back by them (`lewis.aim`).
        stacked: whether slices put layers together anew, so that densities are of other layers than the base's.
    """

    holds: ClassVar[str] = "experts"
    means: dict[str, float]
    measured: dict[str, ImportanceEntry] = {}  # noqa: RUF012 (pydantic copies it)
    base: tuple[ImportanceEntry, ...] = ()
    stacked: bool = False

    def experts(self, which: str = "experts") -> dict[str, Allocation]:
        """Expert -> allocation; `which` is `experts` or `uniform`. Read from the disk at each call."""
        return {ref: Allocation(**fields) for ref, fields in self.content(which).items()}

    def scales(self) -> dict[str, ScalesByTensor]:
        """Expert -> sqrt(s) of every covered tensor; empty if pruned by magnitude. Read from the disk at each call."""
        return {ref: {name: s.sqrt() for name, s in entry.moments.items()} for ref, entry in self.measured.items()}

    def held_back(self, omega: float) -> ScalesByTensor:
        """Tensor name -> what its merged delta is multiplied with; s is the mean over the base's calibration sets."""
        sets = [entry.moments for entry in self.base]
        names = [name for name in (sets[0] if sets else ()) if all(name in moments for moments in sets)]
        return {name: aim(torch.stack([s[name] for s in sets]).mean(dim=0).sqrt(), omega) for name in names}


def allocate(
    recipe: Recipe, base: ModelFiles, experts: Sequence[ModelFiles], measured: Sequence[ImportanceEntry]
) -> AllocationEntry:
    """Densities of every expert, and of the uniform baseline.

    Args:
        recipe: with a `lewis` block.
        base: the base.
        experts: in the order of `recipe.experts`.
        measured: importance of base and experts on the sets they need; empty for `uniform`.
    """
    assert recipe.lewis is not None
    policy = recipe.lewis.density
    digest, path = _allocation_place(recipe, base, experts, measured)
    with kinds.ALLOCATIONS.turn(digest):
        if store.entry(path, "experts") is None:
            opened = base.open()
            covered, _ = covered_tensors(opened.home, opened.shapes, measured=recipe.runs_models)
            models = {entry.model: files.open() for entry, files in zip(recipe.experts, experts, strict=True)}
            stacked = is_stack(recipe, opened, models)
            seen, layers, guided = in_result(recipe, opened, models, covered), {}, {}
            warnings = list[str | None]()
            for entry, files in zip(recipe.experts, experts, strict=True):
                here = seen[entry.model]
                left_out = excluded(recipe.exclude, here.base.tensors, here.base.tied)
                here = replace(here, covered=tuple(each for each in here.covered if each.tensor not in left_out))
                if not here.covered:
                    raise InputError("exclude: it matches every covered layer; leave the lewis block out")
                layers[files.ref] = [layer for each in here.covered for layer in each.layers]
                names = [name for name in here.base.tensors if name not in left_out]
                moved = _evidence(recipe, entry, base.ref, files.ref, measured, here)
                own = densities.allocate(layers[files.ref], names, policy, moved)
                tensors = [each.tensor for each in here.covered]
                warnings.append(evidence.unrelated(files.ref, here.base, here.expert, tensors))
                warnings.append(_near_uniform(recipe, files.ref, layers[files.ref], own))
                guided[files.ref] = own
            warnings.append(_rescaled(recipe, layers, guided))
            uniform = {ref: densities.uniform_like(layers[ref], each) for ref, each in guided.items()}
            named = {"experts": guided, "uniform": uniform}
            content: dict[str, Any] = {w: {ref: a.to_json() for ref, a in group.items()} for w, group in named.items()}
            content |= {"stacked": True} if stacked else {}
            store.write_entry(path, {**content, "warnings": list(filter(None, warnings))})
    for text in store.entry(path, "warnings") or []:  # also of densities that were found
        logger.warning("%s", text)
    found = find_allocated(recipe, base, experts, measured)
    assert found is not None
    return found


def layers_of_result(recipe: Recipe, base: ModelFiles, experts: Sequence[ModelFiles]) -> list[Layer]:
    """The covered layers of the result, without those that the recipe excludes."""
    opened = base.open()
    covered, _ = covered_tensors(opened.home, opened.shapes, measured=recipe.runs_models)
    models = {entry.model: files.open() for entry, files in zip(recipe.experts, experts, strict=True)}
    seen = in_result(recipe, opened, models, covered)
    found = {layer.key: layer for here in seen.values() for each in here.covered for layer in each.layers}
    return [layer for layer in found.values() if not recipe.excludes(layer.tensor)]


def _evidence(
    recipe: Recipe,
    entry: ModelEntry,
    base: str,
    expert: str,
    measured: Sequence[ImportanceEntry],
    here: InResult,
) -> dict[str, float | None] | None:
    """What the allocator goes by: key of a layer -> how far it moved, or its density under one threshold."""
    assert recipe.lewis is not None
    policy = recipe.lewis.density
    if not recipe.measures:
        return None
    name = recipe.calibration_of(entry)
    found = _by_model(measured)
    if policy.strategy in ("uniform", "depth_gradient"):  # they need to know only what no token reached
        return {key: None if norm is None else 1.0 for key, norm in here.of_expert(found[expert, name].norms).items()}
    if recipe.compares_norms:
        of_base, of_expert = here.of_base(found[base, name].norms), here.of_expert(found[expert, name].norms)
        return evidence.norm_difference(of_base, of_expert)
    moments = here.of_expert(found[expert, name].moments)
    if policy.strategy == "global":
        target = densities.target_of(policy)
        bounds = {"target": target, "low": policy.min, "high": policy.max}
        return global_threshold.shares(here.base, here.expert, here.covered, moments, **bounds)
    metric = {"owl": "outlier", "dlp": "median"}.get(policy.strategy, recipe.lewis.importance.metric)
    return evidence.of_task_vector(metric, here.base, here.expert, here.covered, moments)


def _by_model(measured: Sequence[ImportanceEntry]) -> dict[tuple[str, str], ImportanceEntry]:
    """(reference of a model, calibration set) -> what was measured."""
    return {(each.ref, each.calibration): each for each in measured}


def _near_uniform(recipe: Recipe, ref: str, layers: Sequence[Layer], found: Allocation) -> str | None:
    distance = densities.distance_to_uniform(layers, found)
    if not recipe.guided or distance >= densities.NEAR_UNIFORM:
        return None
    return (
        f"{ref}: the densities are within {100 * distance:.1f} % of uniform {found.mean:.3f}: this allocation guides "
        "next to nothing; see lewis.density.scale (rank, robust), another strategy, or prune_by: activation"
    )


def _rescaled(recipe: Recipe, layers: Mapping[str, Sequence[Layer]], found: Mapping[str, Allocation]) -> str | None:
    rescale = find(recipe.guided_method).parameters.get("rescale")
    value = recipe.anchor_value if recipe.anchor else recipe.value
    distances = [densities.distance_to_uniform(layers[ref], each) for ref, each in found.items()]
    first = next((each[0].tensor for each in layers.values() if each), "")
    uneven = max(distances) >= densities.NEAR_UNIFORM
    if not (recipe.guided and uneven and rescale and value(rescale, None, first, 0.0)):
        return None
    return (
        f"{recipe.guided_method} brings each tensor back to its norm, so what is kept of a layer of low density is "
        "scaled up most: in our study uneven densities did such merges more harm than good; compare with the uniform "
        "baseline, or set parameters.rescale: false"
    )


def find_allocated(
    recipe: Recipe, base: ModelFiles, experts: Sequence[ModelFiles], measured: Sequence[ImportanceEntry]
) -> AllocationEntry | None:
    """The densities, if the store has them."""
    digest, path = _allocation_place(recipe, base, experts, measured)
    content = store.entry(path, "experts")
    if content is None:
        return None
    assert recipe.lewis is not None
    own, of_base = {}, list[ImportanceEntry]()
    if recipe.lewis.prune_by == "activation":
        found = _by_model(measured)
        pairs = zip(recipe.experts, experts, strict=True)
        own = {files.ref: found[files.ref, recipe.calibration_of(entry)] for entry, files in pairs}
    if recipe.lewis.aim is not None:
        of_base = [entry for entry in measured if entry.ref == base.ref]
    means = {ref: fields["mean"] for ref, fields in content.items()}
    stacked = bool(store.entry(path, "stacked"))
    return AllocationEntry(digest=digest, path=path, means=means, measured=own, base=tuple(of_base), stacked=stacked)


def _allocation_place(
    recipe: Recipe, base: ModelFiles, experts: Sequence[ModelFiles], measured: Sequence[ImportanceEntry]
) -> tuple[str, Path]:
    assert recipe.lewis is not None
    policy = [recipe.lewis.prune_by, recipe.lewis.density.model_dump(), recipe.lewis.importance.metric]
    models = [[files.ref, files.key] for files in (base, *experts)]
    passes = sorted([entry.ref, entry.calibration, entry.digest] for entry in measured)
    left_out: list[object] = [sorted(recipe.exclude)] if recipe.exclude else []
    left_out += [[[[s.model, *s.layer_range] for s in e.sources] for e in recipe.slices]] if recipe.slices else []
    digest = store.digest([densities.SEMANTICS, policy, models, passes, *left_out])
    return digest, kinds.ALLOCATIONS.path(digest)
