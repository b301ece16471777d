"""The allocation step: the densities of all experts, found in the store or made once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from lewis import store
from lewis.allocation import densities, evidence, global_threshold
from lewis.allocation.densities import Allocation, ScalesByTensor
from lewis.allocation.evidence import InResult, in_result, is_stack
from lewis.allocators import target_of
from lewis.errors import InputError
from lewis.importance.coverage import covered_tensors
from lewis.importance.step import ImportanceEntry
from lewis.lazy_torch import torch
from lewis.methods import find
from lewis.models.model import Model
from lewis.models.network.module_tree import Layer
from lewis.models.source import ModelFiles
from lewis.recipe.config import MergeConfig, excluded
from lewis.recipe.schema import Density
from lewis.store import kinds
from lewis.store.reference import JsonReference

logger = logging.getLogger(__name__)


class ExpertInput(NamedTuple):
    """One expert of a merge, and what it was measured on.

    Attributes:
        ref: its reference in the recipe.
        files: of the model.
        calibration: the name of the calibration set that it was measured on; None if the experts are not measured.
    """

    ref: str
    files: ModelFiles
    calibration: str | None


@dataclass(frozen=True)
class AllocationInput:
    """What decides the densities of all experts of a merge.

    Attributes:
        density: strategy, bounds and budget.
        metric: `importance.metric` of the recipe: the evidence for an allocator that does not name its own.
        prune_by: as in the recipe.
        aim: whether the merged delta is reduced where the base's activations are large (`aim`).
        config: the merge: its slices, what it excludes, and its parameters, which are only read for a warning.
        base: files of the base.
        experts: in the recipe's order.
        measured: importance of base and experts on the sets that they need; empty if no model is measured.
        runs_models: whether the merge runs a model. If not, layers of a model that transformers cannot build are found
            by their names.
    """

    density: Density
    metric: str
    prune_by: Literal["magnitude", "activation"]
    aim: bool
    config: MergeConfig
    base: ModelFiles
    experts: tuple[ExpertInput, ...]
    measured: tuple[ImportanceEntry, ...]
    runs_models: bool

    @property
    def guides(self) -> bool:
        """Whether layers can have different densities."""
        return self.density.allocator.guides

    def of(self, files: ModelFiles, calibration: str | None) -> ImportanceEntry:
        """Return the measurement of a model on a calibration set."""
        return next(each for each in self.measured if (each.ref, each.calibration) == (files.ref, calibration))


class AllocationEntry(JsonReference):
    """Densities of all experts in the store, and those of the uniform baseline with the same means.

    Attributes:
        measured: expert -> the measurement whose activations its task vector is pruned by; empty if by magnitude.
        base: the base's measurements, if the merged delta is reduced by them (`lewis.aim`).
        stacked: whether slices put layers together in another order, so that densities are not of the base's layers.
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

    def aim_factors(self, omega: float) -> ScalesByTensor:
        """Tensor name -> the factors by which `lewis.aim` reduces its merged delta, one for each input channel.

        They follow from the base's activations: from `s`, averaged over all calibration sets.
        """
        sets = [entry.moments for entry in self.base]
        names = [name for name in (sets[0] if sets else ()) if all(name in moments for moments in sets)]
        return {name: aim(torch.stack([s[name] for s in sets]).mean(dim=0).sqrt(), omega) for name in names}


def aim(scale: torch.Tensor, omega: float) -> torch.Tensor:
    """Activation-informed merging (arXiv 2502.02421): the factors 1 - (1 - omega) * scale_j / max scale.

    It is no merge method but a step after any of them (`lewis.aim` in a recipe): the merged delta is multiplied by the
    factor of its input channel, so that channels in which the base's activations are large change less.

    Args:
        scale: fp32, not negative, broadcasts to the delta, as `Method.takes_scales` says: how large the base's
            activations are in each input channel. The paper takes the mean of |x|; sqrt(mean x^2), which LEWIS measures
            anyway, serves as well. Of stacked experts, shape (experts, ., .), each has a maximum of its own.
        omega: in [0, 1]; what is left of the delta in the largest channel. 1 changes nothing.

    Returns:
        fp32, shape of `scale`.
    """
    top = scale.amax(dim=(1, 2), keepdim=True) if scale.dim() == 3 else scale.max()
    return 1 - (1 - omega) * scale / torch.where(top > 0, top, 1.0)


