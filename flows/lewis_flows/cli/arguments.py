"""Arguments that several commands take; each function adds one to the parser of a command."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_flows.cli import completion

if TYPE_CHECKING:
    from lewis.recipe.recipe import Recipe

Add = Callable[[argparse.ArgumentParser], None]
"""Adds an argument, or a few that belong together, to the parser of a command."""


def recipe(command: argparse.ArgumentParser) -> None:
    """`RECIPE` and `--set KEY=VALUE`."""
    about = "YAML file, or the name of a recipe in the folder of recipes"
    chosen = command.add_argument("recipe", metavar="RECIPE", help=about)
    completion.completes(chosen, completion.recipes_and_files)
    command.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="override a key of the recipe, for example lewis.density.max=0.7; may be repeated",
    )  # fmt: skip


def force(command: argparse.ArgumentParser) -> None:
    """`--force`."""
    command.add_argument(
        "--force", action="store_true", help="merge models that do not belong together too; as --set inspect.on=warn"
    )


def as_json(command: argparse.ArgumentParser) -> None:
    """`--json`."""
    command.add_argument("--json", action="store_true", help="print JSON instead of text")


def json_file(command: argparse.ArgumentParser) -> None:
    """`-o FILE.json`."""
    command.add_argument("-o", "--output", metavar="FILE.json", type=Path, required=True)


def name(command: argparse.ArgumentParser) -> None:
    """`NAME` of a registered model."""
    completion.completes(command.add_argument("name", metavar="NAME", help="registered model"), completion.models)


def why(command: argparse.ArgumentParser) -> None:
    """`--why TEXT`."""
    command.add_argument("--why", metavar="TEXT", required=True, help="for the history")


def prefect_file(command: argparse.ArgumentParser) -> None:
    """`--prefect-file FILE`."""
    command.add_argument("--prefect-file", metavar="FILE", type=Path, help="default: deployments/prefect.yaml")


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """For the `type` of an argument: a number above 0."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if (value := kind(text)) > 0:
                return value
        raise argparse.ArgumentTypeError(f"expected a {'whole ' if kind is int else ''}number above 0, got {text!r}")

    return number


def recipe_file(options: argparse.Namespace) -> str:
    """The file of `options.recipe`, which may be the name of a recipe in the folder of recipes; kept there.

    Raises:
        InputError: if there is neither.
    """
    given: str = options.recipe
    if "/" not in given and not given.endswith((".yaml", ".yml")) and not Path(given).exists():
        from lewis_flows import recipes_folder

        options.recipe = str(recipes_folder.find(given))
    return str(options.recipe)


def load(options: argparse.Namespace) -> "Recipe":
    """The recipe of a command that takes one, with its `--set` and `--force`."""
    from lewis.recipe.recipe import Recipe

    if getattr(options, "force", False):
        options.overrides.append("inspect.on=warn")
        options.force = False
    return Recipe.load(recipe_file(options), options.overrides)
