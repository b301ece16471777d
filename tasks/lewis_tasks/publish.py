"""Publish the champion on the Hub."""

import logging

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from lewis.merging.step import MergedModel
from lewis.recipe.recipe import Recipe
from lewis.registry import publishing, versions
from lewis.registry.publishing import Published
from lewis.registry.versions import Version
from lewis_tasks.support.assets import artifact_key
from lewis_tasks.support.caching import RETRIES

logger = logging.getLogger(__name__)


@task(name="check-publish", task_run_name="check publish", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def check_publish(recipe: Recipe) -> None:
    """Check, before any work, that the Hub will let us publish."""
    assert recipe.publish is not None
    publishing.check_base(recipe.base_model, recipe.root, adapter=recipe.output.kind == "lora")
    publishing.check(recipe.publish.repo, recipe.publish.private)


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE, timeout_seconds=6 * 3600, **RETRIES)
def publish(recipe: Recipe, version: Version, merged: MergedModel) -> Published | None:
    """Push the champion to the recipe's repo, with the commit in the version's tags; return where it is.

    If the version is not the champion, because the gate refused it or another took its place, it gives None and pushes
    nothing.
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
