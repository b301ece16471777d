"""The importance step: calibration sets, norms and second moments of each model, found in the store or made once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Self

from pydantic import model_validator

from lewis import store
from lewis.devices import precision
from lewis.importance import calibration, chats, dataset_rows
from lewis.importance import grams as grams_pass
from lewis.importance import measure as measuring
from lewis.importance import measured as measurements
from lewis.importance.calibration import Calibration
from lewis.importance.coverage import as_text, covered_tensors
from lewis.importance.gram_files import SEMANTICS as GRAMS_SEMANTICS
from lewis.importance.gram_files import Grams
from lewis.lazy_torch import torch
from lewis.models.chat_template import template_in
from lewis.models.model import Model
from lewis.models.names import STATES_SEMANTICS, weighed_before
from lewis.models.network.module_tree import Layer
from lewis.models.source import ModelFiles
from lewis.progress import Report, silent
from lewis.recipe.schema import CalibrationSet, Importance
from lewis.store import kinds, manifest
from lewis.store.manifest import place_of
from lewis.store.reference import JsonReference, Reference

logger = logging.getLogger(__name__)


class CalibrationEntry(Reference):
    """A calibration set in the store.

    Attributes:
        continues: how many rows an expert has written to each prompt, if a merge is fitted to such rows; else None.
    """

    name: str
    digest: str
    tokens: int
    path: Path
    continues: int | None = None

    @model_validator(mode="after")
    def _on_disk(self) -> CalibrationEntry:
        if store.entry(self.path, calibration.SAMPLES) is None:
            raise ValueError(f"{self.path} is gone or damaged")
        return self

    def load(self) -> Calibration:
        """Read the set, under its name in this recipe: another recipe may have stored the same rows first."""
        rows = replace(Calibration.load(self.path), name=self.name)
        return rows.continuing(self.continues) if self.continues else rows


class ImportanceEntry(JsonReference):
    """Norms and second moments of one model on one calibration set, in the store.

    Attributes:
        ref: reference of the model.
        calibration: name of the calibration set.
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
    def norms(self) -> dict[str, float | None]:
        """Key of a layer -> I(l,c), None if no token reached it; read from the disk at each call."""
        return dict(self.content(self.holds))

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """Tensor name -> s, the mean of x_j^2; read from the disk, and checked, at each call."""
        return measurements.read_moments(self.path)


@dataclass(frozen=True)
class CalibrationInput:
    """Everything that decides a calibration set.

    Attributes:
        name: in the recipe, under `lewis.calibrations`.
        spec: its block.
        root: where relative `data_files` start.
        base: the model whose tokenizer is used for all models; its weights need not be on this disk.
    """

    name: str
    spec: CalibrationSet
    root: Path
    base: ModelFiles

    def place(self) -> Path:
        """Path at which the store records the entry that was made from these rows with this tokenizer.

        Raises:
            InputError: if a file of the rows, or their dataset, does not exist.
            TransientError: if the Hub cannot be asked for the dataset's commit right now.
        """
        libraries = [version("datasets"), version("transformers")]
        rows = dataset_rows.origin(f"lewis.calibrations.{self.name}", self.spec, self.root)
        block = self.spec.model_dump(mode="json", exclude_unset=True)
        own = ["of the adapter"] if self.base.tokenizer != self.base.folder else []
        if self.spec.messages and "strftime_now" in (template_in(self.base.tokenizer) or ""):
            own.append(chats.DATE.isoformat())
        return place_of([calibration.SEMANTICS, libraries, self.base.key, block, rows, *own])


def find_calibration(given: CalibrationInput, place: Path | None = None) -> CalibrationEntry | None:
    """Find the stored token ids of a set, made from the same rows with the same tokenizer; None if there are none.

    A run that finds them need not load the libraries that make them.

    Args:
        given: the set.
        place: `given.place()`, if it is known: that call may take requests to the Hub.

    Raises:
        InputError, TransientError: as `CalibrationInput.place`.
    """
    known = store.entry(place or given.place(), "calibration") or {}
    path = kinds.CALIBRATIONS.path(known.get("digest", ""))
    return None if store.read_entry(path) is None else CalibrationEntry(name=given.name, path=path, **known)


def prepare_calibration(given: CalibrationInput) -> CalibrationEntry:
    """Tokenise one calibration set and put it into the store, or find it there.

    Raises:
        InputError: as `calibration.calibrate`.
        LewisError: if the tokenizer changed meanwhile.
    """
    place = given.place()
    if found := find_calibration(given, place):
        return found
    made = calibration.calibrate(given.name, given.spec, tokenizer=given.base.tokenizer, root=given.root)
    given.base.check_unchanged()
    known, path = {"digest": made.digest, "tokens": made.tokens}, made.save()
    if given.place() == place:  # the rows did not change meanwhile
        store.write_entry(place, {"calibration": known})
    return CalibrationEntry(name=given.name, path=path, digest=made.digest, tokens=made.tokens)


