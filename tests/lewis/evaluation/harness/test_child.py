"""Which documents of a task the child of an evaluation scores."""

import pytest

from lewis.evaluation.harness.child import _pool


@pytest.mark.parametrize(
    ("documents", "problem"),
    [
        ("all", "maths: it has no documents"),
        ("by_release", "maths: it has no documents"),
        ("search", "maths: too few documents to split: the half `search` is empty"),
    ],
)
def test_the_error_without_documents_names_a_half_only_where_there_is_one(documents: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        _pool("maths", [], documents, 2, "")
