"""From a recipe to the settings of a merge; from here on no module needs the recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lewis.merging.settings import MergeSettings, ParameterValue
from lewis.methods import Parameter, find
from lewis.models.dtypes import MERGED
from lewis.models.model import Model
from lewis.models.pin import find_folder
from lewis.recipe.recipe import Recipe, excluded
from lewis.recipe.schema import Output


def resolve(recipe: Recipe, base: Model) -> MergeSettings:
    """The settings of the merge that a recipe asks for.

    Args:
        recipe: the recipe, without slices.
        base: the base, whose tensors are merged; the first model, if there is no base.

    Raises:
        RecipeError: naming each filter and each pattern of `exclude` that matches no tensor.
    """
    recipe.check_filters([*base.tensors, *base.tied])
    entries = {entry.model: entry for entry in recipe.experts}

    def value(parameter: Parameter, expert: str | None, tensor: str, depth: float) -> Any:
        return recipe.value(parameter, None if expert is None else entries[expert], tensor, depth)

    def of_anchor(parameter: Parameter, expert: str | None, tensor: str, depth: float) -> Any:
        return recipe.anchor_value(parameter, None if expert is None else entries[expert], tensor, depth)

    return settings_of(recipe, base, value, of_anchor)


def settings_of(recipe: Recipe, base: Model, value: ParameterValue, of_anchor: ParameterValue) -> MergeSettings:
    """`resolve`, with what looks up a parameter of the merge, and of its anchor."""
    settings = MergeSettings(
        method=find(recipe.merge_method),
        value=value,
        base=recipe.base_model,
        seed=recipe.seed,
        dtype=stored_dtype(recipe),
        excluded=excluded(recipe.exclude, base.tensors, base.tied),
        vocabulary=recipe.vocabulary,
        output=recipe.output,
        base_name=_base_name(recipe, base),
        chat_template=recipe.chat_template,
    )
    if recipe.anchor is None:
        return settings
    anchor = replace(settings, method=find(recipe.anchor.merge_method), value=of_anchor, output=Output())
    return replace(settings, anchor=anchor, anchor_weight=recipe.anchor_weight)


def _base_name(recipe: Recipe, base: Model) -> str:
    """How an adapter names its base: `org/name@commit`, or the absolute path of a folder."""
    if recipe.base_model is None:
        return ""
    folder = find_folder(recipe.base_model, recipe.root)
    return str(folder) if folder else f"{recipe.base_model.partition('@')[0]}@{base.key}"


def stored_dtype(recipe: Recipe) -> str | None:
    """The dtype that a recipe gives the result, as safetensors names it; None: each tensor keeps the base's.

    For an adapter it is always fp32: rounding to fewer bits would add noise of full rank to the merged delta.
    """
    if recipe.output.kind == "lora":
        return "F32"
    return MERGED.get(recipe.out_dtype or recipe.dtype or "")