def digest(given: AllocationInput) -> str:
    """Digest of everything that decides the densities."""
    config = given.config
    policy = [given.prune_by, given.density.model_dump(), given.metric]
    models = [[files.ref, files.key] for files in (given.base, *(expert.files for expert in given.experts))]
    passes = sorted([entry.ref, entry.calibration, entry.digest] for entry in given.measured)
    # What few recipes have is added only if a recipe has it, so that the digests of all others do not change.
    more: list[object] = [sorted(config.exclude)] if config.exclude else []
    more += [[[[s.model, *s.layer_range] for s in e.sources] for e in config.slices]] if config.slices else []
    origin = given.density.allocator.origin
    more += [{"allocator": origin}] if origin else []
    more += [{"rescales": config.guided_method}] if given.guides and _rescales(config) else []  # `_rescaled` warns
    return store.digest([densities.SEMANTICS, policy, models, passes, *more])


def find_allocated(given: AllocationInput) -> AllocationEntry | None:
    """Return the densities of all experts if the store has them, else None."""
    key = digest(given)
    path = kinds.ALLOCATIONS.path(key)
    content = store.entry(path, "experts")
    if content is None:
        return None
    own = {}
    if given.prune_by == "activation":
        own = {expert.files.ref: given.of(expert.files, expert.calibration) for expert in given.experts}
    of_base = tuple(entry for entry in given.measured if entry.ref == given.base.ref) if given.aim else ()
    means = {ref: fields["mean"] for ref, fields in content.items()}
    stacked = bool(store.entry(path, "stacked"))
    return AllocationEntry(digest=key, path=path, means=means, measured=own, base=of_base, stacked=stacked)


def allocate(given: AllocationInput) -> AllocationEntry:
    """Densities of every expert, and of the uniform baseline; found in the store or made once, under a lock.

    Raises:
        InputError: if `exclude` leaves no layer, or base and an expert were not measured on the same layers.
        LewisError: naming the package whose allocator fails, or a model that changed meanwhile.
    """
    key = digest(given)
    path = kinds.ALLOCATIONS.path(key)
    with store.turn(kinds.ALLOCATIONS, key):
        if store.entry(path, "experts") is None:
            content = _allocated(given)
            for files in (given.base, *(expert.files for expert in given.experts)):
                files.check_unchanged()
            store.write_entry(path, content)
    for text in store.entry(path, "warnings") or []:  # densities found in the store have warnings, too
        logger.warning("%s", text)
    found = find_allocated(given)
    assert found is not None
    return found


def layers_of_result(given: AllocationInput) -> list[Layer]:
    """The covered layers of the result, without those that the recipe excludes."""
    seen = _in_result(given, *_opened(given))
    found = {layer.key: layer for here in seen.values() for each in here.covered for layer in each.layers}
    return [layer for layer in found.values() if not given.config.excludes(layer.tensor)]


def _opened(given: AllocationInput) -> tuple[Model, dict[str, Model]]:
    return given.base.open(), {expert.ref: expert.files.open() for expert in given.experts}


def _in_result(given: AllocationInput, base: Model, experts: Mapping[str, Model]) -> dict[str, InResult]:
    covered, _ = covered_tensors(base.home, base.shapes, measured=given.runs_models)
    return in_result(given.config, base, experts, covered)


