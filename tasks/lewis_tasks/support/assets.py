"""Assets for Prefect's lineage: models, their importance, and what was merged from them; the keys of artifacts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.assets import Asset, AssetProperties
from prefect.context import AssetContext
from prefect.states import Completed

from lewis.recipe.recipe import Recipe
from lewis_tasks.support.caching import slug


def artifact_key(recipe: Recipe, what: str) -> str:
    """The key of an artifact of a recipe: `[team-]recipe-what`."""
    return "-".join(filter(None, (recipe.register_as.team if recipe.register_as else "", slug(recipe.name), what)))


def model(ref: str) -> Asset:
    """A model of a recipe, by its reference."""
    return _asset("model", ref, f"Model {ref}")


def importance(ref: str) -> Asset:
    """The importance of a model's layers."""
    return _asset("importance", ref, f"Importance of {ref}")


def merged(recipe: Recipe, which: str = "experts") -> Asset:
    """The merged model of a recipe, by the name it is registered under; the uniform baseline is another asset."""
    name = recipe.register_as.model if recipe.register_as else recipe.name
    return _asset("merged", name if which == "experts" else f"{name} {which}", f"Merged model {name} ({which})")


def parents(recipe: Recipe) -> list[Asset]:
    """What the merged model of a recipe is made from: base, experts, and the importance of the measured ones."""
    refs = dict.fromkeys([*([recipe.base_model] if recipe.base_model else []), *(e.model for e in recipe.experts)])
    measured = [str(recipe.base_model)] if recipe.measures_base else []
    measured += [e.model for e in recipe.experts] if recipe.measures else []
    return [model(ref) for ref in refs] + [importance(ref) for ref in measured]


def describe(**metadata: Any) -> None:
    """Add metadata to the assets of the running task; does nothing outside of a task that has assets."""
    context = AssetContext.get()
    for asset in context.downstream_assets if context else ():
        asset.add_metadata(metadata)


def found() -> None:
    """Report the assets of the running task, which then ends as `Cached`: for that state Prefect reports none.

    The store may have them from a run outside of Prefect, or from another model with the same content. Then the lineage
    does not have them yet.
    """
    if context := AssetContext.get():
        context.emit_events(Completed())


def made_or_found(entry: Any, path: Path, what: str, made: Sequence[Path]) -> Any:
    """What a task returns: `entry` if it was made in it, else a state `Cached` with it.

    Args:
        path: where the entry is in the store.
        what: it is, for the message.
        made: as `store.noticing` gave it.
    """
    if path in made:
        return entry
    found()
    return Completed(name="Cached", message=f"{what}: in the store", data=entry)


def _asset(kind: str, name: str, title: str) -> Asset:
    return Asset(key=f"lewis://{kind}/{slug(name)[:400]}", properties=AssetProperties(name=title))
