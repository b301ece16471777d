"""The merge step: the merged checkpoint, found in the store or made once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from lewis import store
from lewis.allocation.densities import ScalesByTensor
from lewis.allocation.step import AllocationEntry
from lewis.devices import merge_device
from lewis.errors import InputError
from lewis.importance.calibration import Calibration
from lewis.importance.step import CalibrationEntry
from lewis.merging.adapter import Adapter
from lewis.merging.calibration_rows import hold_back
from lewis.merging.run import Merge, Written, text_of_fit
from lewis.merging.settings import Expert, resolve
from lewis.merging.sliced import Stack, placed
from lewis.models.model import Model
from lewis.models.source import ModelFiles
from lewis.models.tokenizer import clash, tokenizer_folder
from lewis.progress import Report, silent
from lewis.recipe.config import MergeConfig
from lewis.recipe.schema import Refine
from lewis.store import kinds, manifest
from lewis.store.reference import Reference

logger = logging.getLogger(__name__)


class MergedModel(Reference):
    """A merged checkpoint, or the LoRA adapter of a merge, in the store.

    Attributes:
        digest: of the merge.
        folder: of the checkpoint or the adapter.
        base: folder of the model that the adapter sits on; None for a full checkpoint.
    """

    digest: str
    folder: Path
    base: Path | None = None

    @model_validator(mode="after")
    def _on_disk(self) -> MergedModel:
        if (store.read_manifest(self.folder) or {}).get("digest") != self.digest:
            raise ValueError(f"{self.folder} is gone, damaged or cut short")
        if self.base is not None and not (self.base / "config.json").is_file():
            raise ValueError(f"{self.base}, the base of {self.folder}, is gone")
        return self

    @classmethod
    def of(cls, written: Written, base: Path | None = None) -> MergedModel:
        """Make the reference of an output that was just written, without reading it again to check it."""
        return cls.model_construct(digest=written.digest, folder=written.folder, base=base)

    @property
    def key(self) -> str:
        """Identity of the content, as `ModelFiles.key`."""
        return self.digest

    @property
    def fit(self) -> str:
        """A sentence on the fit, as `run.text_of_fit`."""
        return text_of_fit(self._manifest)

    @property
    def adapter(self) -> Adapter | None:
        """What the adapter holds and what error it leaves; None for a full checkpoint."""
        found = self._manifest.get("adapter")
        return Adapter(**found) if found else None

    @property
    def _manifest(self) -> dict[str, Any]:
        return store.read_manifest(self.folder, content=False) or {}  # the content was checked when this was made

    def files(self, ref: str) -> ModelFiles:
        """Return the model to score: the merged checkpoint, or the base with the adapter on it."""
        if self.base is None:
            return ModelFiles.at(ref, self.digest, self.folder)
        return ModelFiles.at(ref, self.digest, self.base, self.folder)


@dataclass(frozen=True)
class MergeInput:
    """Everything that decides the result of a merge.

    Attributes:
        config: the merge part of a recipe.
        base, experts: models on disk, the experts in the order of `config.experts`; `base` is None without a base.
        text: the recipe as YAML, for the manifest.
        allocated: densities of the merge, or of the anchor of a method that fits; None for a plain merge.
        which: `experts` for the allocated densities, `uniform` for those of the baseline.
        sets: reference of an expert -> the calibration set that it is fitted on; empty if the method fits nothing; None
            if it fits without rows.
        holds_back: whether a part of the rows is held back to judge the fit.
        omega: `lewis.aim.omega`; None: the merged delta is not reduced.
        measured: whether models are measured on the base's token ids, which must then mean the same to all of them.
        refine: how a fit is trained further; None: it is not.
        uncovered: the policy `density.uncovered`, if densities are to be allocated; None if they are not.
    """

    config: MergeConfig
    base: ModelFiles | None
    experts: tuple[ModelFiles, ...]
    text: str = ""
    allocated: AllocationEntry | None = None
    which: str = "experts"
    sets: Mapping[str, CalibrationEntry] | None = field(default_factory=dict)
    omega: float | None = None
    measured: bool = False
    uncovered: str | None = None
    holds_back: bool = False
    refine: Refine | None = None

    @property
    def models(self) -> list[ModelFiles]:
        """The base, if there is one, then the experts."""
        return [*([self.base] if self.base else []), *self.experts]

    def check_unchanged(self) -> None:
        """Raise LewisError if a folder of a model has changed since it was pinned."""
        for each in self.models:
            each.check_unchanged()

    @cached_property
    def _prepared(self) -> dict[str, Merge]:
        """Device -> the merge that `prepare_merge` prepared for it."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the fields alone, without prepared merges: another process opens the models itself."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def lineage(self) -> dict[str, object]:
        """Describe, for the manifest, what the result is made of: method, inputs, mean densities and recipe."""
        inputs = {files.ref: files.key for files in self.models}
        means = self.allocated.means if self.allocated else None
        anchor = {"anchor": self.config.anchor.merge_method} if self.config.anchor else {}
        return {
            "method": self.config.merge_method, **anchor, "inputs": inputs, "mean_density": means, "recipe": self.text,
        }  # fmt: skip