@dataclass(frozen=True)
class MeasureInput:
    """Everything that decides what is measured of one model.

    Attributes:
        files: of the model.
        sets: the calibration sets that it is measured on.
        settings: of the passes.
        grams: whether second-order statistics are wanted as well.
    """

    files: ModelFiles
    sets: tuple[CalibrationEntry, ...]
    settings: Importance = field(default_factory=Importance)
    grams: bool = False


def measure(given: MeasureInput, report: Report = silent, device: str = "cpu") -> list[ImportanceEntry]:
    """Return the importance of one model on each calibration set; sets that the store lacks are measured in one pass.

    With second-order statistics each set has a pass of its own, from which norms and moments follow, too, unless
    `prune_ratio` asks for those of a pruned model.

    Args:
        given: the model and the sets.
        report: called with (model and sets, tokens done, tokens in all).
        device: of the forward passes.
    """
    files, settings = given.files, given.settings
    what = f"{files.ref} on {', '.join(each.name for each in given.sets)}"

    def progress(_: str, done: int, total: int) -> None:
        report(what, done, total)

    for each in given.sets if given.grams else ():
        statistics = find_or_measure_grams(
            files.open(), each.load(), device=device, progress=progress, unchanged=files.check_unchanged
        )
        if settings.prune_ratio == 0:
            _keep_norms(files, each, settings, device, statistics)
    places = {each.digest: _importance_place(files, each, settings, device) for each in given.sets}
    missing = {each.digest: each for each in given.sets if not measurements.is_whole(places[each.digest][1])}
    with ExitStack() as locks:
        for digest in sorted(places[tokens][0] for tokens in missing):  # in a fixed order: no deadlock
            locks.enter_context(store.turn(kinds.IMPORTANCE, digest))
        absent = [each for each in missing.values() if not measurements.is_whole(places[each.digest][1])]
        if absent:
            sets = [each.load() for each in absent]
            found = measuring.measure_sets(files.open(), sets, settings, device=device, progress=progress)
            files.check_unchanged()
            for each, measured in zip(absent, found, strict=True):
                measurements.write(places[each.digest][1], measured, _facts(files, each))
    made = find_all_measured(given, device)
    assert made is not None
    return made


def measure_digest(given: MeasureInput, device: str) -> str:
    """Identity of the result of `measure`: the entries in the store, and the names of the models."""
    files = given.files
    entries = [_importance_place(files, each, given.settings, device)[0] for each in given.sets]
    grams = [grams_place(_key_of(files, each), each.digest, device)[0] for each in given.sets if given.grams]
    return store.digest([files.ref, [each.name for each in given.sets], entries, grams])


def find_all_measured(given: MeasureInput, device: str) -> list[ImportanceEntry] | None:
    """Return the result of `measure` if the store has all of it, else None."""
    found = [find_measured(given, each, device) for each in given.sets]
    whole = [entry for entry in found if entry]
    return whole if len(whole) == len(found) else None


def _keep_norms(
    files: ModelFiles, calibration: CalibrationEntry, settings: Importance, device: str, statistics: Path
) -> None:
    """Write the norms and moments that follow from a model's second-order statistics, unless the store has them.

    Nothing is written if a layer saw no token in that pass: it may belong to a mixture of experts with a layout that
    only the pass for norms can follow.
    """
    digest, path = _importance_place(files, calibration, settings, device)
    if measurements.is_whole(path):
        return
    with store.turn(kinds.IMPORTANCE, digest):
        if measurements.is_whole(path):
            return
        set_, grams = calibration.load(), Grams(statistics)
        measured = grams_pass.measured_by(files.open(), set_, grams, settings.reduce)
        if None not in measured.norms.values():
            files.check_unchanged()
            measurements.write(path, measured, _facts(files, calibration))


def _facts(files: ModelFiles, calibration: CalibrationEntry) -> dict[str, str]:
    return {"model": files.key, "ref": files.ref, "calibration": calibration.digest}


