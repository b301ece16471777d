"""The tasks around the registry: find the champion, compare with it, register, promote, publish on the Hub."""

import logging
from dataclasses import replace

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from lewis.allocation.step import AllocationEntry
from lewis.errors import InputError
from lewis.evaluation import pairwise_judge
from lewis.evaluation.documents import side_by_side
from lewis.evaluation.gate import Incumbent, Verdict, judge
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.looks import Look, look_at
from lewis.evaluation.statistics.scored import MERGED, Scored, without_mark
from lewis.evaluation.step import ModelScores, find_comparable, scored_models
from lewis.importance.step import CalibrationEntry
from lewis.merging.step import MergedModel
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.registry import creation, promotion, publishing, versions
from lewis.registry.publishing import Published
from lewis.registry.registration import registration_of
from lewis.registry.versions import Champion, Version
from lewis.reports import card
from lewis.reports.markdown import plain
from lewis.reports.run_report import approve_command
from lewis_tasks.support import flow_run, moves
from lewis_tasks.support.assets import artifact_key
from lewis_tasks.support.caching import RETRIES

logger = logging.getLogger(__name__)


@task(name="find-champion", task_run_name="find champion", cache_policy=NO_CACHE, timeout_seconds=6 * 3600, **RETRIES)
def find_champion(name: str, to_score: bool) -> Champion | None:
    """Return the champion of a registered model, or None; its files are fetched to this disk if it is `to_score`."""
    current = versions.champion(name)
    return versions.fetch(current) if current and to_score else current


@task(name="find-mark", task_run_name="find mark", cache_policy=NO_CACHE, timeout_seconds=6 * 3600, **RETRIES)
def find_mark(name: str) -> Champion | None:
    """Return the mark, which no later version may fall behind, with its files fetched for scoring; None if none."""
    current = promotion.mark(name)
    return versions.fetch(current) if current else None


@task(name="look", task_run_name="look at {documents} documents", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def look(
    recipe: Recipe, champion: Champion | None, merged: MergedModel, scores: dict[str, ModelScores], documents: int
) -> tuple[bool, int | None]:
    """Return whether the verdict on `documents` per task is certain, and how many the next look takes; None: all."""
    found = _judged(recipe, champion, merged, scores, documents)
    flow_run.name_task(f"look at {documents} documents: {'certain' if found.certain else 'not certain yet'}")
    return found.certain, _look(recipe, scores, documents).after


# A judge is asked up to 400 questions.
@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE, timeout_seconds=6 * 3600, **RETRIES)
def gate(
    recipe: Recipe,
    champion: Champion | None,
    merged: MergedModel,
    scores: dict[str, ModelScores],
    documents: int | None = None,
) -> Verdict:
    """Judge if a merged model may be promoted, compared with the champion, or with a parent if there is no champion.

    Args:
        documents: how many of each task were scored; None: all.
    """
    found, rule = _judged(recipe, champion, merged, scores, documents), recipe.gate
    if not (rule and rule.judge and found.passed and found.metric):
        return found
    models = scored_models(recipe.score_weights, without_mark(scores))
    opinion = pairwise_judge.opinion(rule.judge, side_by_side(recipe.gate_metric, models))
    return replace(found, passed=opinion.passed, reasons=(str(opinion), *found.reasons))


def _judged(
    recipe: Recipe,
    champion: Champion | None,
    merged: MergedModel,
    scores: dict[str, ModelScores],
    documents: int | None,
) -> Verdict:
    assert recipe.register_as is not None
    rule = recipe.register_as.gate
    standing = promotion.standing(recipe.register_as.model, merged.digest)
    models = {model.label: model for model in scored_models(recipe.score_weights, scores)} if rule else {}
    marked = models.pop("mark", None) or (_scores_of_mark(recipe, standing.mark, merged, documents) if rule else None)
    return judge(
        rule,
        list(models.values()),
        merged.digest,
        champion=Incumbent(champion.version.uri, champion.digest) if champion else None,
        standing=standing,
        marked=marked,
        limit=recipe.evaluate.limit if recipe.evaluate and recipe.evaluate.documents != "by_release" else None,
        look=_look(recipe, scores, documents),
    )


def _look(recipe: Recipe, scores: dict[str, ModelScores], documents: int | None) -> Look:
    if recipe.evaluate is None or recipe.evaluate.stop == "never":
        return Look()
    return look_at(recipe.evaluate.stop, documents, scores[MERGED].pools)


def _scores_of_mark(
    recipe: Recipe, mark: Incumbent | None, merged: MergedModel, documents: int | None
) -> Scored | None:
    """Find the mark's scores on the same documents and in the merged model's number format; None if not stored."""
    if mark is None or recipe.evaluate is None:
        return None
    settings = replace(EvalSettings.of(recipe.evaluate, recipe.root).drawn_by(merged.digest), look=documents)
    found = find_comparable(mark.uri, mark.digest, merged.digest, settings)
    return scored_models(recipe.score_weights, {"mark": ModelScores(entries=tuple(found))})[0] if found else None


