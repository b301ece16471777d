"""How commands declare their arguments, and the arguments that several commands take."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis.errors import InputError, LewisError
from lewis_flows.cli import completion

if TYPE_CHECKING:
    from lewis.recipe.recipe import Recipe

Add = Callable[[argparse.ArgumentParser], None]
"""Adds an argument, or a few that belong together, to the parser of a command."""


def option(*names: str, offer: completion.Offer | None = None, **about: Any) -> Add:
    """Declare an argument of a command.

    Args:
        names: of the option; or the one name of a positional argument.
        offer: returns the completions that a shell offers for it.
        about: as of `ArgumentParser.add_argument`.
    """

    def add(command: argparse.ArgumentParser) -> None:
        action = command.add_argument(*names, **about)
        if offer:
            action.completer = offer  # type: ignore[attr-defined]  # where argcomplete looks for it

    return add


def flag(name: str, about: str) -> Add:
    """Declare an option without a value; `about` is its help."""
    return option(name, action="store_true", help=about)


_RECIPE = "YAML file, or the name of a recipe in the folder of recipes"
_SET = "override a key of the recipe, for example lewis.density.max=0.7; may be repeated"
RECIPE = (
    option("recipe", metavar="RECIPE", help=_RECIPE, offer=completion.recipes_and_files),
    option("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help=_SET),
)
FORCE = flag("--force", "merge models that do not belong together too; as --set inspect.on=warn")
JSON = flag("--json", "print JSON instead of text")
JSON_FILE = option("-o", "--output", metavar="FILE.json", type=Path, required=True)
NAME = option("name", metavar="NAME", help="registered model", offer=completion.models)
WHY = option("--why", metavar="TEXT", required=True, help="for the history")
PREFECT_FILE = option("--prefect-file", metavar="FILE", type=Path, help="default: deployments/prefect.yaml")


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return a function, for the `type` of an argument, that reads a number above 0."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if (value := kind(text)) > 0:
                return value
        raise argparse.ArgumentTypeError(f"expected a {'whole ' if kind is int else ''}number above 0, got {text!r}")

    return number


def is_name(given: str) -> bool:
    """Whether a recipe is given by its name in the folder of recipes, not as a file.

    A folder of this name, such as one that `lewis pull` wrote, does not hide the recipe.
    """
    if "/" in given or given.endswith((".yaml", ".yml")):
        return False
    if not Path(given).is_dir():
        return not Path(given).exists()
    from lewis_flows import recipes_folder

    with suppress(LewisError):
        return given in recipes_folder.names()
    return False


def recipe_file(options: argparse.Namespace) -> str:
    """Return the file of `options.recipe`; the name of a recipe in the folder of recipes is replaced by its file there.

    Raises:
        InputError: if the folder has no recipe of that name.
    """
    given: str = options.recipe
    if is_name(given):
        from lewis_flows import recipes_folder

        options.recipe = str(recipes_folder.find(given))
    return str(options.recipe)


def output_file(options: argparse.Namespace, given: Path, option: str = "-o") -> Path:
    """Check that a command on a recipe can write a file, and return its absolute path.

    Raises:
        InputError: if it cannot, or the file is the recipe.
    """
    from lewis.store.writable import check_output_file

    file = check_output_file(given, option)
    if file == Path(recipe_file(options)).expanduser().resolve():
        raise InputError(f"{option} {given}: is the recipe, which would be lost; choose another path")
    return file


def load(options: argparse.Namespace) -> "Recipe":
    """Load the recipe that a command was given, with its `--set` and `--force`."""
    from lewis.recipe.recipe import Recipe

    if getattr(options, "force", False):
        options.overrides = [*options.overrides, "inspect.on=warn"]
        options.force = False
    return Recipe.load(recipe_file(options), options.overrides)
