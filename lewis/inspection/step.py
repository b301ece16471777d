"""The inspection step: take the measures of a recipe's models from the store or make them, and list the findings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lewis import store
from lewis.errors import InputError
from lewis.inspection.configs import Described, config_findings
from lewis.inspection.findings import weight_findings
from lewis.inspection.kinds import Finding
from lewis.inspection.measures import SAMPLE, SEMANTICS, Measures, measure, weights
from lewis.inspection.result import Inspection
from lewis.inspection.structure import moved_parts
from lewis.models.broken import COMMIT, broken
from lewis.models.compatible import check_compatible
from lewis.models.layers.stack import other_depth
from lewis.models.model import Model
from lewis.models.names import PER_TOKEN
from lewis.models.source import ModelFiles, Source, commits_of
from lewis.models.tokenizer import read_vocabulary, tokenizer_folder
from lewis.progress import Report, silent
from lewis.recipe.config import excluded
from lewis.store import kinds
from lewis.store.reference import JsonReference

logger = logging.getLogger(__name__)


class InspectionEntry(JsonReference):
    """Measures of a base and experts in the store, and which of an expert's weights have moved to another place."""

    holds: ClassVar[str] = "measures"


@dataclass(frozen=True)
class InspectionSettings:
    """The facts about a merge that an inspection of its models needs.

    Attributes:
        base_is_a_model: whether the method merges the base as one of the models: a model that is the base is then no
            finding.
        exclude: patterns of tensors that the merge copies from the base, and that need not fit.
        by_token: whether the merge matches the rows of embeddings and heads by token: they are then not compared here.
        sliced: whether the merge puts slices of layers together: a model with another number of layers than the base is
            then left out, without a finding.
        dtype: of the merged model, as safetensors names it; None: each tensor keeps the base's.
        root: the recipe's folder, which relative references start from.
        stops: whether a finding of level error stops the merge.
    """

    base_is_a_model: bool = False
    exclude: tuple[str, ...] = ()
    by_token: bool = False
    sliced: bool = False
    dtype: str | None = None
    root: Path = Path()
    stops: bool = False


DEFAULT = InspectionSettings()


@dataclass(frozen=True)
class InspectionInput:
    """The input of an inspection: models on this disk.

    Attributes:
        base: the model that the experts are compared with; None: the first expert takes its place.
        experts: the experts, in the recipe's order.
        settings: the facts about the merge.
        candidates: other models that may be an expert's base.
    """

    base: ModelFiles | None
    experts: tuple[ModelFiles, ...]
    settings: InspectionSettings = DEFAULT
    candidates: tuple[ModelFiles, ...] = ()

    def first(self) -> tuple[ModelFiles, list[ModelFiles]]:
        """The model that the others are compared with, and the others."""
        first, others = (self.base, self.experts) if self.base else (self.experts[0], self.experts[1:])
        skipped = self.base is not None and self.settings.base_is_a_model
        return first, [each for each in others if not (skipped and each.key == first.key)]

    def commits(self, refs: Sequence[str]) -> dict[str, str]:
        """Return model -> its commit on the Hub, or that of its adapter on the base; other models are left out.

        Args:
            refs: references of the models.
        """
        first, others = self.first()
        keys = {each.ref: commits_of(each.key) for each in (*others, first)}
        last = {ref: keys[ref][-1] for ref in refs if ref in keys and keys[ref][:-1] in ((), keys[first.ref])}
        return {ref: commit for ref, commit in last.items() if COMMIT.fullmatch(commit)}

    @cached_property
    def _chosen(self) -> tuple[list[_Opened], list[_Opened], list[Finding]]:
        """The models that are measured, opened; other possible bases; and findings on models that do not fit."""
        first, others = self.first()
        opened = first.open()
        unique = {each.key: each for each in others if each.key != first.key}
        fitting, refused = _fitting(first, opened, list(unique.values()), self.settings)
        candidates = [each for each in self.candidates if each.key not in unique and each.key != first.key]
        return [_Opened(first, opened), *fitting], [_Opened(each, each.open()) for each in candidates], refused

    @cached_property
    def _inspected(self) -> list[Inspection]:
        """The result of `inspect`; empty before its first call."""
        return []

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without opened models, since another process opens the models itself."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class _Opened:
    files: ModelFiles
    model: Model