def find_or_measure_grams(
    model: Model,
    calibration: Calibration,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Report = silent,
    unchanged: Callable[[], None] = lambda: None,
) -> Path:
    """Return the folder of a model's second-order statistics on one calibration set; `gram_files.Grams` reads it.

    If the store lacks them, they are measured. A pass that was killed is begun again, but the blocks whose statistics
    it had written are not summed up again.

    Raises:
        InputError: if there is no space for them; also as `grams.measure_grams`.
    """
    digest, folder = grams_place(measured_as(model.key, model.tensors, calibration), calibration.digest, device)
    with store.turn(kinds.GRAMS, digest):
        if store.read_manifest(folder) is None:
            manifest.set_damaged_aside(folder)
            needed = grams_pass.bytes_of(measuring.network_of(model), calibration.tokens)
            facts, checksums = {"model": model.key, "calibration": calibration.digest}, dict[str, str]()
            with store.publish(folder, facts, digest, checksums) as scratch:
                store.check_space(folder, needed - store.bytes_on_disk(scratch))
                checksums |= grams_pass.measure_grams(
                    model, calibration, scratch, device=device, threads=threads, progress=progress
                )
                store.discard_unless(unchanged, scratch)
    return folder


def measured_as(key: str, tensors: Iterable[str], rows: Calibration | CalibrationEntry) -> str:
    """Identity of a model for what is measured of it: its key, and a mark if earlier versions measured it differently.

    Args:
        key: of the model as it is read.
        tensors: their names.
        rows: the calibration set.
    """
    if not weighed_before(tensors):
        return key
    weights = (rows.load() if isinstance(rows, CalibrationEntry) else rows).weights
    return f"{key} {STATES_SEMANTICS}" if weights else key


def _key_of(files: ModelFiles, rows: CalibrationEntry) -> str:
    return measured_as(files.read_as, files.outline()[1], rows)


def grams_place(key: str, calibration: str, device: str) -> tuple[str, Path]:
    """Digest and folder of second-order statistics, whether or not the store has them; `measured_as` gives the key."""
    digest = store.digest([GRAMS_SEMANTICS, key, calibration, precision(device)])
    return digest, kinds.GRAMS.path(digest)


def find_measured(given: MeasureInput, calibration: CalibrationEntry, device: str) -> ImportanceEntry | None:
    """Return the stored measurement of a model on one of its calibration sets; None if the store lacks a part of it."""
    files, name = given.files, calibration.name
    digest, path = _importance_place(files, calibration, given.settings, device)
    statistics = grams_place(_key_of(files, calibration), calibration.digest, device)[1] if given.grams else None
    if not measurements.is_whole(path) or (statistics and store.read_manifest(statistics) is None):
        return None
    return ImportanceEntry(ref=files.ref, calibration=name, digest=digest, path=path, statistics=statistics)


def _importance_place(
    files: ModelFiles, calibration: CalibrationEntry, settings: Importance, device: str
) -> tuple[str, Path]:
    of_pass = settings.model_dump(exclude={"metric"})  # the pass measures the same for every metric
    key = _key_of(files, calibration)
    digest = store.digest([measuring.SEMANTICS, key, calibration.digest, precision(device), of_pass])
    return digest, kinds.IMPORTANCE.path(digest)


def layers_of(base: ModelFiles, *, measured: bool = True) -> list[Layer]:
    """Return the covered layers of the base; log which they are, and which possible projections are not covered.

    Args:
        base: the base.
        measured: whether a model is run. If not, a base that transformers cannot build is no error.

    Raises:
        InputError: if no layer is covered.
    """
    layers, left = covered_layers(base, measured=measured)
    share = sum(x.parameters for x in layers) / sum(info.elements for info in base.open().tensors.values())
    projections = ", ".join(sorted({layer.projection for layer in layers}))
    logger.info("covered: %d linear layers (%s), %.0f %% of the weights", len(layers), projections, 100 * share)
    if left:
        logger.warning(
            "not covered, so a fit leaves them as its anchor has them, and densities follow density.uncovered: %s",
            as_text(left),
        )
    return layers


def covered_layers(base: ModelFiles, *, measured: bool) -> tuple[list[Layer], dict[str, float]]:
    """Return the covered layers and shares of uncovered tensors; stored, since building the modules takes seconds."""
    place = place_of([measuring.SEMANTICS, version("transformers"), base.key])
    known = store.entry(place, "layers")
    if known is None:
        covered, left = covered_tensors(base.folder, base.open().shapes, measured=measured)
        known = {"covered": [asdict(layer) for each in covered for layer in each.layers], "left": left}
        if measured:  # layers found by tensor names alone are not kept: a recipe that measures needs the model's own
            base.check_unchanged()
            store.write_entry(place, {"layers": known})
    return [Layer(**fields) for fields in known["covered"]], known["left"]
