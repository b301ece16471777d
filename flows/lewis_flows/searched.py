"""What a search hands on to the merge of its best values: the recipe and the models that it began with."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from lewis.errors import InputError
from lewis.recipe.recipe import Recipe


@dataclass(frozen=True)
class Searched:
    """What a search has tried its values on.

    Attributes:
        plan: the recipe, as it was read when the search began.
        overrides: with which it was read.
        keys: reference of each model -> the commits that the search has pinned.
    """

    plan: Recipe
    overrides: list[str]
    keys: Mapping[str, str]

    def check(self, now: Recipe) -> None:
        """Check that a recipe still says what it said; its comments may be others.

        Args:
            now: as its file is by now, read with `overrides`.

        Raises:
            InputError: naming the keys that have another value.
        """
        before, after = (each.model_dump(mode="json", by_alias=True) for each in (self.plan, now))
        if changed := [key for key, value in after.items() if value != before[key]]:
            raise InputError(
                f"{now.name}: edited while its search worked: {', '.join(changed)}; the best values were found for "
                "the recipe as it was, so nothing was merged or registered; run the search again"
            )


SEARCHED: ContextVar[Searched | None] = ContextVar("searched", default=None)
"""Of the search that the running merge confirms; None: there is none."""
