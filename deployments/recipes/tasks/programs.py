"""MBPP as a task of writing programs: they run, with their tests, in LEWIS's sandbox."""

import ast
import re
from typing import Any

from datasets import Dataset

from lewis.evaluation import sandbox

SECONDS = 10.0  # for one program and its tests
_FENCE = re.compile(r"```[a-z0-9]*", re.IGNORECASE)


def mbpp(rows: Dataset) -> Dataset:
    """Descriptions with all tests, as the prompt; the reference program, as the target of a few-shot example."""
    return rows.map(
        lambda row: {
            "prompt": f"{row['text']}\nYour code should pass these tests:\n"
            + "\n".join(row["test_list"])
            + "\n```python\n",
            "target": row["code"].replace("\r", "").strip() + "\n```",
            "tests": "\n".join([row["test_setup_code"], *row["test_list"]]).replace("\r", ""),
        }
    )


def code_of(answer: str) -> str:
    """The program in an answer to a prompt that ends with an open fence: the first piece between fences that is Python.

    Models go on from the open fence, or begin anew with a sentence and a fence of their own.
    """
    pieces = [piece for piece in _FENCE.split(answer.replace("\r", "")) if piece.strip()] or [""]
    return next(filter(_is_python, pieces), pieces[0])


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def passed(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the program comes through the tests, 0 if not: wrong, looping, out of memory, or no Python at all."""
    return {"pass_at_1": float(sandbox.run(code_of(results[0]), row["tests"], timeout_s=SECONDS).passed)}
