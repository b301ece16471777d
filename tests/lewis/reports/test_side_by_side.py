"""Answers next to each other and what was lost, as people read them: golden texts."""

import pytest

from lewis.evaluation.documents import Document, SideBySide
from lewis.evaluation.gate import Verdict
from lewis.evaluation.statistics.scores import Texts
from lewis.reports.run_report import RunFacts, to_markdown
from lewis.reports.side_by_side import SHOWN, answer_rows, answers_text, losses_text

KEY = "sums/acc,none"


def document(number: int, ours: float, theirs: float, *had: str, texts: bool = True) -> Document:
    both = (Texts(f"q{number} |", "4", "five"), Texts(f"q{number} |", "4", "four\n<b>"))
    return Document(("sums", f"d{number:02}", 0), KEY, True, ours, theirs, had, both if texts else None)


def found(*documents: Document, experts: tuple[str, ...] = ("math", "code")) -> SideBySide:
    return SideBySide("lewis", "champion", experts, documents)


def test_answers_side_by_side() -> None:
    told = answers_text(
        found(document(0, 1, 1), document(1, 0, 1), document(2, 0.25, 0.5), document(3, 0, 1, texts=False))
    )
    assert told == (
        "3 of the 3 documents whose answers were kept; those that differ in score come first. "
        "Of all 4 documents 3 differ in score.\n\n"
        "**1.**\n\n* task: `sums`\n* end of the prompt: `q1 |`\n* expected: `4`\n"
        "* answer of champion: `✓ four <b>`\n* answer of lewis: `✗ five`\n\n"
        "**2.**\n\n* task: `sums`\n* end of the prompt: `q2 |`\n* expected: `4`\n"
        "* answer of champion: `(0.5) four <b>`\n* answer of lewis: `(0.25) five`\n\n"
        "**3.**\n\n* task: `sums`\n* end of the prompt: `q0 |`\n* expected: `4`\n"
        "* answer of champion: `✓ four <b>`\n* answer of lewis: `✓ five`"
    )
    assert len(answer_rows(found(*(document(number, 1, 1) for number in range(50))))) == SHOWN


def test_what_was_lost_and_who_has_it_right() -> None:
    lost = [document(0, 0, 1, "math"), document(1, 0, 1, "math", "code"), document(2, 0, 1, texts=False)]
    layers = [{"expert": "org/math", "layer": "7", "moved": "12 %", "kept": "31 %"}]
    told = losses_text(found(*lost, document(3, 1, 0)), layers)
    assert told == (
        "* `sums/acc,none`: 3 of 4 documents are lost against `champion`; gained: 1. There the experts are better: "
        "`math` on 2, `code` on 1; none on 1.\n\n"
        "**1.**\n\n* task: `sums`\n* end of the prompt: `q0 |`\n* expected: `4`\n* answer of lewis: `✗ five`\n"
        "* experts that are better: `math`\n\n"
        "**2.**\n\n* task: `sums`\n* end of the prompt: `q1 |`\n* expected: `4`\n* answer of lewis: `✗ five`\n"
        "* experts that are better: `math, code`\n\n"
        "**3.**\n\n* task: `sums`\n* document: `d02`\n* answer of lewis: `✗`\n\n"
        "The layers that moved most: the norm of the expert's task vector, relative to the base's weights; "
        "and how much of it is kept.\n\n"
        "| expert | layer | moved | kept |\n| --- | --- | --- | --- |\n| `org/math` | `7` | `12 %` | `31 %` |"
    )
    many = losses_text(found(*(document(number, 0, 1) for number in range(9)), experts=()))
    assert "The first 5 that are lost:" in many and many.count("* task: `sums`") == 5
    assert "With `experts` in `evaluate.baselines`, the next report says which expert has them right." in many
    assert losses_text(found(document(0, 1, 0)), layers) == ""


@pytest.mark.parametrize(
    ("passed", "sections"), [(True, ["Answers side by side"]), (False, ["Why it is worse", "Answers side by side"])]
)
def test_the_report_of_a_rejected_run_says_why(passed: bool, sections: list[str]) -> None:
    facts = RunFacts("r", "Merged.", "by hand", 3, "a" * 64, verdict=Verdict(passed, (), "models:/m/1"))
    shown = RunFacts(**{**vars(facts), "documents": found(document(0, 0, 1))})
    titles = [line[3:] for line in to_markdown(shown).splitlines() if line.startswith("## ")]
    assert titles[1:] == sections and "side by side" not in to_markdown(facts)


def test_old_scores_without_texts_have_no_section() -> None:
    old = found(document(0, 0, 1, texts=False))
    assert answers_text(old) == "" and "## Answers" not in to_markdown(
        RunFacts("r", "", "", 3, "a" * 64, documents=old)
    )
    assert "* document: `d00`" in losses_text(old)
