"""The syntax tree of Python source that is read and not run, from any thread."""

import ast
from contextlib import suppress
from threading import Lock

_ONE_AT_A_TIME = Lock()


def syntax_tree(source: str | bytes) -> ast.Module:
    """The syntax tree of Python source; a `SyntaxError` or a `ValueError` if it is none.

    CPython before 3.11.8 counts the depth of two threads' trees together, and raises `SystemError` for source that is
    in order (github.com/python/cpython/issues/106905). So one tree is made at a time here, and is made again where a
    library made another meanwhile.
    """
    with _ONE_AT_A_TIME:
        for _ in range(99):
            with suppress(SystemError):
                return ast.parse(source)
        return ast.parse(source)
