"""Parse Python source that is read and not run, from any thread."""

import ast
from contextlib import suppress
from threading import Lock

_ONE_AT_A_TIME = Lock()


def syntax_tree(source: str | bytes) -> ast.Module:
    """Return the syntax tree of Python source; raise `SyntaxError` or `ValueError` if the source is invalid.

    CPython before 3.11.8 counts the depth of two threads' trees together, and raises `SystemError` for valid source
    (github.com/python/cpython/issues/106905). So this function makes one tree at a time, and makes it again if a
    library made another one meanwhile.
    """
    with _ONE_AT_A_TIME:
        for _ in range(99):
            with suppress(SystemError):
                return ast.parse(source)
        return ast.parse(source)
