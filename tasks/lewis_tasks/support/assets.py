"""Assets for Prefect's lineage: models, their importance, and what was merged from them; the keys of artifacts."""

from typing import Any

from prefect.assets import Asset, AssetProperties
from prefect.states import Completed

from lewis import private_names
from lewis.models.hub.client import endpoint
from lewis.models.source import Source
from lewis.recipe.recipe import Recipe
from lewis.redact import redacted
from lewis_tasks.support.caching import slug

TITLES = {"model": "Model {}", "importance": "Importance of {}", "merged": "Merged model {}"}


def artifact_prefix(recipe: Recipe) -> str:
    """Return the prefix of the keys of a recipe's artifacts: `[team-]recipe`."""
    team = recipe.register_as.team if recipe.register_as else ""
    return "-".join(filter(None, (team, slug(recipe.name))))


def artifact_key(recipe: Recipe, what: str) -> str:
    """The key of an artifact of a recipe: `[team-]recipe-what`."""
    return f"{artifact_prefix(recipe)}-{what}"


def asset(kind: str, name: str, url: str = "", owner: str = "") -> Asset:
    """Return the asset of a model, of the importance of its layers, or of a merged model.

    Args:
        kind: `model`, `importance` or `merged`.
        name: reference of the model, or name of the merged model.
        url: of its page; empty if it has none.
        owner: the team that it belongs to; empty if that is not known.
    """
    owners = [owner] if owner else None
    about = AssetProperties(name=TITLES[kind].format(name), url=url or None, owners=owners)
    return Asset(key=f"lewis://{kind}/{slug(name)[:400]}", properties=about)


def page_of(source: Source) -> str:
    """Return the URL of the Hub page of a pinned model, or of its adapter if it has one; empty for a local folder."""
    pinned = source.adapter or source.model
    return "" if pinned.is_local else redacted(f"{endpoint()}/{pinned.source}/tree/{pinned.commit}")


def describe(**metadata: Any) -> None:
    """Add metadata to the assets of the running task; does nothing outside of a task that has assets."""
    context = private_names.PREFECT_ASSET_CONTEXT.get().get()
    for asset in context.downstream_assets if context else ():
        asset.add_metadata(metadata)


def found() -> None:
    """Report the assets of a task that is about to end as `Cached`, since Prefect reports none for that state.

    The store may have the result from a run outside of Prefect, or from another model with the same content. Then the
    lineage in Prefect lacks these assets.
    """
    if context := private_names.PREFECT_ASSET_CONTEXT.get().get():
        context.emit_events(Completed())
