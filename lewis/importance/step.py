"""The importance step: calibration sets, norms and second moments of each model, found in the store or made once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Self

from pydantic import model_validator

from lewis import store
from lewis.devices import precision
from lewis.importance import calibration
from lewis.importance import measure as measuring
from lewis.importance import measured as measurements
from lewis.importance.architecture import Layer
from lewis.importance.calibration import Calibration
from lewis.importance.coverage import covered_tensors, told
from lewis.importance.gram_files import SEMANTICS as GRAMS_SEMANTICS
from lewis.importance.gram_files import Grams
from lewis.importance.measured import Measured
from lewis.lazy_torch import torch
from lewis.models.model import Model
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import Importance, ModelEntry
from lewis.store import kinds, manifest
from lewis.store.checksums import place_of
from lewis.store.reference import JsonReference, Reference

logger = logging.getLogger(__name__)


class CalibrationEntry(Reference):
    """A calibration set in the store."""

    name: str
    digest: str
    tokens: int
    path: Path

    @model_validator(mode="after")
    def _on_disk(self) -> CalibrationEntry:
        if store.entry(self.path, calibration.SAMPLES) is None:
            raise ValueError(f"{self.path} is gone or damaged")
        return self


class ImportanceEntry(JsonReference):
    """Norms and second moments of one model on one calibration set, in the store.

    Attributes:
        statistics: folder of the second-order statistics, if they were asked for.
    """

    holds: ClassVar[str] = measurements.NORMS
    ref: str
    calibration: str
    statistics: Path | None = None

    @model_validator(mode="after")
    def _with_moments(self) -> Self:
        if not measurements.is_whole(self.path):
            raise ValueError(f"{self.path} is gone or damaged")
        if self.statistics is not None and store.read_manifest(self.statistics) is None:
            raise ValueError(f"{self.statistics} is gone or cut short")
        return self

    @property
    def norms(self) -> dict[str, float]:
        """Tensor name -> I(l,c); read from the disk at each call."""
        return dict(self.content(self.holds))

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """Tensor name -> s, the mean of x_j^2; read from the disk, and checked, at each call."""
        return measurements.read_moments(self.path)


def wanted_measurements(recipe: Recipe) -> list[tuple[ModelEntry | None, list[str]]]:
    """(model, calibration sets) for each pass that the recipe needs; None is the base.

    The base's is needed for the difference of norms, and for `aim`, on every set that an expert has; the experts' not
    for `uniform` and `depth_gradient`, unless the recipe prunes by activation. Where `Recipe.needs_grams`, the experts'
    passes leave second-order statistics too (`measure` with `grams`).
    """
    sets = list(dict.fromkeys(map(recipe.calibration_of, recipe.experts))) if recipe.measures_base else []
    own = [(entry, [recipe.calibration_of(entry)]) for entry in recipe.experts] if recipe.measures else []
    return [*([(None, sets)] if sets else []), *own]


def prepare_calibration(recipe: Recipe, name: str, base: ModelFiles) -> CalibrationEntry:
    """Tokenise one calibration set of the recipe and put it into the store.

    What was made of the same rows by the same tokenizer is found, so that a run which has nothing to do need not load
    the libraries that do it.
    """
    assert recipe.lewis is not None
    spec = recipe.lewis.calibrations[name]

    def note() -> Path:
        libraries = [version("datasets"), version("transformers")]
        rows = calibration.origin(f"lewis.calibrations.{name}", spec, recipe.root)
        block = spec.model_dump(mode="json", exclude_unset=True)
        return place_of([calibration.SEMANTICS, libraries, base.key, block, rows])

    place = note()
    known = store.entry(place, "calibration") or {}
    path = calibration.path_of(known.get("digest", ""))
    if store.read_entry(path) is None:
        made = calibration.calibrate(name, spec, tokenizer=base.folder, root=recipe.root)
        known, path = {"digest": made.digest, "tokens": made.tokens}, made.save()
        if note() == place:  # no row moved meanwhile
            store.write_entry(place, {"calibration": known})
    return CalibrationEntry(name=name, path=path, **known)


def measure(
    files: ModelFiles,
    calibrations: Sequence[CalibrationEntry],
    settings: Importance | None = None,
    *,
    grams: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[ImportanceEntry]:
    """Importance of one model on each calibration set; what the store does not have is measured, in one pass.

    Args:
        files: of the model.
        calibrations: the sets.
        settings: of the pass.
        grams: whether second-order statistics are wanted as well. Then each set has a pass of its own, which leaves
            norms and moments, too, unless they are to come from a model that is pruned.
        device: of the forward passes.
        progress: called with (tokens done, tokens in all).
    """
    settings = settings or Importance()
    statistics = {}
    if grams:
        for each in calibrations:
            set_ = Calibration.load(each.path)
            model = files.open()
            statistics[each.digest] = find_or_measure_grams(model, set_, device=device, progress=progress)
            if settings.prune_ratio == 0:
                _keep_norms(files, each, settings, device, partial(_from_grams, model, set_, statistics[each.digest]))
    places = {each.digest: _importance_place(files.read_as, each, settings, device) for each in calibrations}
    missing = {each.digest: each for each in calibrations if not measurements.is_whole(places[each.digest][1])}
    with ExitStack() as locks:
        for digest in sorted(places[tokens][0] for tokens in missing):  # in one order: nobody waits in a circle
            locks.enter_context(kinds.IMPORTANCE.turn(digest))
        absent = [each for each in missing.values() if not measurements.is_whole(places[each.digest][1])]
        if absent:
            sets = [Calibration.load(each.path) for each in absent]
            found = measuring.measure_sets(files.open(), sets, settings, device=device, progress=progress)
            for each, measured in zip(absent, found, strict=True):
                measurements.write(places[each.digest][1], measured, _facts(files, each))
    return [
        ImportanceEntry(
            ref=files.ref,
            calibration=each.name,
            digest=places[each.digest][0],
            path=places[each.digest][1],
            statistics=statistics.get(each.digest),
        )
        for each in calibrations
    ]


def _keep_norms(
    files: ModelFiles, calibration: CalibrationEntry, settings: Importance, device: str, make: Callable[[str], Measured]
) -> None:
    """Write norms and moments that a pass for statistics has left, unless the store has those of another pass.

    If it saw no token reach a layer, nothing is written: the pass for norms alone sees more layouts of experts.
    """
    digest, path = _importance_place(files.read_as, calibration, settings, device)
    if not measurements.is_whole(path):
        with kinds.IMPORTANCE.turn(digest):
            measured = None if measurements.is_whole(path) else make(settings.reduce)
            if measured is not None and None not in measured.norms.values():
                measurements.write(path, measured, _facts(files, calibration))


def _from_grams(model: Model, calibration: Calibration, folder: Path, reduce: str) -> Measured:
    from lewis.importance.grams import measured_by

    return measured_by(model, calibration, Grams(folder), reduce)


def _facts(files: ModelFiles, calibration: CalibrationEntry) -> dict[str, str]:
    return {"model": files.key, "ref": files.ref, "calibration": calibration.digest}


def find_or_measure_grams(
    model: Model,
    calibration: Calibration,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Folder of the second-order statistics of one model on one calibration set, which `gram_files.Grams` reads.

    What the store does not have is measured. A pass that was killed is begun again, but the blocks whose statistics
    it had written are not summed up again.

    Raises:
        InputError: if there is no space for them; also as `measure`.
    """
    digest, folder = grams_place(model.key, calibration.digest, device)
    with kinds.GRAMS.turn(digest):
        if store.read_manifest(folder) is None:
            manifest.set_damaged_aside(folder)
            from lewis.importance.grams import bytes_of, measure_grams

            needed = bytes_of(measuring.network_of(model), calibration.tokens)
            facts, checksums = {"model": model.key, "calibration": calibration.digest}, dict[str, str]()
            with store.publish(folder, facts, digest, checksums) as scratch:
                store.check_space(folder, needed - store.bytes_on_disk(scratch))
                checksums |= measure_grams(
                    model, calibration, scratch, device=device, threads=threads, progress=progress
                )
    return folder


