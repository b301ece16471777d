"""The merge step: the merged checkpoint, found in the store or made once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import model_validator

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.devices import merge_device
from lewis.errors import InputError
from lewis.importance.calibration import Calibration
from lewis.importance.step import prepare_calibration
from lewis.merging.adapter import Adapter
from lewis.merging.expert import Expert
from lewis.merging.few_tokens import told_of_shared_set
from lewis.merging.resolved import resolve
from lewis.merging.run import Merge
from lewis.merging.sliced import prepare_slices
from lewis.models.model import Model
from lewis.models.source import ModelFiles
from lewis.models.tokenizer import clash, tokenizer_folder
from lewis.recipe.recipe import Recipe
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

    @property
    def key(self) -> str:
        """Identity of the content, as that of `ModelFiles`."""
        return self.digest

    @property
    def ridge(self) -> str:
        """What `ridge: auto` chose, as a sentence; empty if the recipe gave a number."""
        return chosen_ridge(self.folder)

    @property
    def adapter(self) -> Adapter | None:
        """What the adapter holds and what error it leaves; None for a full checkpoint."""
        return adapter_in(self.folder)

    def files(self, ref: str) -> ModelFiles:
        """As a model to score: an adapter as that of an expert, on its base."""
        if self.base is None:
            return ModelFiles.at(ref, self.digest, self.folder)
        return ModelFiles.at(ref, self.digest, self.base, self.folder)


def adapter_in(folder: Path) -> Adapter | None:
    """What the manifest of a merged folder says of its adapter; None if it is a full checkpoint."""
    found = (store.read_manifest(folder) or {}).get("adapter")
    return Adapter(**found) if found else None


def prepare_merge(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    allocated: AllocationEntry | None = None,
    which: str = "experts",
    gpu: str = "cuda",
) -> Merge:
    """Open all models and check that they fit.

    Args:
        recipe: the recipe.
        base: the base, if there is one.
        experts: in the order of `recipe.experts`.
        allocated: densities, for a guided merge.
        which: `experts` for the guided densities, `uniform` for the baseline's.
        gpu: which one to compute on, if `lewis.devices.merge_device` says so.

    Raises:
        InputError: naming what does not fit.
    """
    guided = allocated.experts(which) if allocated else {}
    sets = calibrations_of(recipe, base) if recipe.fits and base else {}
    scales = allocated.scales() if allocated else {}
    aim = recipe.lewis.aim if recipe.lewis else None
    held_back = allocated.held_back(aim.omega) if allocated and aim else None
    opened = [
        Expert(
            entry.model,
            files.open(),
            guided[files.ref].densities if guided else None,
            scales.get(files.ref),
            sets.get(entry.model),
            guided[files.ref].mean if guided else 1.0,
        )
        for entry, files in zip(recipe.experts, experts, strict=True)
    ]
    opened_base = base.open() if base else None
    in_order = recipe.fits and not recipe.needs_grams  # its passes can take the result's token ids instead
    if (recipe.measures or (in_order and recipe.vocabulary is None)) and opened_base is not None:
        _check_token_ids(recipe, opened_base, [expert.model for expert in opened])
    if recipe.slices:
        return prepare_slices(recipe, opened_base, opened, held_back, merge_device(gpu))
    settings = resolve(recipe, opened_base or opened[0].model)
    return Merge(settings, opened_base, opened, held_back, merge_device(gpu))


def calibrations_of(recipe: Recipe, base: ModelFiles) -> dict[str, Calibration]:
    """Expert, as the recipe names it -> its calibration set, found in the store or made."""
    if told := told_of_shared_set(recipe):
        logger.warning("%s", told)
    names = {entry.model: recipe.calibration_of(entry) for entry in recipe.experts}
    sets = {name: Calibration.load(prepare_calibration(recipe, name, base).path) for name in set(names.values())}
    return {model: sets[name] for model, name in names.items()}


def check_output(recipe: Recipe, prepared: Merge) -> None:
    """Refuse a merge that an adapter cannot hold, before anything is measured or fitted.

    Where the densities that are still to be measured could decide this, it is left to the merge itself.

    Raises:
        InputError: naming a tensor that an adapter cannot hold and the merge changes.
    """
    guide = recipe.allocator
    if recipe.output.kind != "lora" or (guide and guide.density.uncovered != "expert"):
        return
    if guide:  # what an adapter cannot hold is not covered, and so has density 1
        whole = dict.fromkeys(prepared.layout, 1.0)
        prepared.experts = [replace(expert, densities=expert.densities or whole) for expert in prepared.experts]
    prepared.check_adapter()


def _check_token_ids(recipe: Recipe, base: Model, experts: Sequence[Model]) -> None:
    """Check that the base's token ids, which a calibration set consists of, mean the same to each expert."""
    if not recipe.fits:
        fix = "this model cannot be guided: use density.strategy uniform and prune_by magnitude, or no lewis block"
    elif recipe.needs_grams or recipe.measures:
        fix = "this model cannot be measured on them: use regmean_forward, with tokenizer_source and no guided anchor"
    else:
        fix = "set tokenizer_source to base or union: then the fit matches them by token"
    for expert in experts:
        if other := clash(tokenizer_folder(base), tokenizer_folder(expert)):
            raise InputError(
                f"{expert.folder}: another vocabulary: {other}; calibration rows become the base's token ids, so {fix}"
            )


def merge(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    allocated: AllocationEntry | None = None,
    which: str = "experts",
    progress: Callable[[int, int, str], None] | None = None,
    gpu: str = "cuda",
) -> MergedModel:
    """The merged checkpoint, or adapter, in the store, `merged/<digest>/`; made once, then found."""
    prepared = prepare_merge(recipe, base, experts, allocated, which, gpu)
    folder = kinds.MERGED.path(prepared.digest)
    with store.turn(kinds.MERGED, prepared.digest):
        if find_merged(prepared.digest) is None:
            manifest.set_damaged_aside(folder)
            prepared.run(folder, manifest=lineage(recipe, base, experts, allocated), progress=progress)
    on = base.folder if base and prepared.as_adapter else None
    return MergedModel(digest=prepared.digest, folder=folder, base=on)


def chosen_ridge(folder: Path) -> str:
    """What `ridge: auto` chose for a merged model or adapter, as a sentence; empty if the recipe gave a number."""
    found = (store.read_manifest(folder) or {}).get("ridge")
    if not found:
        return ""
    from lewis.merging.ridge import Choice  # brings torch with it

    return Choice.from_json(found).to_text()


def find_merged(digest: str) -> MergedModel | None:
    """A merged checkpoint, or an adapter without its base, if the store has it whole."""
    folder = kinds.MERGED.path(digest)
    whole = (store.read_manifest(folder) or {}).get("digest") == digest
    return MergedModel(digest=digest, folder=folder) if whole else None


def lineage(
    recipe: Recipe, base: ModelFiles | None, experts: Sequence[ModelFiles], allocated: AllocationEntry | None
) -> dict[str, object]:
    """What a merged model was made of, for its manifest."""
    inputs = {files.ref: files.key for files in ([base] if base else []) + list(experts)}
    means = allocated.means if allocated else None
    anchor = {"anchor": recipe.anchor.merge_method} if recipe.anchor else {}
    return {"method": recipe.merge_method, **anchor, "inputs": inputs, "mean_density": means, "recipe": recipe.text}
