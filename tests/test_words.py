"""Words that are not to come back into docstrings, comments, messages and pages; each has a clear one."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_readme import PAGES

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("lewis", "tasks", "flows") for path in (ROOT / folder).rglob("*.py"))
WORDS = {  # pattern -> what to say
    r"whoever": "someone who, or the name of the process",
    r"anew": "again",
    r"beside(?!:)": "next to, in addition to, compared with",
    r"tells? of|told of": "report",
    r"(is|are|was|were) told": "get, is given",
    r"that of those": "a noun",
    r"what rests": "what is kept",
    r"shall": "must, will",
    r"beforehand|thereof|therein|whilst": "before, of it, in it, while",
}
PATTERN = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)


def texts(path: Path) -> Iterator[str]:
    """Docstrings, comments and other texts of a module; of a page, all of it."""
    content = path.read_text()
    if path.suffix != ".py":
        yield content
        return
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isidentifier():
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def found_in(path: Path) -> list[str]:
    lines = (" ".join(text.split()) for text in texts(path))
    return [line[max(0, hit.start() - 40) : hit.end() + 20] for line in lines for hit in PATTERN.finditer(line)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_page_has_them(page: Path) -> None:
    assert found_in(ROOT / page) == []


def test_no_source_has_them() -> None:
    assert {str(path.relative_to(ROOT)): hits for path in SOURCES if (hits := found_in(path))} == {}


def test_they_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text('"""Whoever\nwaits."""\nx = 1  # done anew\nraise ValueError("we are told")\n')
    assert len(found_in(tmp_path / "x.py")) == 3
