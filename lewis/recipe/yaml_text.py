"""A recipe as YAML text: read it strictly, change it by `--set`, look up a value by its path."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lewis.errors import InputError, RecipeError
from lewis.input_files import read_text
from lewis.recipe.yaml_limits import MAX_BYTES, LimitedLoader, load, load_all


class _StrictLoader(LimitedLoader):
    """YAML in which a key that is given twice is an error. PyYAML itself takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen = set()
        for key in keys:
            if not isinstance(key, Hashable):
                continue  # PyYAML refuses it below
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} is given twice, line {node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_file(path: str | Path) -> tuple[Path, str]:
    """The text of a recipe's file, and its path with the user's home put in for `~`.

    Raises:
        RecipeError: if it cannot be read, is no regular file or too large, or its name is no UTF-8.
    """
    try:
        path = Path(path).expanduser()
        str(path).encode()  # the name of a run, a schedule and a model begins with the file's
        return path, read_text(path, MAX_BYTES)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; give the path of a recipe") from error
    except InputError as error:
        raise RecipeError(str(error)) from error
    except (RuntimeError, ValueError) as error:  # "~nobody", a name that is no UTF-8
        raise RecipeError(f"{str(path)!r}: no such file: {error}; give the path of a recipe") from error


def read(text: str, name: str) -> dict[str, Any]:
    """The mapping that a recipe's text holds, not checked any further.

    Args:
        text: YAML.
        name: of the recipe, for error messages.

    Raises:
        RecipeError: if the text is not valid YAML, gives a key twice, exceeds a limit of `yaml_limits`, is no mapping,
            or holds several recipes.
    """
    found = read_all(text, name)
    if len(found) > 1:
        raise RecipeError(
            f"{name}: holds {len(found)} recipes, separated by ---: lewis merge makes a model of each, in order; other "
            "commands take one: put it into a file of its own, and name the folders of the others' results"
        )
    return found[0]


def read_all(text: str, name: str) -> list[dict[str, Any]]:
    """The mappings of all documents of a text, at least one; arguments and errors as those of `read`."""
    try:
        found = load_all(text, name, _StrictLoader) or [None]
    except InputError as error:
        raise RecipeError(str(error)) from error
    for number, data in enumerate(found, 1):
        if not isinstance(data, dict):
            where = f"{name}: document {number}" if len(found) > 1 else name
            kind = type(data).__name__
            raise RecipeError(f"{where}: expected a mapping with `merge_method` and `models`, got {kind}")
    return found


def write(data: dict[str, Any]) -> str:
    """`data` as YAML text, its keys in their order."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text


def override(data: dict[str, Any], setting: str) -> None:
    """Change `data` by one `--set key.path=value`; blocks that are missing on the way are added.

    Raises:
        InputError: if the setting is malformed, or its path leads nowhere.
    """
    path, equals, text = setting.partition("=")
    keys = _keys(path)
    if not equals or "" in keys:
        raise InputError(f"--set {setting}: expected key.path=value, for example lewis.density.max=0.7")
    value = load(text, f"--set {setting}: the value")
    place: Any = data
    for i, key in enumerate(keys):
        if isinstance(place, list) != isinstance(key, int) or (isinstance(key, int) and key >= len(place)):
            raise InputError(f"--set {setting}: there is no {'.'.join(map(str, keys[: i + 1]))} in the recipe")
        if i == len(keys) - 1:
            place[key] = value
        else:
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict | list):
                raise InputError(f"--set {setting}: {'.'.join(map(str, keys[: i + 1]))} is {place!r}, not a block")


def look_up(data: Any, path: str) -> Any:
    """What `data` holds at a path as in `--set`; None if it holds nothing there."""
    for key in _keys(path):
        items = len(data) if isinstance(data, list | tuple) else 0
        found = key in data if isinstance(data, dict) else isinstance(key, int) and key < items
        data = data[key] if found else None
    return data


def _keys(path: str) -> list[str | int]:
    """`models[0].model` as `["models", 0, "model"]`."""
    return [
        int(key) if re.fullmatch("[0-9]{1,9}", key) else key
        for key in re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")
    ]