def before_download(
    base: Source | None, experts: Sequence[Source], settings: InspectionSettings = DEFAULT
) -> list[Finding]:
    """Return the findings from configs, tokenizers and headers; only these are downloaded. Damaged models are left out.

    Args:
        base: the base; None: the first expert takes its place.
        experts: the experts, in the recipe's order.
        settings: the facts about the merge; only `base_is_a_model` is used.
    """
    first, others = (base, experts) if base else (experts[0], experts[1:])
    described = []
    for each in others:
        if not (base and settings.base_is_a_model and each.key == base.key):
            with suppress(InputError):  # the error is raised where the model is opened
                described.append(Described.pinned(each))
    return errors_first(config_findings(Described.pinned(first), described, among=base is None))


def inspect(given: InspectionInput, report: Report = silent, *, known: Sequence[Finding] | None = None) -> Inspection:
    """Inspect models that are on this disk. An input keeps its result, so that it is inspected once.

    Args:
        given: the models.
        report: called with ("inspect", elements read, elements in all).
        known: the findings of `before_download`; None if it was not called.

    Raises:
        InputError: if the base cannot be opened.
    """
    if not given._inspected:
        given._inspected.append(_inspect(given, report, known))
    return given._inspected[0]


def check_findings(findings: Sequence[Finding], settings: InspectionSettings) -> None:
    """Stop a merge that would be wrong or worthless.

    Raises:
        InputError: if there are findings of level error, which it lists, unless the recipe merges in spite of them.
    """
    errors = [each for each in findings if each.level == "error"]
    if errors and settings.stops:
        listed = "\n".join(each.to_text() for each in errors)
        raise InputError(f"{listed}\n  to merge them all the same: inspect: {{on: warn}} in the recipe, or --force")


def check(found: Inspection, given: InspectionInput) -> None:
    """Stop a merge by `check_findings` if the inspection of its models found it wrong or worthless.

    Raises:
        BrokenModelError: if a model of the Hub holds NaN or infinity: only another commit can help.
        InputError: otherwise, as `check_findings`.
    """
    try:
        check_findings(found.findings, given.settings)
    except InputError as error:
        for ref, commit in given.commits(found.broken).items():
            raise broken(f"{error}\n  {ref}", "it has NaN or infinity", commit) from None
        raise


def look(given: InspectionInput, report: Report = silent) -> None:
    """Stop a merge whose models do not belong together; a sample of each tensor decides whether all weights are read.

    Raises:
        InputError: as `check`.
    """
    if not given.settings.stops:
        return
    chosen, _, refused = given._chosen
    base, *experts = [each.model for each in chosen]
    sample = _merged(measure(base, experts, per_token=not given.settings.by_token, most=SAMPLE), given)
    found = _weight_findings(given, sample, [[] for _ in experts])
    keys = [each.key for each in (given.first()[1] if given.base else given.experts)]
    if refused or len(keys) > len(set(keys)) or any(each.level == "error" or each.kind == "norms" for each in found):
        check(inspect(given, report), given)


def _inspect(given: InspectionInput, report: Report, known: Sequence[Finding] | None) -> Inspection:
    first, others = given.first()
    if known is None:
        described = [Described.on_disk(each) for each in others]
        known = config_findings(Described.on_disk(first), described, among=given.base is None)
    chosen, _, refused = given._chosen
    entry = measured(given, report)
    measures = _merged(Measures.from_json(entry.content("measures")), given)
    names = {each.name for each in measures.tensors}
    moved = [[part for part in parts if names & {*part["tensors"]}] for parts in entry.content("moved")["experts"]]
    findings = tuple(errors_first([*known, *refused, *_weight_findings(given, measures, moved)]))
    return Inspection(tuple(each.files.ref for each in chosen), findings, measures, given.settings.root)


def _weight_findings(
    given: InspectionInput, measures: Measures, moved: Sequence[Sequence[dict[str, Any]]]
) -> list[Finding]:
    chosen, candidates, _ = given._chosen
    return weight_findings(
        [each.files.ref for each in (*chosen, *candidates)],
        measures,
        moved,
        [Described.on_disk(each.files).dtype for each in chosen],
        given.settings.dtype,
        _differ_by_token(chosen) if given.settings.by_token else lambda one, other: False,
        among=given.base is None,
    )


