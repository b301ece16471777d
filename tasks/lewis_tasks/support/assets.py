"""Assets for Prefect's lineage: models, their importance, and what was merged from them; the keys of artifacts."""

from typing import Any

from prefect.assets import Asset, AssetProperties
from prefect.states import Completed

from lewis import private_names
from lewis.recipe.recipe import Recipe
from lewis_tasks.support.caching import slug

TITLES = {"model": "Model {}", "importance": "Importance of {}", "merged": "Merged model {}"}


def artifact_prefix(recipe: Recipe) -> str:
    """What the keys of a recipe's artifacts begin with: `[team-]recipe`."""
    team = recipe.register_as.team if recipe.register_as else ""
    return "-".join(filter(None, (team, slug(recipe.name))))


def artifact_key(recipe: Recipe, what: str) -> str:
    """The key of an artifact of a recipe: `[team-]recipe-what`."""
    return f"{artifact_prefix(recipe)}-{what}"


def asset(kind: str, name: str) -> Asset:
    """A `model` of a recipe by its reference, the `importance` of its layers, or what was `merged`, by its name."""
    return Asset(key=f"lewis://{kind}/{slug(name)[:400]}", properties=AssetProperties(name=TITLES[kind].format(name)))


def describe(**metadata: Any) -> None:
    """Add metadata to the assets of the running task; does nothing outside of a task that has assets."""
    context = private_names.PREFECT_ASSET_CONTEXT.get().get()
    for asset in context.downstream_assets if context else ():
        asset.add_metadata(metadata)


def found() -> None:
    """Report the assets of the running task, which then ends as `Cached`: for that state Prefect reports none.

    The store may have them from a run outside of Prefect, or from another model with the same content. Then the lineage
    does not have them yet.
    """
    if context := private_names.PREFECT_ASSET_CONTEXT.get().get():
        context.emit_events(Completed())
