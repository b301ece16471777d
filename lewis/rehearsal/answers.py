"""Answers of libraries: from the store if they are known, else asked in one child process and kept."""

from collections.abc import Sequence
from typing import Any

from lewis import store
from lewis.rehearsal.question import Question, Refused
from lewis.store import kinds


def known(question: Question) -> dict[str, Any] | None:
    """The answer to a question that was asked before, of this machine or the store's remote half; None if none is."""
    found: dict[str, Any] | None = store.entry(kinds.REHEARSALS.path(question.key), "answer")
    return found


def answers(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Answer all questions. No library is imported for those that are known; the others are asked in one child.

    Returns:
        The answers in the order of the questions, as `Question.ask` returns them.

    Raises:
        Refused: with a line for each question that a library refuses. A refusal is not kept.
        LewisError, InputError: as `child.ask_all`.
    """
    found = {question.key: known(question) for question in questions}
    open_ = list({question.key: question for question in questions if found[question.key] is None}.values())
    refused = dict[str, str]()
    if open_:
        from lewis.rehearsal.child import ask_all

        for question, said in zip(open_, ask_all(open_), strict=True):
            if "refused" in said:
                refused[question.item] = str(said["refused"])
            else:
                found[question.key] = said["answer"]
                content = {"question": question.name, "answer": said["answer"]}
                store.write_entry(kinds.REHEARSALS.path(question.key), content, indent=None)
    if refused:
        raise Refused(refused)
    return [found[question.key] or {} for question in questions]