def _differ_by_token(models: Sequence[_Opened]) -> Callable[[int, int], bool]:
    """Return a function of two models' numbers: whether they differ in embeddings, heads or tokens (not measured)."""

    def rows(model: Model) -> dict[str, np.ndarray]:
        names = (name for name in model.tensors if name.endswith(PER_TOKEN))
        return {name: weights(model, name) for name in names if model.tensors[name].floating}

    def differ(one: int, other: int) -> bool:
        first, second = models[one].model, models[other].model
        if read_vocabulary(tokenizer_folder(first)) != read_vocabulary(tokenizer_folder(second)):
            return True
        ours, theirs = rows(first), rows(second)
        return ours.keys() != theirs.keys() or any(not np.array_equal(ours[name], theirs[name]) for name in ours)

    return differ


def sizes_by_layer(given: InspectionInput) -> dict[str, dict[int, float]]:
    """Expert -> layer -> norm of its task vector, relative to the base's weights; empty if the store has no measures.

    Raises:
        InputError: if a model cannot be opened.
    """
    measures, refs = _known(given)
    return {ref: measures.by_layer(number) for number, ref in enumerate(refs, 1)} if measures else {}


def sizes_by_tensor(given: InspectionInput) -> dict[str, dict[str, float]]:
    """Expert -> matrix -> norm of its task vector, relative to the base's weights; empty if the store has no measures.

    Raises:
        InputError: if a model cannot be opened.
    """
    measures, refs = _known(given)
    matrices = measures.matrices() if measures else []
    return {ref: {each.name: each.size(number) for each in matrices} for number, ref in enumerate(refs, 1)}


def _known(given: InspectionInput) -> tuple[Measures | None, list[str]]:
    """Return the measures in the store, None if it has none, and the references of the measured experts in order."""
    found = store.entry(kinds.INSPECTIONS.path(inspection_digest(given)), InspectionEntry.holds)
    if found is None:
        return None, []
    return _merged(Measures.from_json(found), given), [each.files.ref for each in given._chosen[0][1:]]


def _merged(measures: Measures, given: InspectionInput) -> Measures:
    """The measures of the tensors that the recipe does not exclude from the merge."""
    base = given._chosen[0][0].model
    left_out = excluded(given.settings.exclude, base.tensors, base.tied)
    return replace(measures, tensors=tuple(each for each in measures.tensors if each.name not in left_out))


def inspection_digest(given: InspectionInput) -> str:
    """Return the digest of an input's measures: by the models' content, and whether embeddings are measured."""
    keys = [[each.files.key for each in group] for group in given._chosen[:2]]
    return store.digest([SEMANTICS, *keys, not given.settings.by_token])


def _fitting(
    base: ModelFiles, opened: Model, experts: Sequence[ModelFiles], settings: InspectionSettings
) -> tuple[list[_Opened], list[Finding]]:
    """Open the experts that can be compared with the base, and return them and a finding for each that does not fit."""
    fitting, refused = [], []
    left_out = set(excluded(settings.exclude, opened.tensors, opened.tied))
    left_out |= {name for name in opened.tensors if settings.by_token and name.endswith(PER_TOKEN)}
    for files in experts:
        try:
            model = files.open()
            if settings.sliced and other_depth(opened, model):
                logger.info("%s: not compared: it has another number of layers than %s", files.ref, base.ref)
                continue
            check_compatible(opened, [model], left_out, by_token=settings.by_token)
            fitting.append(_Opened(files, model))
        except InputError as error:
            refused.append(Finding("no fit", files.ref, str(error)))
    return fitting, refused


def measured(given: InspectionInput, report: Report) -> InspectionEntry:
    """Measure the models of an input, or find their measures in the store.

    Args:
        given: the models.
        report: called with ("inspect", elements read, elements in all).
    """
    (models, candidates, _), digest = given._chosen, inspection_digest(given)
    path = kinds.INSPECTIONS.path(digest)
    with store.turn(kinds.INSPECTIONS, digest):
        if store.entry(path, "measures") is None:
            base, *others = [each.model for each in (*models, *candidates)]
            found = measure(base, others, report, per_token=not given.settings.by_token)
            experts = [moved_parts(base, each.model, i, found) for i, each in enumerate(models[1:], 1)]
            content: dict[str, Any] = {"measures": found.to_json(), "moved": {"experts": experts}}
            for each in (*models, *candidates):
                each.files.check_unchanged()
            store.write_entry(path, content, indent=None)
    return InspectionEntry(digest=digest, path=path)


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """Findings of level `error` before the warnings, else in their order."""
    return sorted(findings, key=lambda each: each.level != "error")
