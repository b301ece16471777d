"""The table of steps: every kind of work of a merge, one row each."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lewis import store
from lewis.allocation import step as allocation
from lewis.allocation.step import AllocationEntry, AllocationInput
from lewis.devices import default_device
from lewis.errors import LewisError
from lewis.evaluation.harness import server
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.step import ScoresEntry, find_score, score_task, scores_digest
from lewis.importance import grams, measure
from lewis.importance.continuations import ContinueInput, continue_prompts, find_continued
from lewis.importance.step import (
    CalibrationEntry,
    CalibrationInput,
    ImportanceEntry,
    MeasureInput,
    find_all_measured,
    find_calibration,
    find_measured,
    grams_place,
    layers_of,
    measure_digest,
    measured_as,
    prepare_calibration,
)
from lewis.importance.step import measure as measure_model
from lewis.inspection.step import InspectionEntry, InspectionInput, inspect, inspection_digest
from lewis.memory import LOADED
from lewis.merging import step as merging
from lewis.merging.adapter import factor_bytes
from lewis.merging.calibration_rows import split
from lewis.merging.forecast import forecast
from lewis.merging.prepared import Prepared
from lewis.merging.step import MergedModel, MergeInput, check_output, find_merged, prepare_merge
from lewis.models import source as models
from lewis.models.hub import repository
from lewis.models.network.module_tree import Network
from lewis.models.source import ModelFiles, Source
from lewis.progress import Report, silent
from lewis.registry.retention import make_room
from lewis.steps.step import Cost, Step
from lewis.store import kinds
from lewis.threads import cores

logger = logging.getLogger(__name__)
HOURS = 3600.0


class Download(Step[Source, ModelFiles]):
    """The files of a pinned model, with verified checksums."""

    name, retries, timeout = "download", True, 6 * HOURS

    def key(self, given: Source) -> str:
        pinned = [[each.source, each.commit, each.is_local] for each in (given.model, *given.adapters)]
        like = [given.like.source, given.like.commit] if given.like else None
        return store.digest([given.ref, pinned, like])

    def find(self, given: Source) -> ModelFiles | None:
        if not all(repository.is_present(pinned) for pinned in (given.model, *given.adapters)):
            return None
        try:
            return models.download(given)  # which checks the files that are here
        except LewisError:
            return None

    def make(self, given: Source, report: Report, device: str) -> ModelFiles:
        return models.download(given)

    def cost(self, given: Source) -> Cost:
        return Cost(written=given.size)


@dataclass(frozen=True)
class CheckInput:
    """The merge that is checked before any expensive step.

    Attributes:
        merge: the merge that is to be made, without its densities and calibration sets.
        copies: how many merged models go into the store.
        covers: whether layers are measured or allocated, so that some must be covered.
        runs: whether a model is run, so that transformers must be able to build it.
        warning: a sentence for the log on what may be wrong; empty if there is none.
    """

    merge: MergeInput
    copies: int
    covers: bool
    runs: bool
    warning: str = ""


class Check(Step[CheckInput, int]):
    """Check that models fit together and there is room; result: the number of covered layers, 0 for a plain merge."""

    name, cached, timeout, opens = "inspect", False, 0.5 * HOURS, True

    def key(self, given: CheckInput) -> str:
        return store.digest([each.key for each in given.merge.models])

    def find(self, given: CheckInput) -> int | None:
        return None

    def make(self, given: CheckInput, report: Report, device: str) -> int:
        if given.warning:
            logger.warning("%s", given.warning)
        prepared = prepare_merge(given.merge)
        check_output(given.merge, prepared)
        if needed := given.copies * prepared.size:
            make_room(needed)
            store.check_space(kinds.MERGED.folder, needed)
        if given.merge.base is None or not given.covers:
            return 0
        return len(layers_of(given.merge.base, measured=given.runs))


class Diagnose(Step[InspectionInput, list[dict[str, str]]]):
    """The findings on models whose weights show that they do not belong together, as plain data."""

    name, kind, timeout, opens = "diagnose", kinds.INSPECTIONS, 6 * HOURS, True

    def key(self, given: InspectionInput) -> str:
        refs = [each.ref for each in (*([given.base] if given.base else []), *given.experts)]
        settings = {**asdict(given.settings), "root": str(given.settings.root)}
        del settings["stops"]
        compared = ["tokens"] if given.settings.by_token else []  # compared by token, which the measures leave out
        return store.digest([inspection_digest(given), refs, settings, *compared])

    def find(self, given: InspectionInput) -> list[dict[str, str]] | None:
        measured = store.entry(kinds.INSPECTIONS.path(inspection_digest(given)), InspectionEntry.holds)
        return None if measured is None else self.make(given, silent, "cpu")

    def make(self, given: InspectionInput, report: Report, device: str) -> list[dict[str, str]]:
        return [each.to_json() for each in inspect(given, report).findings]


class Calibrate(Step[CalibrationInput, CalibrationEntry]):
    """The token ids of a calibration set."""

    name, kind, retries, timeout = "calibrate", kinds.CALIBRATIONS, True, HOURS

    def key(self, given: CalibrationInput) -> str:
        return store.digest([given.name, given.place().stem])

    def find(self, given: CalibrationInput) -> CalibrationEntry | None:
        return find_calibration(given)

    def make(self, given: CalibrationInput, report: Report, device: str) -> CalibrationEntry:
        return prepare_calibration(given)

    def paths(self, made: CalibrationEntry) -> Sequence[Path]:
        return [made.path]


class Continue(Step[ContinueInput, CalibrationEntry]):
    """The rows that an expert writes to the prompts of a calibration set."""

    name, kind, timeout = "continue", kinds.CALIBRATIONS, 6 * HOURS

    def key(self, given: ContinueInput) -> str:
        return store.digest([given.prompts.name, given.digest(default_device())])

    def find(self, given: ContinueInput) -> CalibrationEntry | None:
        return find_continued(given, default_device())

    def make(self, given: ContinueInput, report: Report, device: str) -> CalibrationEntry:
        return continue_prompts(given, report, device)

    def devices(self, given: ContinueInput) -> int:
        return 1

    def cost(self, given: ContinueInput) -> Cost:
        _, shapes = given.files.outline()
        return Cost(memory=LOADED + 4 * sum(map(math.prod, shapes.values())))

    def paths(self, made: CalibrationEntry) -> Sequence[Path]:
        return [made.path]


class Measure(Step[MeasureInput, list[ImportanceEntry]]):
    """The importance of one model's layers, or the statistics of their inputs, in one pass over its sets."""

    name, kind, timeout = "measure", kinds.IMPORTANCE, 6 * HOURS

    def key(self, given: MeasureInput) -> str:
        return measure_digest(given, default_device())

    def find(self, given: MeasureInput) -> list[ImportanceEntry] | None:
        return find_all_measured(given, default_device())

    def make(self, given: MeasureInput, report: Report, device: str) -> list[ImportanceEntry]:
        return measure_model(given, report, device)

    def devices(self, given: MeasureInput) -> int:
        return 1

    def cost(self, given: MeasureInput) -> Cost:
        from lewis.importance.memory import memory_of

        home, shapes = given.files.outline()
        passes = [each.tokens for each in given.sets if not find_measured(given, each, default_device())]
        network = measure.network_in(home, shapes)
        if given.grams:
            return _cost_of_statistics(network, passes, LOADED + memory_of(network, 0))
        whole = given.settings.prune_ratio > 0
        return Cost(memory=LOADED + memory_of(network, max(passes, default=0), whole=whole))

    def paths(self, made: list[ImportanceEntry]) -> Sequence[Path]:
        return [path for each in made for path in (each.path, each.statistics) if path]

    def facts(self, given: MeasureInput, made: list[ImportanceEntry]) -> Mapping[str, Any]:
        pairs = zip(given.sets, made, strict=True)
        found = {each.name: {"digest": entry.digest, "tokens": each.tokens} for each, entry in pairs}
        return {"model": given.files.key, "calibrations": found}


