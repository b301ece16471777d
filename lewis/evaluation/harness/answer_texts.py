"""Short texts of an evaluation for people to read: prompt, reference answer and model's answer of some documents.

Tasks that generate and tasks with choices have such texts. Likelihoods alone are no answers.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from lewis.redact import redacted

DOCUMENTS = 200  # of one evaluation whose texts are kept; its tasks have equal shares
PROMPT, ANSWER = 200, 300  # characters that are kept of a prompt, which are its last ones, and of an answer
_REACH = 10  # times as many characters are searched for passwords: they may lie across a cut


def texts_of(rows: Mapping[str, list[dict[str, Any]]], tasks: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Task -> texts of some of its documents, which are the same for all models: those with the smallest hashes.

    Args:
        rows: task -> lm-eval's sample of each document and filter.
        tasks: task -> lm-eval's task.

    Returns:
        `document`, its place in the task; the end of its `prompt`; the right answer, `target`; and the model's
        `answer`. Of choices, the answer is the likeliest one. Passwords are hidden, as `redacted` does.
    """
    named = {name: task for name, task in tasks.items() if task.OUTPUT_TYPE in ("generate_until", "multiple_choice")}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, task in named.items():
        own = of_first_filter(rows[name])
        chosen = sorted(range(len(own)), key=lambda place: (own[place]["doc_hash"], place))
        most = max(1, DOCUMENTS // len(named))
        found[name] = []
        for place in sorted(chosen[:most]):
            with suppress(
                AttributeError, IndexError, KeyError, TypeError, ValueError
            ):  # a task's class may hold them elsewhere
                found[name].append({"document": place, **_texts(own[place], task)})
    return found


def of_first_filter(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a task's first filter, one per document: lm-eval gives one per document and filter."""
    return [row for row in rows if row["filter"] == rows[0]["filter"]]


def texts_in(value: Any) -> Iterator[str]:
    """The strings in nested lists, in their order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_in(each)


def _texts(row: Mapping[str, Any], task: Any) -> dict[str, str]:
    target, answer = row["target"], next(texts_in(row["resps"]), "")
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = [str(each) for each in task.doc_to_choice(row["doc"])]
        listed = target if isinstance(target, list) else [target]
        target = [choices[i] if isinstance(i, int) and 0 <= i < len(choices) else str(i) for i in listed]
        answer = _likeliest(choices, [each[0] for each in row["filtered_resps"]][: len(choices)])
    expected = next(texts_in(target), str(target))
    prompt = next(texts_in(row["arguments"]), "")
    return {
        "prompt": clean(prompt[-_REACH * PROMPT :])[-PROMPT:],
        "target": _cut(expected),
        "answer": _cut(answer),
    }


def _likeliest(choices: list[str], likelihoods: list[float]) -> str:
    """The likeliest choice, which `acc` counts; also the likeliest per character (`acc_norm`), if that is another."""
    first = choices[int(np.argmax(likelihoods))]
    normed = choices[int(np.argmax(np.array(likelihoods) / [max(len(each), 1) for each in choices]))]
    return first if first == normed else f"{first} (per character: {normed})"


def clean(text: str) -> str:
    """A text without passwords, and with a replacement character for what cannot be printed."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in redacted(text))


def _cut(text: str) -> str:
    """A clean text of at most `ANSWER` characters: of a longer one, the beginning and the end."""
    if len(text) > 2 * _REACH * ANSWER:
        text = text[: _REACH * ANSWER] + text[-_REACH * ANSWER :]
    text = clean(text)
    half = (ANSWER - 3) // 2
    return text if len(text) <= ANSWER else f"{text[:half]} … {text[-half:]}"
