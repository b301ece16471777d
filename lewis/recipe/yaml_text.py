"""Read the YAML of users within limits, recipes with unique keys; change it by `--set`, and look up values by path.

A file that is the wrong one, or made to do harm, must be an error that costs little time. PyYAML recurses into blocks
and does not copy what an alias repeats, so the size of the result is known only after a walk over it. Therefore depth
and number of values, with aliases expanded, are counted while the text is read.
"""

import re
from collections.abc import Callable, Hashable
from contextlib import suppress
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from lewis.errors import InputError, RecipeError
from lewis.input_files import read_text

MAX_BYTES = 1_000_000
MAX_DEPTH = 50  # blocks within blocks
MAX_VALUES = 50_000  # keys, values and blocks; every 64 characters of a text count as one more
_LONGEST_NUMBER = 1000  # characters; the time to read a number grows with the square of its length
_TEXT = "tag:yaml.org,2002:str"
_PLAIN = re.compile(r"""[\w ./:,+~='"#\[\]{}()<;$^\n-]*""", re.ASCII)  # text that PyYAML and libyaml read alike
_SURROGATES = re.compile("[\ud800-\udfff]")


class _Limits(Composer):
    """Composer that enforces the limits of this module while it reads."""

    peek_event: Callable[[], Any]  # a method of the parser
    _depth = _deepest = _values = 0

    @cached_property
    def _anchored(self) -> dict[str, tuple[int, int]]:
        """Anchor -> the number of values in its block, and the block's depth."""
        return {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count a node, which raises YAMLError beyond a limit; then read it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._anchored:
                raise yaml.YAMLError(f"*{event.anchor} refers to the block that it is in")
            values, depth = self._anchored.get(str(event.anchor), (0, 0))
            self._count(values, self._depth + depth)
            return super().compose_node(parent, index)
        values, deepest = self._values, self._deepest
        self._depth, self._deepest = self._depth + 1, self._depth + 1
        self._count(1, self._depth)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor:
            self._anchored[event.anchor] = self._values - values, self._deepest - self._depth
        self._deepest = max(self._deepest, deepest)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Read a scalar, and join surrogate pairs, by which JSON writes some characters, to one character each."""
        node = super().compose_scalar_node(anchor)
        self._count(len(node.value) // 64, self._depth)
        if node.tag != _TEXT and len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"expected a value of at most {_LONGEST_NUMBER} characters, got {len(node.value)}")
        if _SURROGATES.search(node.value):
            try:
                node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise yaml.YAMLError(f"half of a surrogate pair, line {node.start_mark.line + 1}") from None
        return node

    def _count(self, values: int, depth: int) -> None:
        self._values += values
        self._deepest = max(self._deepest, depth)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep")
        if self._values > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, what aliases repeat included")


class LimitedLoader(_Limits, yaml.SafeLoader):
    """PyYAML's safe loader, within the limits of this module."""


def load(text: str | bytes, name: str, loader: type[yaml.SafeLoader] = LimitedLoader) -> Any:
    """Return the value that a YAML text holds; None if the text is empty.

    Raises:
        InputError: if the text is not valid YAML, has several documents, or exceeds a limit; the message is one line.
    """
    found = load_all(text, name, loader)
    if len(found) > 1:
        raise InputError(f"{name}: not valid YAML: expected one document, got {len(found)}, separated by ---")
    return found[0] if found else None


def load_all(text: str | bytes, name: str, loader: type[yaml.SafeLoader] = LimitedLoader) -> list[Any]:
    """The values of all documents of a YAML text; arguments and errors as those of `load`."""
    size = len(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    if size > MAX_BYTES:
        raise InputError(f"{name}: expected at most {MAX_BYTES:,} bytes of YAML, got {size:,}; is this the right file?")
    try:
        return list(yaml.load_all(text, loader))
    except yaml.YAMLError as error:
        hint = "; YAML is indented with spaces, not tabs" if r"'\t'" in str(error) else ""
        raise InputError(f"{name}: not valid YAML: {' '.join(str(error).split())[:500]}{hint}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # What PyYAML raises for values that are not what they look like: `2024-13-45`, `!!int ""`, `!!bool x`.
        raise InputError(f"{name}: not valid YAML: {type(error).__name__}: {error}"[:500]) from error


class _UniqueKeys(SafeConstructor):
    """Constructor for which a duplicate key is an error. PyYAML itself silently takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first = dict[Any, int]()
        for place in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            key, line = self.construct_object(place, deep=True), place.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # PyYAML refuses it below
            if key in first:
                raise yaml.YAMLError(f"the key {key!r} is given twice, lines {first[key]} and {line}")
            first[key] = line
        return super().construct_mapping(node, deep=deep)


class _StrictLoader(_UniqueKeys, LimitedLoader):
    pass


if yaml.__with_libyaml__:
    from yaml._yaml import CParser

    class _FastLoader(_UniqueKeys, _Limits, CParser, Resolver):
        """`_StrictLoader` with the scanner and parser of libyaml, which take a tenth of the time."""

        def __init__(self, stream: str) -> None:
            for part in (_Limits, SafeConstructor, Resolver):
                part.__init__(self)
            CParser.__init__(self, stream)


def read_file(path: str | Path) -> tuple[Path, str]:
    """Return the path of a recipe's file, with `~` expanded to the user's home, and the file's text.

    Raises:
        RecipeError: if the file cannot be read, is no regular file or too large, or its name is no UTF-8.
    """
    try:
        path = Path(path).expanduser()
        str(path).encode()  # names of runs, schedules and models begin with the file's name
        return path, read_text(path, MAX_BYTES)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; give the path of a recipe") from error
    except InputError as error:
        raise RecipeError(str(error)) from error
    except (RuntimeError, TypeError, ValueError) as error:  # "~nobody", None, a name that is no UTF-8
        raise RecipeError(f"{str(path)!r}: no such file: {error}; give the path of a recipe") from error


def read(text: str, name: str) -> dict[str, Any]:
    """Return the mapping that a recipe's text holds, without further checks.

    Raises:
        RecipeError: if the text is not valid YAML, gives a key twice, exceeds a limit of this module, is no mapping,
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
    """Return the mappings of all recipes in a text, at least one; arguments and errors are those of `read`."""
    try:
        found = _load_plain(text) or load_all(text, name, _StrictLoader) or [None]
    except InputError as error:
        raise RecipeError(str(error)) from error
    for number, data in enumerate(found, 1):
        if not isinstance(data, dict):
            where = f"{name}: document {number}" if len(found) > 1 else name
            kind = "an empty text" if data is None else type(data).__name__
            raise RecipeError(f"{where}: expected a mapping with `merge_method` and `models`, got {kind}")
    return found


def _load_plain(text: str) -> list[Any]:
    """Read all documents of a text by libyaml, which is faster; return an empty list if PyYAML has to read it.

    The two differ in rare characters, in what they accept and in their messages: this is for plain, valid text only.
    """
    if not yaml.__with_libyaml__ or len(text) > MAX_BYTES or not _PLAIN.fullmatch(text):
        return []
    with suppress(Exception):
        return list(yaml.load_all(text, _FastLoader))  # type: ignore[arg-type]  # no loader that the stubs list
    return []


def write(data: dict[str, Any]) -> str:
    """`data` as YAML text, its keys in their order."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text


def without(text: str, key: str) -> str:
    """Return a recipe's text without one of its keys; comments of other keys stay if the key has lines of its own."""
    data = read(text, "recipe")
    data.pop(key, None)
    cut = re.sub(rf"^{key}:.*\n?(?:(?:[ \t#-].*)?\n|[ \t#-].*\Z)*", "", text, flags=re.MULTILINE)
    with suppress(RecipeError):
        if read(cut, "recipe") == data:
            return cut
    return write(data)


def override(data: dict[str, Any], setting: str) -> None:
    """Change `data` by one `--set key.path=value`; blocks that are missing on the way are added.

    Raises:
        InputError: if the setting is malformed, or its path does not fit the recipe.
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
            inner = copy(place[key])  # an alias may have put the same object in another place
            place[key] = inner
            place = inner
            if not isinstance(place, dict | list):
                raise InputError(f"--set {setting}: {'.'.join(map(str, keys[: i + 1]))} is {place!r}, not a block")


def look_up(data: Any, path: str) -> Any:
    """Return the value in `data` at a path as in `--set`; None if there is no value at that path."""
    for key in _keys(path):
        items = len(data) if isinstance(data, list | tuple) else 0
        found = key in data if isinstance(data, dict) else isinstance(key, int) and key < items
        data = data[key] if found else None
    return data


def _keys(path: str) -> list[str | int]:
    """Split a YAML path into its keys: `models[0].model` into `["models", 0, "model"]`."""
    return [
        int(key) if re.fullmatch("[0-9]{1,9}", key) else key
        for key in re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")
    ]