def prepare_merge(given: MergeInput, gpu: str = "cuda") -> Merge:
    """Open all models of a merge and check that they fit together; `given` keeps the result for each device.

    Args:
        given: what is merged.
        gpu: the GPU to compute on, if `lewis.devices.merge_device` chooses a GPU.

    Raises:
        InputError: naming what does not fit.
    """
    device = merge_device(gpu)
    if device not in given._prepared:
        given._prepared[device] = _prepare(given, device)
    return given._prepared[device]


def _prepare(given: MergeInput, device: str) -> Merge:
    config, allocated, advice = given.config, given.allocated, _advice_on_vocabularies(given)
    guided = allocated.experts(given.which) if allocated else {}
    scales = allocated.scales() if allocated else {}
    factors = allocated.aim_factors(given.omega) if allocated and given.omega is not None else None
    base = given.base.open() if given.base else None
    holds_back = _holds_back(given, base)
    rows = _rows(given, holds_back)
    opened = []
    for entry, files in zip(config.experts, given.experts, strict=True):
        fitted_to, back = rows.get(entry.model, (None, None))
        expert = Expert(entry.model, files.open(), scales=scales.get(files.ref), calibration=fitted_to, held_back=back)
        if guided:
            own = guided[files.ref]
            expert = replace(expert, densities=own.densities, mean_density=own.mean)
        opened.append(expert)
    if advice and base is not None:
        _check_token_ids(base, [expert.model for expert in opened], advice)
    merge = replace(prepare(config, base, opened, factors, device), holds_back=holds_back, refine=given.refine)
    if given.refine and given.sets and not any(expert.held_back for expert in merge.judging):
        raise InputError(
            "lewis.refine: held-back rows decide when it ends, and no set has any that can be used (every fourth row, "
            "with an answer, of an expert whose weight is not 0); raise samples to 4 or more, or leave refine out"
        )
    return merge


def _holds_back(given: MergeInput, base: Model | None) -> bool:
    """Whether every fourth row is held back from the fit."""
    if not given.holds_back or base is None:
        return False
    from lewis.merging.fitting.losses import predicts_next_token  # brings torch with it

    if predicts_next_token(base):
        return True
    if given.refine:
        raise InputError(f"lewis.refine: {given.config.base_model} does not predict the next token; leave it out")
    return False


def _rows(given: MergeInput, holds_back: bool) -> dict[str, tuple[Calibration, Calibration | None]]:
    """Expert -> the rows that it is fitted to, and those that are held back, if any."""
    if given.sets is None:
        return {entry.model: (Calibration("none", ()), None) for entry in given.config.experts}
    sets = {each.path: each.load() for each in given.sets.values()}
    parts = {path: hold_back(each) if holds_back else (each, None) for path, each in sets.items()}
    return {ref: parts[each.path] for ref, each in given.sets.items()}


