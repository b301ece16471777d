"""The end of a merge and its report: judge, register, promote and publish, by tasks that are no nodes of the graph."""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote
from pydantic import BaseModel

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.errors import LewisError
from lewis.evaluation.statistics.scored import MERGED, without_mark
from lewis.merging.step import MergedModel
from lewis.recipe.recipe import Recipe
from lewis.reports.run_report import verdict_line
from lewis.store import kinds
from lewis_flows.scoring import Judged
from lewis_flows.walk import Scores, Walk, finish, known, known_scores, submit
from lewis_tasks.register import gate, promote, publish, register
from lewis_tasks.report import report_scores

logger = logging.getLogger(__name__)


class MergeReport(BaseModel):
    """The result of a run of the flow `merge`.

    Attributes:
        recipe: its name.
        digest, folder: of the merged checkpoint, or adapter, in the store.
        adapter: what the adapter holds and what error it leaves; None for a full model.
        fit: what `ridge: auto` chose and what held-back rows say of the fit, as a sentence; else empty.
        mean_density: expert -> parameter-weighted mean density; empty for a plain merge.
        scores: rows of the score table.
        comparison: rows of the merged model against each other model: gain, interval, wins, losses, p.
        kept: rows of how much of each expert's gain over the base is kept; empty if base or experts are not scored.
        version: `models:/name/version`, if the recipe registers.
        created: whether that version is new.
        promoted: whether it is the champion now.
        waits: whether it passed the gate, and a person has to approve it.
        verdict: the gate's reasons.
        published: URL of the champion on the Hub, if the recipe publishes.
        page: the report of the run as an HTML file.
    """

    recipe: str
    digest: str
    folder: Path
    adapter: str | None = None
    fit: str = ""
    mean_density: dict[str, float] = {}
    scores: list[dict[str, str]] = []
    comparison: list[dict[str, str]] = []
    kept: list[dict[str, str]] = []
    version: str | None = None
    created: bool = False
    promoted: bool = False
    waits: bool = False
    verdict: list[str] = []
    published: str | None = None
    page: Path | None = None

    def save(self, run: str) -> None:
        """Store the report under the id of its run, for `saved`; a full disk does not fail the run."""
        with suppress(OSError):
            store.write_entry(kinds.RUN_REPORTS.path(run), json.loads(self.model_dump_json()))

    @classmethod
    def saved(cls, run: str) -> "MergeReport | None":
        """Load the report that `save` stored for a run; None if this store has none."""
        found = store.read_entry(kinds.RUN_REPORTS.path(run))
        return cls.model_validate(found) if found else None

    @classmethod
    def of(cls, recipe: str, merged: MergedModel, allocated: AllocationEntry | None) -> "MergeReport":
        """Make the report of a merge that is not scored yet."""
        adapter = merged.adapter.to_text() if merged.adapter else None
        means = allocated.means if allocated else {}
        return cls(
            recipe=recipe,
            digest=merged.digest,
            folder=merged.folder,
            adapter=adapter,
            fit=merged.fit,
            mean_density=means,
        )


@dataclass(frozen=True)
class Ended:
    """The outcome of the tasks at the end of a merge.

    Attributes:
        scores: those for the tables, if a version was scored on all documents after its promotion; else empty.
        verdict, version, promoted, published: futures; None if the recipe does not register, or publish.
        there: where the champion was published, if that went well.
        changed: whether the champion is another one now, or the verdict or its reasons are.
        line: name and message of the run's state.
    """

    scores: Scores = field(default_factory=dict)
    verdict: PrefectFuture[Any] | None = None
    version: PrefectFuture[Any] | None = None
    promoted: PrefectFuture[Any] | None = None
    published: PrefectFuture[Any] | None = None
    there: Any = None
    changed: bool = False
    line: tuple[str, str] = ("Completed", "merged; the recipe registers nothing")


def register_merge(
    plan: Recipe,
    walk: Walk,
    report: MergeReport,
    champion: PrefectFuture[Any] | None,
    judged: Judged,
) -> Ended:
    """Judge, register, promote and publish a merge, and write that into its report.

    If the recipe says so, a promoted version with scores on a part of the documents gets them on all before publishing.
    """
    scores, documents, merged = judged.scores, judged.documents, walk.futures["merge experts"]
    after = [each for of_model in scores.values() for each in of_model] or [merged]
    known_of_models = known_scores(scores)
    verdict = submit(gate, quote(plan), known(champion), known(merged), known_of_models, documents, wait_for=after)
    finish(verdict)
    version = _register(plan, walk, scores, verdict)
    promoted = submit(promote, quote(plan), version, known(verdict), known(merged))
    finish(promoted)
    report.version, report.created = version.result().uri, version.result().created
    report.promoted, new = promoted.result()
    report.verdict = list(verdict.result().reasons)
    report.waits = verdict.result().waits and not report.promoted
    current = champion.result() if champion else None
    in_use = current.version.uri if current else None
    line = verdict_line(report.version, verdict.result(), champion=in_use)
    on_all, missing = _score_on_all(plan, walk, report, judged, promoted) if report.promoted else ({}, "")
    line = (line[0], f"{line[1]}; not scored on all documents, run again: {missing}") if missing else line
    published = there = None
    if plan.publish:
        published = submit(publish, quote(plan), known(version), known(merged), wait_for=[promoted])
        published.wait()  # an error is raised only after the report
        there = published.result() if published.state.is_completed() else None
    changed = new or (report.promoted and in_use != report.version)
    return Ended(on_all, verdict, version, promoted, published, there, changed, line)


def report_tables(plan: Recipe, report: MergeReport, scores: Scores) -> None:
    """Show the tables of scores in the UI, and write them into the report."""
    table = submit(report_scores, quote(plan), known_scores(scores), wait_for=scores[MERGED])
    finish(table)
    for name, rows in table.result().items():
        setattr(report, name, rows)


def _score_on_all(
    plan: Recipe, walk: Walk, report: MergeReport, judged: Judged, promoted: PrefectFuture[Any]
) -> tuple[Scores, str]:
    """Score on all documents a version that was promoted early, and register these scores.

    Return the scores, empty if they are not wanted or failed, and the error, else empty; it fails nothing else.
    """
    if judged.on_all is None:
        return {}, ""
    try:
        scores = without_mark(judged.on_all())
        _register(plan, walk, scores, promoted)
        report_tables(plan, report, scores)
    except LewisError as error:
        logger.warning("%s was promoted, and is not scored on all documents: %s", report.version, error)
        return {}, str(error)
    return scores, ""


def _register(plan: Recipe, walk: Walk, scores: Scores, after: PrefectFuture[Any]) -> PrefectFuture[Any]:
    merged = known(walk.futures["merge experts"])
    version = submit(
        register, quote(plan), *walk.inputs(plan), merged, known_scores(without_mark(scores)), wait_for=[after]
    )
    finish(version)
    return version
