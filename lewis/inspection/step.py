"""The inspection step: the measures of a recipe's models, found in the store or made once, and the findings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from lewis import store
from lewis.errors import InputError, RecipeError
from lewis.inspection.configs import Described, config_findings
from lewis.inspection.findings import weight_findings
from lewis.inspection.kinds import Finding
from lewis.inspection.measures import SEMANTICS, Measures, measure
from lewis.inspection.result import Inspection
from lewis.inspection.structure import moved_parts
from lewis.merging.settings import stored_dtype
from lewis.methods import find
from lewis.models.compatible import check_compatible, preflight
from lewis.models.layers.stack import other_depth
from lewis.models.model import Model
from lewis.models.names import PER_TOKEN
from lewis.models.source import ModelFiles, Source, download, pin, pin_all
from lewis.recipe.config import excluded
from lewis.recipe.recipe import Recipe
from lewis.store import kinds
from lewis.store.reference import JsonReference

logger = logging.getLogger(__name__)


class InspectionEntry(JsonReference):
    """Measures of a base and experts in the store, and what is elsewhere in each expert than in the base."""

    holds: ClassVar[str] = "measures"


@dataclass(frozen=True)
class _Opened:
    files: ModelFiles
    model: Model


def inspect_recipe(
    recipe: Recipe, bases: Sequence[str] = (), progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Fetch the models of a recipe and inspect them; what does not fit is told and not downloaded.

    Args:
        recipe: the recipe.
        bases: references of other models that may be an expert's base.
        progress: called with (elements read, elements in all).

    Raises:
        InputError: if a model does not exist, or the base is broken.
        TransientError: if the Hub cannot be asked right now; trying again can help.
    """
    base, sources = pin_all(recipe)
    others = [pin(ref, recipe.root) for ref in bases]
    first, experts = (base, sources) if base else (sources[0], sources[1:])
    preflight(recipe, first, [])
    fitting, refused = [], []
    for source in experts:
        try:
            preflight(recipe, first, [source])
            fitting.append(download(source))
        except RecipeError:
            raise
        except InputError as error:
            refused.append(Finding("no fit", source.ref, str(error)))
    candidates, known = [download(each) for each in others], before_download(recipe, base, sources)
    found = inspect(recipe, download(first), fitting, candidates, progress, known=known)
    return Inspection(found.refs, tuple(_errors_first([*refused, *found.findings])), found.measures, recipe.root)


def before_download(recipe: Recipe, base: Source | None, experts: Sequence[Source]) -> list[Finding]:
    """What configs, tokenizers and headers tell; only these are downloaded. A model that is damaged is left out.

    Args:
        recipe: the recipe.
        base: the base; without one, the first expert takes its place.
        experts: in the recipe's order.
    """
    first, others = (base, experts) if base else (experts[0], experts[1:])
    described = []
    for each in others:
        if not _is_base(recipe, each.key, first.key):
            with suppress(InputError):  # of a damaged model, which who opens it tells
                described.append(Described.pinned(each))
    return _errors_first(config_findings(Described.pinned(first), described, among=base is None))


def inspect(
    recipe: Recipe,
    base: ModelFiles,
    experts: Sequence[ModelFiles],
    candidates: Sequence[ModelFiles] = (),
    progress: Callable[[int, int], None] | None = None,
    *,
    known: Sequence[Finding] | None = None,
) -> Inspection:
    """Inspect models that are on this disk.

    Args:
        recipe: the recipe.
        base: what the experts are compared with.
        experts: the other models.
        candidates: other models that may be an expert's base.
        progress: called with (elements read, elements in all).
        known: what `before_download` found, if it was asked.

    Raises:
        InputError: if the base cannot be opened.
    """
    experts = [each for each in experts if not _is_base(recipe, each.key, base.key)]
    if known is None:
        described = [Described.on_disk(each) for each in experts]
        known = config_findings(Described.on_disk(base), described, among=recipe.base_model is None)
    findings = list(known)
    opened = base.open()
    unique = {each.key: each for each in experts if each.key != base.key}
    chosen, more = [_Opened(base, opened)], []
    by_token = recipe.vocabulary is not None  # then rows are matched later, and not compared here
    left_out = set(excluded(recipe, opened.tensors, opened.tied))
    left_out |= {name for name in opened.tensors if by_token and name.endswith(PER_TOKEN)}
    for files in unique.values():
        try:
            model = files.open()
            if recipe.slices and other_depth(opened, model):
                logger.info("%s: not compared: it has another number of layers than %s", files.ref, base.ref)
                continue
            check_compatible(opened, [model], left_out, by_token=by_token)
            chosen.append(_Opened(files, model))
        except InputError as error:
            findings.append(Finding("no fit", files.ref, str(error)))
    for files in candidates:
        if files.key not in unique and files.key != base.key:
            more.append(_Opened(files, files.open()))
    entry = measured(chosen, more, per_token=not by_token, progress=progress)
    measures = Measures.from_json(entry.content("measures"))
    refs = [each.files.ref for each in (*chosen, *more)]
    findings += weight_findings(
        refs,
        measures,
        entry.content("moved")["experts"],
        [Described.on_disk(each.files).dtype for each in chosen],
        candidates=len(more),
        result=stored_dtype(recipe),
    )
    return Inspection(tuple(refs[: len(chosen)]), tuple(_errors_first(findings)), measures, recipe.root)


def measured(
    models: Sequence[_Opened],
    candidates: Sequence[_Opened],
    *,
    per_token: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> InspectionEntry:
    """Measure models, or find their measures in the store.

    Args:
        models: the base and the experts.
        candidates: other possible bases.
        per_token: whether embeddings and heads are measured.
        progress: called with (elements read, elements in all).
    """
    keys = [[each.files.key for each in group] for group in (models, candidates)]
    digest = store.digest([SEMANTICS, *keys, per_token])
    path = kinds.INSPECTIONS.path(digest)
    with store.turn(kinds.INSPECTIONS, digest):
        if store.entry(path, "measures") is None:
            base, *others = [each.model for each in (*models, *candidates)]
            found = measure(base, others, progress, per_token=per_token)
            experts = [moved_parts(base, each.model, i, found) for i, each in enumerate(models[1:], 1)]
            content: dict[str, Any] = {"measures": found.to_json(), "moved": {"experts": experts}}
            store.write_entry(path, content, indent=None)
    return InspectionEntry(digest=digest, path=path)


def _is_base(recipe: Recipe, key: str, base: str) -> bool:
    """Whether a model is the base, and the method takes the base for one of the models that are merged."""
    return key == base and recipe.base_model is not None and find(recipe.merge_method).base_is_a_model


def _errors_first(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda each: each.level != "error")
