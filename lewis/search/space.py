"""The space of a search: which values of a recipe it varies, and within which ranges or choices."""

import math
from collections.abc import Mapping
from typing import Any

import yaml

from lewis.errors import InputError, RecipeError
from lewis.methods import METHODS, find
from lewis.recipe import yaml_text
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import SearchRange

ALLOWED = (
    *("merge_method", "parameters.", "models[", "slices[", "anchor.", "lewis.density.", "lewis.importance."),
    *("lewis.prune_by", "seed"),
)
Values = Mapping[str, bool | int | float | str]  # YAML path -> value
DIGITS = 4  # of a value that a search tries
_FEWEST = 10  # values of so many digits in a range; with fewer, more digits are taken


class Numbers(SearchRange):
    """A range with what follows from the recipe.

    Attributes:
        whole: whether the key takes only whole numbers.
        digits: how many digits of a value are kept, if it is not whole.
    """

    whole: bool = False
    digits: int = DIGITS


def of(recipe: Recipe) -> dict[str, Any]:
    """Return the space of a recipe's search: YAML path -> `Numbers`, or a tuple of choices."""
    space = recipe.search.space if recipe.search else {}
    return {
        path: Numbers(**wanted.model_dump(), whole=_is_whole(recipe, path, wanted), digits=_digits(wanted))
        if isinstance(wanted, SearchRange)
        else wanted
        for path, wanted in space.items()
    }


def _is_whole(recipe: Recipe, path: str, wanted: SearchRange) -> bool:
    """Whether a range without a step has whole ends, and the recipe is not valid with a number between two of them."""
    if wanted.step or not (wanted.min.is_integer() and wanted.max.is_integer()):
        return False
    try:
        with_values(recipe, {path: wanted.min + 0.5})
    except InputError:
        return True
    return False


def _digits(wanted: SearchRange) -> int:
    largest, width = max(abs(wanted.min), abs(wanted.max)), wanted.max - wanted.min
    before = math.floor(math.log10(largest)) + 1
    if width >= _FEWEST * 10.0 ** (before - DIGITS):
        return DIGITS
    return min(before + math.ceil(round(-math.log10(width / 1000), 6)), 15)


def identity(space: Mapping[str, Any]) -> list[list[Any]]:
    """Return path, `whole` and `digits` of the ranges that are not sampled as fractions with four digits.

    The digest of a search has them besides the recipe, since earlier releases sampled all ranges with four digits.
    """
    numbers = [(path, wanted) for path, wanted in space.items() if isinstance(wanted, Numbers)]
    return [[path, each.whole, each.digits] for path, each in numbers if each.whole or each.digits != DIGITS]


def check(recipe: Recipe) -> None:
    """Check that the recipe is valid with every choice, and with both ends and the first step of every range.

    Also check that the best merge can be promoted, if the recipe draws other documents for each merge.

    Raises:
        RecipeError: with every problem, at its YAML path.
    """
    assert recipe.search is not None
    problems = []
    gate = recipe.register_as.gate if recipe.register_as else None
    if gate and not gate.allow_limit and recipe.evaluate and recipe.evaluate.documents == "by_release":
        problems.append(
            "evaluate.documents: by_release does not hold in a search, which scores `limit` documents of each half, so "
            "that its best merge could not be promoted; set register.gate.allow_limit: true"
        )
    for path, wanted in of(recipe).items():
        where = f"search.space.{path}"
        if path.endswith(("].model", ".base_model")):
            problems.append(f"{where}: a search keeps its models, since they are measured once; vary their weights")
            continue
        if not path.startswith(ALLOWED):
            problems.append(f"{where}: expected a value that the merge depends on: {', '.join(ALLOWED)}")
            continue
        ends = [wanted.min, wanted.max] if isinstance(wanted, SearchRange) else list(wanted)
        if isinstance(wanted, SearchRange) and wanted.step and wanted.min + wanted.step < wanted.max:
            ends.append(wanted.min + wanted.step)  # a key of whole numbers takes the ends, but not a step of 0.5
        if not ends:
            problems.append(f"{where}: expected at least one choice, got an empty list")
        elif len(set(map(repr, ends))) < max(2, len(ends)):
            problems.append(f"{where}: expected two choices or more, each once, got {ends}; a search varies its values")
        if path == "seed" and not any(find(name).random for name in _methods(recipe)):
            problems.append(f"{where}: {recipe.merge_method} does not draw at random, so all trials would be the same")
        for value in ends:
            try:
                with_values(recipe, {path: rounded(wanted, value)})
            except InputError as error:
                problems += [f"{where}: {line}" for line in str(error).splitlines()]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def _methods(recipe: Recipe) -> set[str]:
    """The names of all methods that a trial may merge by."""
    anchor, space = recipe.anchor, recipe.search.space if recipe.search else {}
    names = {recipe.merge_method, *([anchor.merge_method] if anchor else [])}
    for choices in (space.get("merge_method"), space.get("anchor.merge_method")):
        names |= set(map(str, choices)) if isinstance(choices, tuple) else set()
    return names & METHODS.keys()


def with_values(recipe: Recipe, values: Values, *more: str) -> Recipe:
    """Return the recipe with a trial's values and further overrides (`path=value`).

    Raises:
        RecipeError: if the values are not valid together.
    """
    given = [*overrides(values), *more]
    return Recipe.parse(recipe.text, root=recipe.root, name=recipe.name, overrides=given)


def overrides(values: Values) -> list[str]:
    """Return values as `--set` takes them: `path=value`, with the value in YAML."""
    return [f"{path}={yaml.safe_dump(value).removesuffix('...' + chr(10)).strip()}" for path, value in values.items()]


def distribution(wanted: Any) -> Any:
    """Return Optuna's distribution for `Numbers` or a tuple of choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(wanted, Numbers) and wanted.whole:
        return IntDistribution(int(wanted.min), int(wanted.max), log=wanted.log)
    if isinstance(wanted, Numbers):
        return FloatDistribution(wanted.min, wanted.max, log=wanted.log, step=wanted.step)
    return CategoricalDistribution(wanted)


def rounded(wanted: Any, value: Any) -> Any:
    """Return a value as a trial has it: of `Numbers`, rounded to its digits or to a whole number; else unchanged."""
    if not isinstance(wanted, Numbers):
        return value
    if wanted.whole or (wanted.step and wanted.step.is_integer() and wanted.min.is_integer()):
        return round(value)
    return min(wanted.max, max(wanted.min, float(f"{value:.{wanted.digits}g}")))


def holds(wanted: Any, value: Any) -> bool:
    """Whether a value is within a range, or one of the choices."""
    if not isinstance(wanted, SearchRange):
        return value in wanted
    return isinstance(value, int | float) and wanted.min <= value <= wanted.max


def value_of(recipe: Recipe, path: str) -> Any:
    """Return the value of a recipe at a YAML path: as written, else its default; None if there is neither."""
    if (value := yaml_text.look_up(yaml_text.read(recipe.text, recipe.name), path)) is not None:
        return value
    if path == "anchor.weight":  # the schema's default is a list of rules
        return 1.0
    if (value := yaml_text.look_up(recipe.model_dump(mode="json", by_alias=True), path)) is not None:
        return value
    method, name = recipe.merge_method, path.rpartition(".")[2]
    if path.startswith("anchor."):
        method = recipe.anchor.merge_method if recipe.anchor else ""
    parameter = find(method).parameters.get(name) if "parameters." in path and method else None
    return parameter.default if parameter and not parameter.required else None
