"""Ask libraries in the test's own process: what the child of rehearsals does, without the child."""

from collections.abc import Sequence
from typing import Any

from lewis.rehearsal.blame import blamed, refusal
from lewis.rehearsal.question import DoubtError, Question


def ask_all(questions: Sequence[Question], *, blames: bool = True) -> list[dict[str, Any]]:
    """As `lewis.rehearsal.child.ask_all`; `blames`: whether the key that is wrong is looked for."""
    return [_asked(question, blames) for question in questions]


def _asked(question: Question, blames: bool) -> dict[str, Any]:
    try:
        return {"answer": question.ask()}
    except DoubtError as error:
        return {"answer": error.answer}
    except Exception as error:
        return {"refused": (blamed(question, error) if blames else None) or refusal(question, error)}
