"""The texts of an evaluation: how many are kept, how long they are, and what is hidden in them."""

from types import SimpleNamespace
from typing import Any

import pytest

from lewis.evaluation.harness.answer_texts import ANSWER, DOCUMENTS, PROMPT, clean, texts_of

WRITES = SimpleNamespace(OUTPUT_TYPE="generate_until")
CHOOSES = SimpleNamespace(OUTPUT_TYPE="multiple_choice", doc_to_choice=lambda doc: doc["choices"])


def row(number: int, **fields: Any) -> dict[str, Any]:
    """A sample as lm-eval gives it."""
    of_document = {"doc": {}, "doc_hash": f"{number * 7919 % 1000:03}", "filter": "none"}
    return {**of_document, "target": "4", "arguments": [("2 + 2 =", {})], "resps": [["four"]], **fields}


def test_documents_are_chosen_by_their_hash_and_tasks_share_the_number() -> None:
    rows = [row(number) for number in range(3 * DOCUMENTS)]
    found = texts_of({"a": [*rows, *({**each, "filter": "other"} for each in rows)]}, {"a": WRITES})["a"]
    assert len(found) == DOCUMENTS and [each["document"] for each in found] == sorted({e["document"] for e in found})
    smallest = sorted(rows, key=lambda each: each["doc_hash"])[:DOCUMENTS]
    assert [rows[each["document"]] for each in found] == [each for each in rows if each in smallest]
    half = texts_of({"a": rows, "b": rows, "c": rows}, {"a": WRITES, "b": WRITES, "c": SimpleNamespace(OUTPUT_TYPE="")})
    assert {name: len(each) for name, each in half.items()} == {"a": DOCUMENTS // 2, "b": DOCUMENTS // 2}
    assert {each["document"] for each in half["a"]} < {each["document"] for each in found}


def test_long_texts_are_cut_and_passwords_hidden() -> None:
    secret = "see https://me:hunter2@host/x "
    prompt, answer = "b" * 5000 + secret + "e" * (PROMPT - 12), "first" + "m" * 9000 + secret + "last\x00"
    [found] = texts_of(
        {"a": [row(0, arguments=[(prompt, {})], resps=[[answer]], target=["x" * 400, "y"])]}, {"a": WRITES}
    )["a"]
    assert found["prompt"] == "/***@host/x " + "e" * (PROMPT - 12)
    assert len(found["answer"]) <= ANSWER and len(found["target"]) <= ANSWER
    assert found["answer"].startswith("first") and found["answer"].endswith("https://***@host/x last\ufffd")
    assert " … " in found["answer"] and set(found["target"]) == set("x … ")
    assert clean("a\nb\x1b[0m\u202e\ud800?token=abc") == "a\nb\ufffd[0m\ufffd\ufffd?token=***"


@pytest.mark.parametrize(
    ("likelihoods", "target", "told"),
    [
        ([-1.0, -20.0], 0, ("no", "no")),
        ([-2.0, -3.0], 1, ("no (per character: certainly)", "certainly")),
        ([-9.0, -1.0], "certainly", ("certainly", "certainly")),
        ([-9.0, -1.0], [1, 0], ("certainly", "certainly")),
    ],
)
def test_of_choices_the_likeliest_is_the_answer(likelihoods: list[float], target: Any, told: tuple[str, str]) -> None:
    found = [(each, False) for each in (*likelihoods, 0.0, 0.0)]  # the last two are of the choices without the prompt
    given = row(0, doc={"choices": ["no", "certainly"]}, filtered_resps=found, target=target)
    [text] = texts_of({"a": [given]}, {"a": CHOOSES})["a"]
    assert (text["answer"], text["target"]) == told


def test_a_task_that_holds_its_choices_in_another_way_is_scored_all_the_same() -> None:
    assert texts_of({"a": [row(0, filtered_resps=[(-1.0, True)])]}, {"a": CHOOSES}) == {"a": []}