class Allocate(Step[AllocationInput, AllocationEntry]):
    """The density of every tensor of every expert."""

    name, kind, timeout = "allocate", kinds.ALLOCATIONS, 0.5 * HOURS

    def key(self, given: AllocationInput) -> str:
        digest = allocation.digest(given)  # of the entry, which `aim` does not change: it adds to the result alone
        return store.digest([digest, "aim"]) if given.aim else digest

    def find(self, given: AllocationInput) -> AllocationEntry | None:
        return allocation.find_allocated(given)

    def make(self, given: AllocationInput, report: Report, device: str) -> AllocationEntry:
        return allocation.allocate(given)

    def paths(self, made: AllocationEntry) -> Sequence[Path]:
        return [made.path]


class Merge(Step[MergeInput, MergedModel]):
    """The merged checkpoint, or adapter."""

    name, kind, timeout, opens = "merge", kinds.MERGED, 6 * HOURS, True

    def key(self, given: MergeInput) -> str:
        return prepare_merge(given).digest

    def find(self, given: MergeInput) -> MergedModel | None:
        prepared = prepare_merge(given)
        return find_merged(prepared.digest, given.base.folder if given.base and prepared.as_adapter else None)

    def make(self, given: MergeInput, report: Report, device: str) -> MergedModel:
        return merging.merge(given, report, device)

    def devices(self, given: MergeInput) -> int:
        return 1

    def cost(self, given: MergeInput) -> Cost:
        prepared = prepare_merge(given)
        shapes = {name: shape for name, (_, shape) in prepared.layout.items() if prepared.merges(name)}
        written = factor_bytes(shapes, given.config.output.rank) if prepared.as_adapter else prepared.size
        if written >= store.free_space(store.home()):  # too little space for a forecast, which writes a sample
            return Cost(written=written, seconds=None)
        found, more = forecast(prepared), Cost()
        passes = list(_passes_of_merge(prepared)) if prepared.method.fits == "static" and given.sets else []
        if passes and given.base:
            more = _cost_of_statistics(measure.network_in(*given.base.outline()), passes, 0)
        seconds = found.seconds + more.passes
        return Cost(written + more.written, found.disk, seconds, more.passes, max(found.memory, more.memory))

    def paths(self, made: MergedModel) -> Sequence[Path]:
        return [made.folder]

    def facts(self, given: MergeInput, made: MergedModel) -> Mapping[str, Any]:
        means = dict(given.allocated.means) if given.allocated else {}
        return {"digest": made.digest, "inputs": {each.ref: each.key for each in given.models}, "mean_density": means}