def grams_place(key: str, calibration: str, device: str) -> tuple[str, Path]:
    """Digest and folder of second-order statistics, whether or not the store has them.

    Args:
        key: of the model.
        calibration: digest of the set.
        device: of the pass.
    """
    digest = store.digest([GRAMS_SEMANTICS, key, calibration, precision(device)])
    return digest, kinds.GRAMS.path(digest)


def find_measured(
    ref: str, key: str, calibration: CalibrationEntry, settings: Importance, device: str = "cpu", *, grams: bool = False
) -> ImportanceEntry | None:
    """The importance of a model on a calibration set, if the store has it; with second-order statistics if wanted."""
    digest, path = _importance_place(key, calibration, settings, device)
    statistics = grams_place(key, calibration.digest, device)[1] if grams else None
    if not measurements.is_whole(path) or (statistics and store.read_manifest(statistics) is None):
        return None
    return ImportanceEntry(ref=ref, calibration=calibration.name, digest=digest, path=path, statistics=statistics)


def _importance_place(key: str, calibration: CalibrationEntry, settings: Importance, device: str) -> tuple[str, Path]:
    of_pass = settings.model_dump(exclude={"metric"})  # every metric is made of what one pass measures
    digest = store.digest([measuring.SEMANTICS, key, calibration.digest, precision(device), of_pass])
    return digest, kinds.IMPORTANCE.path(digest)


def layers_of(base: ModelFiles, *, measured: bool = True) -> list[Layer]:
    """The covered layers of the base; logs which they are, and what has weights but is not covered.

    Args:
        base: the base.
        measured: whether a model is run. If not, a base that transformers cannot build is no error.

    Raises:
        InputError: if there are none.
    """
    opened = base.open()
    layers, left = _covered(base, opened, measured)
    tensors = opened.tensors
    share = sum(x.parameters for x in layers) / sum(info.elements for info in tensors.values())
    kinds = ", ".join(sorted({layer.projection for layer in layers}))
    logger.info("covered: %d linear layers (%s), %.0f %% of the weights", len(layers), kinds, 100 * share)
    if left:
        logger.warning("not covered, so they follow lewis.density.uncovered: %s", told(left))
    return layers


def _covered(base: ModelFiles, opened: Model, measured: bool) -> tuple[list[Layer], dict[str, float]]:
    """`covered_tensors`, found once: it builds the model's modules, which takes seconds to load."""
    place = place_of([measuring.SEMANTICS, version("transformers"), base.key])
    known = store.entry(place, "layers")
    if known is None:
        covered, left = covered_tensors(base.folder, opened.shapes, measured=measured)
        known = {"covered": [asdict(layer) for each in covered for layer in each.layers], "left": left}
        if measured:  # what is found by names alone would be wrong for a recipe that runs the model
            store.write_entry(place, {"layers": known})
    return [Layer(**fields) for fields in known["covered"]], known["left"]
