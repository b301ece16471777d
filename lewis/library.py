"""The Python interface for notebooks and scripts: the functions of `import lewis`, each of which takes a recipe.

Results that are in the store are not computed again, and runs of the service find the results of these functions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis.devices import default_device
from lewis.errors import InputError, LewisError, RecipeError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.scores import Score
from lewis.evaluation.step import score as score_model
from lewis.importance.step import ImportanceEntry
from lewis.inspection.kinds import Finding
from lewis.inspection.result import Inspection
from lewis.inspection.rows import row_findings
from lewis.inspection.step import InspectionInput, before_download, look
from lewis.inspection.step import inspect as inspect_models
from lewis.merging.adapter import Adapter
from lewis.merging.step import MergeInput, prepare_merge
from lewis.models.compatible import preflight
from lewis.models.files.writer import parse_size
from lewis.models.lora.expert import is_adapter
from lewis.models.source import ModelFiles, download, pin, pin_all
from lewis.progress import Report, silent
from lewis.recipe.recipe import Recipe
from lewis.registry.registration import write_card
from lewis.reports import card
from lewis.steps.graph import graph, inspection_settings
from lewis.steps.plan import Plan, make_plan
from lewis.steps.run import begin, run
from lewis.steps.table import ALLOCATE, CALIBRATE, CONTINUE, DIAGNOSE, DOWNLOAD, MEASURE
from lewis.store.runs import noted
from lewis.store.writable import check_output_folder

if TYPE_CHECKING:
    from lewis.allocation.step import AllocationEntry
    from lewis.merging.run import Merge, Written

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """A merged model that was written to a folder.

    Attributes:
        folder: folder of the checkpoint, or of the adapter.
        digest: identity of the merge, by every input and parameter that decides a byte; 64 hex digits.
        size: bytes of its weights.
        mean_density: expert -> mean density of its covered weights; empty for a plain merge.
        manifest: what `lewis.json` in the folder records, without the list of files.
        adapter: what an adapter holds and what error it leaves; None for a full model.
        fit: the choice of `ridge: auto` and the result of the fit on held-back rows, as a sentence; else empty.
    """

    folder: Path
    digest: str
    size: int
    mean_density: dict[str, float]
    manifest: Mapping[str, Any]
    adapter: Adapter | None = None
    fit: str = ""

    @property
    def card(self) -> str:
        """The text of the model card in the folder, as Markdown."""
        return (self.folder / card.NAME).read_text(encoding="utf-8")


@noted()
def merge(
    recipe: Recipe | str | Path, folder: str | Path, *, max_shard_size: int | str = "5GB", report: Report = silent
) -> Merged:
    """Merge the models of a recipe into a folder, with a model card.

    Args:
        recipe: a YAML file, or a recipe.
        folder: absent, empty, or an earlier output. It appears whole or not at all.
        max_shard_size: size of the largest weight file: a number of bytes, or a text such as `5GB`.
        report: called with (what, done, total).

    Raises:
        InputError: naming what is wrong with the recipe, the models, the folder or the size.
        LewisError: if the work fails.
    """
    if not isinstance(folder, str | PathLike):
        raise InputError(f"folder: expected the path of the output, got {folder!r}; give one, such as 'merged'")
    recipe, folder, shard = load(recipe), check_output_folder(Path(folder), "folder"), parse_size(str(max_shard_size))
    given, prepared = prepare(recipe, report)
    written = prepared.run(
        folder,
        max_shard_size=shard,
        manifest=given.lineage(),
        progress=report,
        unchanged=given.check_unchanged,
    )
    return with_card(recipe, given, written)


def prepare(recipe: Recipe, report: Report = silent) -> tuple[MergeInput, Merge]:
    """Do all steps before the merge: fetch, check and measure the models, allocate densities. The store is used.

    Returns:
        What is merged, and the merge, checked and ready to be run.

    Raises:
        InputError, LewisError: as `merge`.
    """
    walked, known = graph(recipe), begin(recipe)
    check, node = walked["inspect"], walked["merge experts"]
    results = run(walked, *check.needs, known=known, report=report)
    checked = replace(check.given(results), copies=0)
    results[check.name] = check.step.make(checked, report, "cpu")
    for each in walked.of(DIAGNOSE):
        look(each.given(results), report)
    results = run(walked, *node.needs, known=results, report=report, device=default_device())
    given = node.given(results)
    given = checked.merge if checked.merge == given else given  # a plain merge is prepared already
    return given, prepare_merge(given)


def with_card(recipe: Recipe, given: MergeInput, written: Written) -> Merged:
    """Put the model card next to the weights that a merge has just written."""
    write_card(written, recipe, given.base, given.experts, given.allocated)
    means = dict(given.allocated.means) if given.allocated else {}
    return Merged(written.folder, written.digest, written.size, means, written.manifest, written.adapter, written.fit)


def plan(recipe: Recipe | str | Path) -> Plan:
    """Return what a run of a recipe would do, and what it needs; only configs and tokenizers are downloaded.

    Raises:
        InputError: for all problems that a run would report and that can be known before the work.
    """
    return make_plan(load(recipe))


@noted()
def measure(recipe: Recipe | str | Path, *, report: Report = silent) -> list[ImportanceEntry]:
    """Measure the importance of the layers of each model that a recipe measures: `entry.norms`, `entry.moments`.

    Raises:
        RecipeError: if the recipe measures nothing.
        InputError, LewisError: as `merge`.
    """
    recipe = load(recipe)
    walked = graph(recipe)
    names = [node.name for node in walked.of(MEASURE)]
    if not names:
        raise RecipeError("lewis: missing, or with densities that need no measurement; there is nothing to measure")
    results = run(walked, *names, known=begin(recipe), report=report, device=default_device())
    return [entry for name in names for entry in results[name]]


@noted()
def allocate(recipe: Recipe | str | Path, *, report: Report = silent) -> AllocationEntry:
    """Allocate the densities of each expert of a recipe: `entry.experts()[reference].densities`.

    Raises:
        RecipeError: if the recipe allocates no densities.
        InputError, LewisError: as `merge`.
    """
    recipe = load(recipe)
    walked = graph(recipe)
    if ALLOCATE.name not in walked:
        raise RecipeError("lewis: missing; there is nothing to allocate without this block")
    results = run(walked, ALLOCATE.name, known=begin(recipe), report=report, device=default_device())
    found: AllocationEntry = results[ALLOCATE.name]
    return found


@noted()
def score(recipe: Recipe | str | Path, folder: str | Path, *, report: Report = silent) -> list[Score]:
    """Score a model by the `evaluate` block of a recipe; scores of the same files are taken from the store.

    Args:
        recipe: a recipe with an `evaluate` block.
        folder: a checkpoint with its tokenizer, or an adapter on the recipe's base, such as `merge` wrote.
        report: called with (what, done, total).

    Raises:
        RecipeError: if the recipe has no such block.
        InputError, LewisError: as `merge`.
    """
    if not isinstance(folder, str | PathLike):
        raise InputError(f"folder: expected the path of a model, got {folder!r}; give one, such as 'merged'")
    recipe, folder = load(recipe), Path(os.path.expanduser(folder)).absolute()
    if recipe.evaluate is None:
        raise RecipeError("evaluate: missing; it says what is scored")
    base = pin(recipe.base_model, recipe.root) if recipe.base_model and is_adapter(folder) else None
    files = download(pin(str(folder), recipe.root, base))
    return score_model(
        files, EvalSettings.of(recipe.evaluate, recipe.root), device=default_device(), progress=report
    ).scores


@noted()
def inspect(
    recipe: Recipe | str | Path, *, candidates: Sequence[str | Path] = (), report: Report = silent
) -> Inspection:
    """Inspect whether the models of a recipe belong together: `found.findings`, `found.verdict`.

    A model that does not fit is a finding, and is not downloaded.

    Args:
        recipe: a YAML file, or a recipe.
        candidates: references of other models that may be an expert's base.
        report: called with ("inspect", elements read, elements in all).

    Raises:
        InputError: if a model does not exist, or the base is broken.
        TransientError: if the Hub cannot be asked right now; trying again can help.
    """
    if isinstance(candidates, str | PathLike) or not isinstance(candidates, Iterable):
        one = str(candidates)
        raise InputError(f"candidates: expected a list of references, got {one!r}; give [{one!r}]")
    recipe = load(recipe)
    base, experts = pin_all(recipe)
    others = [pin(str(ref), recipe.root) for ref in candidates]
    first = base or experts[0]
    preflight(recipe, first, [], needed=recipe.needs_network)
    fitting, refused = [], []
    for source in experts if base else experts[1:]:
        try:
            preflight(recipe, first, [source], needed=recipe.needs_network)
            fitting.append(download(source))
        except RecipeError:
            raise
        except InputError as error:
            refused.append(Finding("no fit", source.ref, str(error)))
    settings = inspection_settings(recipe)
    known = [*refused, *before_download(base, experts, settings)]
    files = download(first)
    first_of, rest = (files, tuple(fitting)) if base else (None, (files, *fitting))
    given = InspectionInput(first_of, rest, settings, tuple(download(each) for each in others))
    found = inspect_models(given, report, known=known)
    if found.errors or not recipe.fits:
        return found
    here = {f"{DOWNLOAD.name} {each.ref}": each for each in (files, *fitting)}
    return replace(found, findings=(*found.findings, *_findings_on_rows(recipe, here)))


def _findings_on_rows(recipe: Recipe, here: Mapping[str, ModelFiles]) -> list[Finding]:
    """Return findings on experts that do not know their calibration rows; none if the rows cannot be had."""
    walked = graph(recipe)
    try:
        results = run(walked, *(each.name for each in (*walked.of(CALIBRATE), *walked.of(CONTINUE))), known=here)
        return row_findings(walked["merge experts"].given(results))
    except LewisError as error:
        logger.warning("the calibration rows are not checked: %s", error)
        return []


def load(recipe: Recipe | str | Path) -> Recipe:
    """Return a recipe, which is read from its file if a path is given.

    Raises:
        InputError: if neither a path nor a recipe is given, such as a dict; or as `Recipe.load`.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str | PathLike):
        raise InputError(
            f"recipe: expected the path of a YAML file or a lewis.Recipe, got {type(recipe).__name__}; "
            "lewis.Recipe.parse(text, root=folder) makes one of YAML or JSON text"
        )
    return Recipe.load(recipe)