# Not cached: MLflow itself knows whether this merge is registered already.
@task(name="register", task_run_name="register", cache_policy=NO_CACHE, timeout_seconds=6 * 3600, **RETRIES)
def register(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: list[ModelFiles],
    calibrations: list[CalibrationEntry],
    allocated: AllocationEntry | None,
    merged: MergedModel,
    scores: dict[str, ModelScores],
) -> Version:
    """Register a merged model with lineage, scores and pictures, or find the version of the same merge digest."""
    begin, tags = flow_run.this_run().start_time, flow_run.tags()
    began = begin.timestamp() if begin else None
    entry = registration_of(recipe, base, experts, calibrations, allocated, merged, scores, tags, began)
    card.write(merged.folder, entry.card, entry.pictures.get(card.HEAT_MAP), entry.eval_results)
    version = creation.register(entry)
    flow_run.name_task(f"register v{version.version}")
    logger.info("%s %s", version.uri, "is new" if version.created else "was registered before")
    return version


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def promote(recipe: Recipe, version: Version, verdict: Verdict, merged: MergedModel) -> tuple[bool, bool]:
    """Move the alias `champion` to a version if the gate's verdict allows it, and report the verdict and the move.

    Returns:
        whether the version is the champion now, and whether the history has something new.
    """
    about = {"recipe": recipe.name, "digest": merged.digest, "flow_run": str(flow_run.current.id or "")}
    done = promotion.promote(version, verdict, f"the run {flow_run.url()}", about)
    number, name = version.version, f"{version.name}/{version.version}"
    word, what = "failed: the champion stays", f"reject v{number}"
    if verdict.passed:
        word, what = "passed: champion", f"promote v{number}"
    if verdict.waits and done.previous != version.uri:
        word, what = f"passed: waits for `{approve_command(name)} --why ...`", f"ask about v{number}"
    flow_run.name_task(what)
    moves.report()  # also the moves that an earlier run could not report
    lines = [
        f"# {version.uri}: {word}",
        f"Compared with {plain(verdict.compared_with)}.",
        *(f"* {plain(reason)}" for reason in verdict.reasons),
    ]
    page, text = versions.page(version.name, version.version), f"{version.uri} (run {version.run_id})"
    create_link_artifact(page, text, key=artifact_key(recipe, "mlflow"), description="Model version")
    create_markdown_artifact("\n\n".join(lines), key=artifact_key(recipe, "verdict"), description="The gate's verdict")
    return verdict.passed and (done.moved or done.previous == version.uri), done.new


# Retried, since a person has answered: the answer must not be lost because MLflow is away for a minute.
@task(name="answer", task_run_name="answer about v{number}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def settle_answer(name: str, number: str, approve: bool, why: str) -> None:
    """Approve or refuse the version `number` of a model, as a person has answered this run.

    Raises:
        InputError: if it can no longer be approved or refused, or `lewis approve` has decided otherwise.
    """
    if promotion.is_waiting(name, number):
        move = promotion.approve if approve else promotion.refuse
        move(name, number, why, f"the run {flow_run.url()}")
        moves.report()
    elif promotion.is_champion(name, number) != approve:
        raise InputError(f"models:/{name}/{number}: it waits for no approval any more; see `lewis history {name}`")


@task(name="check-publish", task_run_name="check publish", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def check_publish(recipe: Recipe) -> None:
    """Check, before any work, that the Hub accepts a push to the recipe's repo, and that others can load the result."""
    assert recipe.publish is not None
    publishing.check_base(recipe.base_model, recipe.root, adapter=recipe.output.kind == "lora")
    publishing.check(recipe.publish.repo, recipe.publish.private)


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE, timeout_seconds=6 * 3600, **RETRIES)
def publish(recipe: Recipe, version: Version, merged: MergedModel) -> Published | None:
    """Push the champion to the recipe's repo on the Hub, tag the version with the commit, return where it is.

    If the version is not the champion, as the gate refused it or another replaced it, push nothing and return None.
    """
    assert recipe.publish is not None
    current = versions.champion(version.name)
    if current is None or current.version.version != version.version:
        logger.info("%s is not the champion; nothing is published", version.uri)
        return None
    title = f"{version.name} version {version.version}, merge {merged.digest[:8]}"
    made = publishing.publish(merged.folder, recipe.publish.repo, recipe.publish.private, title)
    versions.tag(version, {"lewis.published": f"{made.repo}@{made.commit}"})
    create_link_artifact(made.url, made.repo, key=artifact_key(recipe, "hub"), description="On the Hub")
    return made
