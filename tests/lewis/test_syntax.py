"""Python source is parsed in several threads at once."""

import ast
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest

from lewis.syntax import syntax_tree


class Circle:
    """Garbage that runs code when it is collected, so that another thread gets its turn in the middle of a tree."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        sum(range(50))


@pytest.fixture
def quick_turns() -> Iterator[None]:
    """Threads change places as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_turns")
def test_a_tree_is_made_while_other_threads_make_theirs() -> None:
    """Two scores at once read the same task's file: `AST constructor recursion depth mismatch` failed the run."""
    source = Path(ast.__file__).read_text("utf-8").partition("class NodeVisitor")[0]  # a larger one takes a minute
    done = Event()

    def library() -> None:
        while not done.wait(0.001):
            with suppress(SystemError):
                ast.parse("a = [1, (2, 3)]\n" * 100)

    def ours(_: int) -> int:
        Circle()
        return len(syntax_tree(source).body)

    with ThreadPoolExecutor(5) as pool:
        pool.submit(library)
        try:
            counts = set(pool.map(ours, range(20)))
        finally:
            done.set()
    assert counts == {len(ast.parse(source).body)}


def test_what_is_no_python_says_so() -> None:
    with pytest.raises(SyntaxError, match="invalid syntax"):
        syntax_tree("no python")
