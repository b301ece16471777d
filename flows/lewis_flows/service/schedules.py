"""The nightly schedules: each recipe that can run has one, and nothing else has.

A recipe can run if it can be read and no folder of a model of it is missing. It does not matter how it came to be so: a
recipe that is added, renamed, removed, broken or mended leads to the schedules that the folder as it is now asks for.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound

from lewis.errors import InputError
from lewis.models.hub.pin import find_folder
from lewis.recipe.block import parts_of
from lewis.recipe.recipe import Recipe
from lewis_flows import prefect_runs, recipes_folder

logger = logging.getLogger(__name__)

NIGHTLY = "merge-nightly"
"""The deployment that has them."""


class Folder:
    """The folder of recipes; a file is read, and what is wrong with it told, only when the folder has changed."""

    def __init__(self) -> None:
        """Read nothing yet."""
        self._seen: object = None
        self._recipes: dict[str, Recipe] = {}
        self._told: dict[str, str] = {}

    def runnable(self) -> list[str]:
        """The names of the recipes that can run now, sorted; why another one cannot is logged once.

        Raises:
            InputError: if the folder cannot be read.
        """
        if (now := recipes_folder.signature()) != self._seen:
            self._recipes, self._seen = recipes_folder.load_all(), now
        reasons = {name: missing_folder(recipe) for name, recipe in self._recipes.items()}
        missing = {name: reason for name, reason in reasons.items() if reason}
        for name, reason in missing.items():
            if self._told.get(name) != reason:
                logger.warning("%s has no nightly schedule: %s", name, reason)
        self._told = missing
        return sorted(reasons.keys() - missing.keys())


def missing_folder(recipe: Recipe) -> str | None:
    """The error of the first model that can only be a folder, if that folder does not exist."""
    for ref in [recipe.base_model, *(entry.model for entry in recipe.models)]:
        for part in parts_of(ref, recipe.root) if ref else ():
            try:
                find_folder(part, recipe.root)
            except InputError as error:
                return str(error)
    return None


def add_schedules(content: Mapping[str, Any], recipes: Collection[str]) -> None:
    """Put the schedules into the content of a `prefect.yaml`; those that it has itself stay, if their recipe can run.

    Args:
        content: of the file; changed in place.
        recipes: names of those that can run.
    """
    nightly = _nightly(content)
    if nightly is None:
        return
    written = nightly.get("schedules") or []
    hour = {k: v for k, v in (written or [{}])[0].items() if k in ("cron", "timezone")}
    hour.setdefault("cron", "0 3 * * *")
    kept = [schedule for schedule in written if _recipe(schedule.get("parameters")) in recipes]
    known = {_recipe(schedule["parameters"]) for schedule in kept}
    kept += [{"slug": name, **hour, "parameters": {"recipe": name}} for name in recipes if name not in known]
    nightly["schedules"] = kept


def remove_stale(client: SyncPrefectClient, content: Mapping[str, Any], recipes: Collection[str]) -> None:
    """Remove the schedules on the server that nothing asks for: Prefect itself only ever adds and changes some.

    A schedule that somebody made in the UI stays while the folder has its recipe, in whatever state.

    Args:
        client: of the server that `content` was deployed to.
        content: as `add_schedules` left it.
        recipes: names of those that can run.
    """
    nightly = _nightly(content)
    if nightly is None:
        return
    wanted, files = {schedule.get("slug") for schedule in nightly["schedules"]}, recipes_folder.names()
    deployed = client.read_deployment_by_name(f"{prefect_runs.MERGE}/{NIGHTLY}")
    for schedule in deployed.schedules:
        recipe = _recipe(schedule.parameters)
        ours = schedule.slug == recipe  # as `add_schedules` names them
        if (recipe in recipes and schedule.slug in wanted) or (recipe in files and not ours):
            continue
        try:
            client.delete_deployment_schedule(deployed.id, schedule.id)
        except ObjectNotFound:  # somebody else was quicker
            continue
        logger.info("the nightly schedule of %s is removed: there is no such recipe that can run", recipe or "nothing")


def _nightly(content: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((d for d in content.get("deployments") or [] if d.get("name") == NIGHTLY), None)


def _recipe(parameters: Mapping[str, Any] | None) -> str | None:
    return (parameters or {}).get("recipe")
