"""The recipes that the service keeps up to date: every YAML file at the top of one folder."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from lewis.errors import InputError
from lewis.recipe.checks import nearest
from lewis.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


def folder() -> Path:
    """`LEWIS_RECIPES`, by default `deployments/recipes` of this checkout.

    Raises:
        InputError: if it does not exist.
    """
    default = Path(__file__).resolve().parents[1] / "deployments" / "recipes"
    path = Path(os.environ.get("LEWIS_RECIPES") or default).expanduser().absolute()
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; set LEWIS_RECIPES to the folder of your recipes")
    return path


def names() -> list[str]:
    """The recipes' names, sorted: their files' names without the ending."""
    return sorted(path.stem for path in _files())


def find(recipe: str) -> Path:
    """The file of a recipe, given by the name it has in the folder or by a path.

    Raises:
        InputError: if there is none.
    """
    by_name = {path.stem: path for path in _files()} if recipe.strip(".") and "/" not in recipe else {}
    if recipe in by_name:
        return by_name[recipe]
    path = Path(recipe).expanduser()
    if not path.is_file():
        raise InputError(f"{recipe}: no recipe of this name in {folder()} and no such file{nearest(recipe, by_name)}")
    return path.absolute()


def name_of(recipe: str) -> str:
    """The name of a recipe that is given by name or by path; the path of a file outside the folder stays as it is.

    Raises:
        InputError: if the folder of recipes does not exist.
    """
    path = Path(recipe)
    inside = path.suffix in (".yaml", ".yml") and path.parent.resolve() == folder().resolve()
    return path.stem if inside else recipe


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, as `find` and `Recipe.load`."""
    return Recipe.load(find(recipe), overrides)


def load_all() -> dict[str, Recipe]:
    """All recipes by name. One that is wrong is logged and left out: it must not stop the others."""
    found = {}
    for name in names():
        try:
            found[name] = load(name)
        except InputError as error:
            logger.warning("recipe %s is left out: %s", name, error)
    return found


def _files() -> list[Path]:
    return [path for path in folder().iterdir() if path.suffix in (".yaml", ".yml") and path.is_file()]