@dataclass(frozen=True)
class ScoreInput:
    """A model to score on one task.

    Attributes:
        label: in the tables.
        key: identity of the model's content.
        files: on disk; None if only its scores are asked for.
        settings: what to score, and how; with one task.
    """

    label: str
    key: str
    files: ModelFiles | None
    settings: EvalSettings

    @property
    def ref(self) -> str:
        """What the scores call the model."""
        return self.files.ref if self.files else self.label


def by_task(given: Mapping[str, ScoreInput]) -> list[dict[str, ScoreInput]]:
    """Group inputs (node name -> input) by task: the scores of one task are compared with each other."""
    found: dict[tuple[str, ...], dict[str, ScoreInput]] = {}
    for name, each in given.items():
        found.setdefault(each.settings.tasks, {})[name] = each
    return list(found.values())


class Evaluate(Step[ScoreInput, ScoresEntry]):
    """The scores of one model on one task."""

    name, kind = "evaluate", kinds.SCORES  # lm-eval runs in a child process, under the recipe's time limit

    def key(self, given: ScoreInput) -> str:
        return store.digest([given.ref, scores_digest(given.key, given.settings, default_device())])

    def find(self, given: ScoreInput) -> ScoresEntry | None:
        return find_score(given.ref, given.key, given.settings, default_device())

    def make(self, given: ScoreInput, report: Report, device: str) -> ScoresEntry:
        assert given.files is not None
        return score_task(given.files, given.settings, device=device, progress=report)

    def devices(self, given: ScoreInput) -> int:
        elsewhere = given.settings.backend == "openai" and server.is_url()
        return 0 if elsewhere else given.settings.gpus

    def paths(self, made: ScoresEntry) -> Sequence[Path]:
        return [made.path]


def _cost_of_statistics(network: Network, passes: Sequence[int], memory: int) -> Cost:
    """Estimate the cost of passes for second-order statistics, each over so many tokens, next to other `memory`."""
    if not passes:
        return Cost(memory=memory)
    threads = cores()
    operations = sum(grams.operations_of(network, tokens) for tokens in passes)
    seconds = operations / (grams.operations_per_second() * threads)
    return Cost(
        written=sum(grams.bytes_of(network, tokens) for tokens in passes),
        seconds=seconds,
        passes=seconds,
        memory=memory + grams.memory_of(network, max(passes), threads),
    )


def _passes_of_merge(merge: Prepared) -> Iterator[int]:
    """Tokens of each pass for statistics that a merge has yet to do itself: where rows are held back or held out."""
    for expert in merge.experts:
        if expert.calibration is None:
            continue
        parts = [expert.calibration] if merge.holds_back else []
        parts += [split(expert.calibration)[0]] if merge.tunes and not expert.held_back else []
        for rows in parts:
            key = measured_as(expert.model.key, expert.model.tensors, rows)
            _, folder = grams_place(key, rows.digest, default_device())
            if store.read_manifest(folder) is None:
                yield rows.tokens


DOWNLOAD, CHECK, DIAGNOSE, CALIBRATE, CONTINUE = Download(), Check(), Diagnose(), Calibrate(), Continue()
MEASURE, ALLOCATE, MERGE, EVALUATE = Measure(), Allocate(), Merge(), Evaluate()
