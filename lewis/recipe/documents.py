"""Several recipes in one file, as in mergekit-multi: each makes a model, which the others may use by its name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis.errors import RecipeError
from lewis.recipe import yaml_text
from lewis.recipe.block import parts_of
from lewis.recipe.recipe import Recipe

LAST = "final"  # the output of the document without a name
_SEPARATOR = re.compile(r"^---", re.MULTILINE)
_PLAIN = re.compile(r"\w[\w.-]*")
_MODELS = ("model", "base_model", "tokenizer_source", "source", "path")  # keys whose texts are references to models


@dataclass(frozen=True)
class Document:
    """One of the recipes in a file that holds several.

    Attributes:
        name: the name of its output folder.
        recipe: the parsed recipe; it refers to outputs of other documents by their folders.
    """

    name: str
    recipe: Recipe


def load_documents(path: str | Path, outputs: Path) -> list[Document]:
    """Read and check all recipes of a file.

    Args:
        path: a YAML file with one document or more.
        outputs: the folder in which each document's output gets a folder of its name.

    Returns:
        The recipes, each after those whose outputs it uses, otherwise in the file's order; empty if the file has one
        document.

    Raises:
        RecipeError: with every problem of the first recipe that has problems; or if two documents have the same name,
            more than one has no name, or documents use each other's outputs in a circle.
    """
    path, text = yaml_text.read_file(path)
    if not _SEPARATOR.search(text):
        return []  # without parsing: to parse a large recipe takes longer than to start the merge
    root = path.resolve().parent
    found = yaml_text.read_all(text, path.stem)
    if len(found) < 2:
        return []
    named = _named(found, path.stem)
    made = []
    for name in _in_order(named, path.stem, root):
        data = _replaced(named[name], {each: str(outputs.absolute() / each) for each in named.keys() - {name}}, root)
        try:
            title = path.stem if name == LAST else name
            recipe = Recipe.parse(yaml_text.write(data), root=root, name=title)
        except RecipeError as error:
            raise RecipeError([f"{name}: {problem}" for problem in error.problems]) from error
        made.append(Document(name, recipe))
    return made


def _named(found: Sequence[dict[str, Any]], stem: str) -> dict[str, dict[str, Any]]:
    named: dict[str, dict[str, Any]] = {}
    for number, data in enumerate(found, 1):
        name = data.get("name") or LAST
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise RecipeError(f"{stem}: document {number}: name: expected the name of a folder, got {name!r}")
        if name in named:
            what = f"{name!r} is given twice" if data.get("name") else f"more than one has none, which is {LAST!r} then"
            raise RecipeError(f"{stem}: document {number}: name: {what}; give each document a name of its own")
        named[name] = data
    return named


def _in_order(named: Mapping[str, dict[str, Any]], stem: str, root: Path) -> list[str]:
    """Return the documents' names, each after the names of the outputs that its document uses."""
    uses = {name: set(_references(data, root)) & (named.keys() - {name}) for name, data in named.items()}
    order = list[str]()
    while len(order) < len(named):
        ready = [name for name in named if name not in order and uses[name] <= set(order)]
        if not ready:
            left = ", ".join(name for name in named if name not in order)
            raise RecipeError(f"{stem}: the documents {left} use each other's outputs; none of them can be made first")
        order.append(ready[0])
    return order


def _references(value: Any, root: Path) -> Iterator[str]:
    """Yield the models that a document refers to, without the adapters on them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _MODELS and isinstance(inner, str):
                yield parts_of(inner, root)[0]
            yield from _references(inner, root)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner, root)


def _replaced(value: Any, folders: Mapping[str, str], root: Path, key: str = "") -> Any:
    """Return a document with each reference to another document's output replaced by the output's folder."""
    if isinstance(value, dict):
        return {inner: _replaced(each, folders, root, str(inner)) for inner, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, folders, root) for each in value]
    if key in _MODELS and isinstance(value, str):
        name, *adapters = parts_of(value, root)
        return "+".join([folders[name], *adapters]) if name in folders else value
    return value