def _allocated(given: AllocationInput) -> dict[str, Any]:
    """Compute the densities and warnings of all experts: the content of the entry in the store."""
    base, models = _opened(given)
    seen = _in_result(given, base, models)
    layers, guided, warnings = {}, {}, list[str | None]()
    for expert in given.experts:
        here, ref = seen[expert.ref], expert.files.ref
        left_out = excluded(given.config.exclude, here.base.tensors, here.base.tied)
        here = replace(here, covered=tuple(each for each in here.covered if each.tensor not in left_out))
        if not here.covered:
            raise InputError("exclude: it matches every covered layer; leave the lewis block out")
        layers[ref] = [layer for each in here.covered for layer in each.layers]
        names = [name for name in here.base.tensors if name not in left_out]
        guided[ref] = densities.allocate(layers[ref], names, given.density, _evidence(given, expert, here))
        tensors = [each.tensor for each in here.covered]
        warnings.append(evidence.unrelated(ref, here.base, here.expert, tensors))
        warnings.append(_near_uniform(given, ref, layers[ref], guided[ref]))
    warnings.append(_rescaled(given, layers, guided))
    uniform = {ref: densities.uniform_like(layers[ref], each) for ref, each in guided.items()}
    named = {"experts": guided, "uniform": uniform}
    content: dict[str, Any] = {w: {ref: a.to_json() for ref, a in group.items()} for w, group in named.items()}
    content |= {"stacked": True} if is_stack(given.config, base, models) else {}
    return {**content, "warnings": list(filter(None, warnings))}


def _evidence(given: AllocationInput, expert: ExpertInput, here: InResult) -> dict[str, float | None] | None:
    """Evidence for the allocator: key of a layer -> how far it moved, or its density under one global threshold."""
    if expert.calibration is None:
        return None
    of_expert = given.of(expert.files, expert.calibration)
    wanted = given.density.allocator.evidence_by(given.metric)
    if wanted == "nothing":  # the allocator still has to know which layers no token reached
        return {key: None if norm is None else 1.0 for key, norm in here.of_expert(of_expert.norms).items()}
    if wanted == "norm_difference":
        of_base = given.of(given.base, expert.calibration)
        return evidence.norm_difference(here.of_base(of_base.norms), here.of_expert(of_expert.norms))
    moments = here.of_expert(of_expert.moments)
    if wanted == "threshold":
        policy = given.density
        bounds = {"target": target_of(policy), "low": policy.min, "high": policy.max}
        return global_threshold.shares(here.base, here.expert, here.covered, moments, **bounds)
    return evidence.of_task_vector(wanted, here.base, here.expert, here.covered, moments)


def _near_uniform(given: AllocationInput, ref: str, layers: Sequence[Layer], found: Allocation) -> str | None:
    distance = densities.distance_to_uniform(layers, found)
    if not given.guides or distance >= densities.NEAR_UNIFORM:
        return None
    return (
        f"{ref}: the densities are within {100 * distance:.1f} % of uniform {found.mean:.3f}: this allocation guides "
        "next to nothing; see lewis.density.scale (rank, robust), another strategy, or prune_by: activation"
    )


def _rescaled(
    given: AllocationInput, layers: Mapping[str, Sequence[Layer]], found: Mapping[str, Allocation]
) -> str | None:
    config = given.config
    distances = [densities.distance_to_uniform(layers[ref], each) for ref, each in found.items()]
    first = next((each[0].tensor for each in layers.values() if each), "")
    uneven = max(distances) >= densities.NEAR_UNIFORM
    if not (given.guides and uneven and _rescales(config, first)):
        return None
    return (
        f"{config.guided_method} brings each tensor back to its norm, so what is kept of a layer of low density is "
        "scaled up most: in our study uneven densities did such merges more harm than good; compare with the uniform "
        "baseline, or set parameters.rescale: false"
    )


def _rescales(config: MergeConfig, tensor: str = "") -> bool:
    """Whether the merge method scales a trimmed tensor back to its norm; without a name, the answer for most."""
    rescale = find(config.guided_method).parameters.get("rescale")
    value = config.anchor_value if config.anchor else config.value
    return bool(rescale and value(rescale, None, tensor, 0.0))
