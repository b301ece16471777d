"""The end of a merge: judge, register, promote and publish, by hand-made tasks, which no graph has."""

from dataclasses import dataclass
from typing import Any

from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote

from lewis.evaluation.statistics.scored import shown
from lewis.recipe.recipe import Recipe
from lewis.reports.run_report import verdict_line
from lewis_flows.merge_report import MergeReport
from lewis_flows.walk import Scores, Walk, finish, known, known_scores, submit
from lewis_tasks.publish import publish
from lewis_tasks.register import gate, promote, register


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        verdict, version, promoted, published: futures; None if the recipe does not register, or publish.
        there: where the champion was published, if that went well.
        moved: whether the champion is another one now.
        line: name and message of the run's state.
    """

    verdict: PrefectFuture[Any] | None = None
    version: PrefectFuture[Any] | None = None
    promoted: PrefectFuture[Any] | None = None
    published: PrefectFuture[Any] | None = None
    there: Any = None
    moved: bool = False
    line: tuple[str, str] = ("Completed", "merged; the recipe registers nothing")


def register_merge(
    plan: Recipe,
    walk: Walk,
    report: MergeReport,
    champion: PrefectFuture[Any] | None,
    scores: Scores,
    documents: int | None = None,
) -> Ended:
    """Judge, register, promote and publish, and write into the report what came of it.

    Args:
        documents: of each task, if not all were scored.
    """
    merged = walk.futures["merge experts"]
    after = [each for of_model in scores.values() for each in of_model] or [merged]
    known_of_models = known_scores(scores)
    verdict = submit(gate, quote(plan), known(champion), known(merged), known_of_models, documents, wait_for=after)
    finish(verdict)
    inputs = walk.inputs(plan)
    version = submit(register, quote(plan), *inputs, known(merged), known_scores(shown(scores)), wait_for=[verdict])
    finish(version)
    promoted = submit(promote, quote(plan), version, known(verdict), known(merged))
    finish(promoted)
    report.version, report.created = version.result().uri, version.result().created
    report.verdict, report.promoted = list(verdict.result().reasons), promoted.result()
    current = champion.result() if champion else None
    in_use = current.version.uri if current else None
    line = verdict_line(report.version, verdict.result(), champion=in_use)
    published = there = None
    if plan.publish:
        published = submit(publish, quote(plan), known(version), known(merged), wait_for=[promoted])
        published.wait()  # its error is raised after the report
        there = published.result() if published.state.is_completed() else None
    moved = report.promoted and in_use != report.version
    return Ended(verdict, version, promoted, published, there, moved, line)
