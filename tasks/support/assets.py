"""Assets for Prefect's lineage: models, their importance, and what was merged from them."""

from typing import Any

from prefect.assets import Asset, AssetProperties
from prefect.context import AssetContext
from prefect.states import Completed

from lewis.recipe.recipe import Recipe
from lewis_tasks.support.caching import slug


def model(ref: str) -> Asset:
    """A model of a recipe, by its reference."""
    return _asset("model", ref, f"Model {ref}")


def importance(ref: str) -> Asset:
    """The importance of a model's layers."""
    return _asset("importance", ref, f"Importance of {ref}")


def merged(recipe: Recipe, which: str = "experts") -> Asset:
    """The merged model of a recipe, by the name it is registered with; the uniform baseline is one of its own."""
    name = recipe.register_as.name if recipe.register_as else recipe.name
    return _asset("merged", name if which == "experts" else f"{name} {which}", f"Merged model {name} ({which})")


def parents(recipe: Recipe) -> list[Asset]:
    """What the merged model of a recipe comes from: base, experts, and the importance of those that are measured."""
    refs = dict.fromkeys([*([recipe.base_model] if recipe.base_model else []), *(e.model for e in recipe.experts)])
    measured = [str(recipe.base_model)] if recipe.measures_base else []
    measured += [e.model for e in recipe.experts] if recipe.measures else []
    return [model(ref) for ref in refs] + [importance(ref) for ref in measured]


def describe(**metadata: Any) -> None:
    """Add metadata to what the running task materialises; nothing outside of such a task."""
    context = AssetContext.get()
    for asset in context.downstream_assets if context else ():
        asset.add_metadata(metadata)


def found() -> None:
    """Tell of the assets of the running task before it ends as `Cached`, of which Prefect tells nothing.

    For what was made outside of Prefect, or for a model of the same content: in the lineage it is new.
    """
    if context := AssetContext.get():
        context.emit_events(Completed())


def _asset(kind: str, name: str, title: str) -> Asset:
    return Asset(key=f"lewis://{kind}/{slug(name)[:400]}", properties=AssetProperties(name=title))
