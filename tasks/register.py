"""The registry's side: compare with the champion, register, promote."""

import logging

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from lewis.allocation.step import AllocationEntry
from lewis.evaluation.gate import Verdict, decide
from lewis.evaluation.scored import Scored
from lewis.evaluation.step import ScoresEntry, scored
from lewis.importance.step import CalibrationEntry
from lewis.merge.step import MergedModel
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.registry import promotion, versions
from lewis.registry.promotion import Promotion
from lewis.registry.registration import registry_entry
from lewis.registry.versions import Champion, Version
from lewis.reports import card
from lewis_tasks.support import flow_run
from lewis_tasks.support.caching import RETRIES, slug

logger = logging.getLogger(__name__)
PROMOTED = "lewis.model.promoted"  # for automations: notify, deploy


@task(name="find-champion", cache_policy=NO_CACHE, timeout_seconds=6 * 3600, **RETRIES)
def find_champion(name: str, to_score: bool) -> Champion | None:
    """The version in use, with its checkpoint on this disk if it is to be scored."""
    current = versions.champion(name)
    return versions.fetch(current) if current and to_score else current


@task(name="gate", cache_policy=NO_CACHE, timeout_seconds=600)
def gate(recipe: Recipe, champion: Champion | None, merged: MergedModel, scores: dict[str, ScoresEntry]) -> Verdict:
    """May the merged model be promoted? Compared with the champion, or with a parent before there is one."""
    assert recipe.register_as is not None
    rule = recipe.register_as.gate
    if champion and champion.digest == merged.digest:
        return Verdict(True, ("this very model is the champion already",), champion.version.uri)
    if (why := promotion.withdrawn(recipe.register_as.name, merged.digest)) is not None:
        told = f"this very model was rolled back by hand ({why}); only `lewis promote` brings it back: fail"
        return Verdict(False, (told,), champion.version.uri if champion else "nothing")
    if rule is None:
        return Verdict(True, ("no gate in the recipe",), champion.version.uri if champion else "nothing")
    models = {model.label: model for model in scored(recipe, scores)}
    ours, base = models.pop(recipe.label), models.get("base")
    if champion and "champion" not in models:
        lost = f"{champion.version.uri} must be scored again: its files are gone; see `lewis promote`: fail"
        return Verdict(False, (lost,), champion.version.uri)
    reference = models["champion"] if champion else base or _best(rule.metric, models)
    against = champion.version.uri if champion else reference.label
    limit = recipe.evaluate.limit if recipe.evaluate else None
    return decide(rule, ours, reference, against, base=base, limit=limit)


def _best(metric: str, parents: dict[str, Scored]) -> Scored:
    """The parent to beat where there is neither a champion nor a base."""
    known = {label: model.by_name[metric] for label, model in parents.items() if metric in model.by_name}
    if not known:
        return next(iter(parents.values()))
    higher = next(iter(known.values())).higher_is_better
    return parents[max(known, key=lambda label: known[label].value if higher else -known[label].value)]


# MLflow decides whether this very merge is registered already: no cache in front of it.
@task(name="register", cache_policy=NO_CACHE, timeout_seconds=6 * 3600, **RETRIES)
def register(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: list[ModelFiles],
    calibrations: list[CalibrationEntry],
    allocated: AllocationEntry | None,
    merged: MergedModel,
    scores: dict[str, ScoresEntry],
) -> Version:
    """One version per merge digest, with its lineage, scores and pictures."""
    tags = flow_run.tags()
    entry = registry_entry(recipe, base, experts, calibrations, allocated, merged, scores, tags)
    card.write(merged.folder, entry.card, entry.pictures.get(card.HEAT_MAP))
    version = versions.register(entry)
    logger.info("%s %s", version.uri, "is new" if version.created else "was registered before")
    return version


@task(name="promote", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def promote(recipe: Recipe, version: Version, verdict: Verdict, merged: MergedModel) -> bool:
    """Move the alias `champion` if the verdict allows it; says whether the version is the champion now."""
    done = promotion.promote(version, verdict, f"the run {flow_run.url()}")
    if done.moved:
        _announce(recipe, version, verdict, merged, done)
    word = "passed: champion" if verdict.passed else "failed: the champion stays"
    lines = [
        f"# {version.uri}: {word}",
        f"Compared with {verdict.compared_with}.",
        *(f"* {r}" for r in verdict.reasons),
    ]
    create_markdown_artifact("\n\n".join(lines), key=f"{slug(recipe.name)}-verdict", description="The gate's verdict")
    text = f"{version.uri} (run {version.run_id})"
    create_link_artifact(versions.link(version), text, key=f"{slug(recipe.name)}-mlflow", description="Model version")
    return verdict.passed


def _announce(recipe: Recipe, version: Version, verdict: Verdict, merged: MergedModel, done: Promotion) -> None:
    emit_event(
        event=PROMOTED,
        resource={"prefect.resource.id": f"lewis.model.{version.name}", "prefect.resource.name": version.name},
        payload={
            "recipe": recipe.name,
            "version": version.version,
            "uri": version.uri,
            "url": versions.link(version),
            "digest": merged.digest,
            "previous": done.previous,
            "reasons": list(verdict.reasons),
        },
    )
