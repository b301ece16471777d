"""YAML within limits: a file that nobody meant, or that somebody made to do harm, is an error and costs little.

PyYAML recurses into blocks, and shares what an alias repeats: only whoever walks the result finds out how large it is.
So depth and number of values, aliases expanded, are counted while the text is read.
"""

import re
from typing import Any

import yaml

from lewis.errors import InputError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50  # blocks within blocks
MAX_VALUES = 50_000  # keys, values and blocks; every 64 characters of a text count as one more
_LONGEST_NUMBER = 1000  # characters; to read one takes time with the square of its length
_TEXT = "tag:yaml.org,2002:str"
_SURROGATES = re.compile("[\ud800-\udfff]")


class LimitedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, within the limits of this module."""

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self._depth, self._deepest, self._values = 0, 0, 0
        self._anchored: dict[str, tuple[int, int]] = {}  # anchor -> how many values, how deep

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count, then read what comes next."""
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
        """Read a scalar; halves of surrogate pairs, which JSON writes characters as, are put together."""
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


def load(text: str | bytes, name: str, loader: type[yaml.SafeLoader] = LimitedLoader) -> Any:
    """The value that a YAML text holds.

    Args:
        text: YAML.
        name: of the file, for error messages.
        loader: a `LimitedLoader`.

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
        raise InputError(f"{name}: not valid YAML: {' '.join(str(error).split())[:500]}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # What PyYAML raises for values that are not what they look like: `2024-13-45`, `!!int ""`, `!!bool x`.
        raise InputError(f"{name}: not valid YAML: {type(error).__name__}: {error}"[:500]) from error