def check_output(given: MergeInput, prepared: Merge) -> None:
    """Refuse a merge that an adapter cannot hold, before anything is measured or fitted.

    Where the densities that are still to be measured could decide this, it is left to the merge itself.

    Raises:
        InputError: naming a tensor that an adapter cannot hold and the merge changes.
    """
    if given.config.output.kind != "lora" or given.uncovered not in (None, "expert"):
        return
    if given.uncovered and not given.allocated:  # what an adapter cannot hold is not covered, and so has density 1
        prepared = prepared.with_densities(dict.fromkeys(prepared.layout, 1.0))
    prepared.check_adapter()


def _advice_on_vocabularies(given: MergeInput) -> str:
    """Advice for the error about an expert with another vocabulary than the base; empty if it may have one."""
    in_order = given.config.fits and not given.config.needs_grams  # its passes can take the result's token ids instead
    if not given.measured and not (in_order and given.config.vocabulary is None):
        return ""
    if not given.config.fits:
        return "this model cannot be guided: use density.strategy uniform and prune_by magnitude, or no lewis block"
    if given.config.needs_grams or given.measured:
        return "this model cannot be measured on them: use regmean_forward, with tokenizer_source and no guided anchor"
    return "set tokenizer_source to base or union: then the fit matches them by token"


def _check_token_ids(base: Model, experts: Sequence[Model], fix: str) -> None:
    """Check that the base's token ids, which a calibration set consists of, mean the same to each expert."""
    for expert in experts:
        if other := clash(tokenizer_folder(base), tokenizer_folder(expert)):
            raise InputError(
                f"{expert.folder}: another vocabulary: {other}; calibration rows become the base's token ids, so {fix}"
            )


def merge(given: MergeInput, report: Report = silent, gpu: str = "cuda") -> MergedModel:
    """Write the merged checkpoint or adapter to the store, `merged/<digest>/`, or find it there if it is complete."""
    prepared = prepare_merge(given, gpu)
    folder, on = kinds.MERGED.path(prepared.digest), given.base.folder if given.base and prepared.as_adapter else None
    with store.turn(kinds.MERGED, prepared.digest):
        if (found := find_merged(prepared.digest, on)) is not None:
            return found
        manifest.set_damaged_aside(folder)
        if prepared.method.fits:
            prepared = replace(prepared, gpu=gpu)
        written = prepared.run(folder, manifest=given.lineage(), progress=report, unchanged=given.check_unchanged)
        return MergedModel.of(written, on)


def find_merged(digest: str, base: Path | None = None) -> MergedModel | None:
    """Find a merged checkpoint, or an adapter on the model in `base`, in the store; None unless it is whole there."""
    with suppress(ValidationError):
        return MergedModel(digest=digest, folder=kinds.MERGED.path(digest), base=base)
    return None


def prepare(
    config: MergeConfig,
    base: Model | None,
    experts: Sequence[Expert],
    factors: ScalesByTensor | None = None,
    device: str = "cpu",
) -> Merge:
    """Prepare a merge: check that the models fit together, and its parameters and what guides it fit the models.

    Args:
        config: what is merged and how.
        base: the config's `base_model`, opened; None if it names none.
        experts: opened, as `MergeConfig.experts` lists them, with what guides them. With slices, their densities are
            by the tensors of the result, and their scales by their own.
        factors: what merged deltas are multiplied with (`lewis.allocation.aim`), by the base's tensors; those that are
            left out stay as they are.
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
        settings.check_filters(first.tensors, first.tied)
    kind = Stack if settings.slices else Merge
    made = kind.of(settings, base, experts, factors, device)
    logger.debug("prepared the merge %s", made.digest)
    return made
