"""The registry's side: compare with the champion, register, promote."""

import logging

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from lewis import registry
from lewis.entries import AllocationEntry, CalibrationEntry, MergedModel, ModelFiles, ScoresEntry
from lewis.gate import Verdict, decide
from lewis.recipe import Recipe
from lewis.registration import registry_entry
from lewis.registry import Champion, Promotion, Version
from tasks import provenance
from tasks.caching import RETRIES, slug

logger = logging.getLogger(__name__)
PROMOTED = "lewis.model.promoted"  # for automations: notify, deploy


@task(name="find-champion", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def find_champion(name: str) -> Champion | None:
    """The version in use, whose scores are to beat."""
    return registry.champion(name)


@task(name="gate", cache_policy=NO_CACHE, timeout_seconds=600)
def gate(recipe: Recipe, champion: Champion | None, merged: MergedModel, scores: dict[str, ScoresEntry]) -> Verdict:
    """May the merged model be promoted? Compared with the champion, or with the base before there is one."""
    assert recipe.register_as is not None
    against = champion.version.uri if champion else "base"
    if champion and champion.digest == merged.digest:
        return Verdict(True, ("this very model is the champion already",), against)
    found = {label: {f"{s.task}/{s.metric}": s for s in entry.scores} for label, entry in scores.items()}
    numbers = {label: {key: s.value for key, s in each.items()} for label, each in found.items()}
    reference = numbers.get("champion") or (dict(champion.metrics) if champion else numbers.get("base", {}))
    rule = recipe.register_as.gate
    judged = found.get(recipe.label, {}).get(rule.metric) if rule else None
    higher = judged.higher_is_better if judged else True
    return decide(rule, numbers.get(recipe.label, {}), reference, against, higher_is_better=higher)


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
    tags = provenance.tags()
    entry = registry_entry(recipe, base, experts, calibrations, allocated, merged, scores, tags)
    version = registry.register(entry)
    logger.info("%s %s", version.uri, "is new" if version.created else "was registered before")
    return version


@task(name="promote", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def promote(recipe: Recipe, version: Version, verdict: Verdict, merged: MergedModel) -> bool:
    """Move the alias `champion` if the verdict allows it; says whether the version is the champion now."""
    promotion = registry.promote(version, verdict)
    if promotion.moved:
        _announce(recipe, version, verdict, merged, promotion)
    word = "passed: champion" if verdict.passed else "failed: the champion stays"
    lines = [
        f"# {version.uri}: {word}",
        f"Compared with {verdict.compared_with}.",
        *(f"* {r}" for r in verdict.reasons),
    ]
    create_markdown_artifact("\n\n".join(lines), key=f"{slug(recipe.name)}-verdict", description="The gate's verdict")
    text = f"{version.uri} (run {version.run_id})"
    create_link_artifact(registry.link(version), text, key=f"{slug(recipe.name)}-mlflow", description="Model version")
    return verdict.passed


def _announce(recipe: Recipe, version: Version, verdict: Verdict, merged: MergedModel, promotion: Promotion) -> None:
    emit_event(
        event=PROMOTED,
        resource={"prefect.resource.id": f"lewis.model.{version.name}", "prefect.resource.name": version.name},
        payload={
            "recipe": recipe.name,
            "version": version.version,
            "uri": version.uri,
            "url": registry.link(version),
            "digest": merged.digest,
            "previous": promotion.previous,
            "reasons": list(verdict.reasons),
        },
    )
