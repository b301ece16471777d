"""What came of a merge, in a line."""

import pytest

from lewis.evaluation.gate import Verdict
from lewis.reports.run_report import MAX_LINE, verdict_line

NUMBERS = "gsm8k/acc,none 0.51 vs 0.48"


@pytest.mark.parametrize(
    ("verdict", "champion", "told"),
    [
        (Verdict(True, ("a: 1: pass",), "base", NUMBERS), None, ("Promoted", f"v3: {NUMBERS}; the first champion")),
        (Verdict(True, (), "models:/m/2", NUMBERS), "models:/m/2", ("Promoted", f"v3: {NUMBERS}; in place of v2")),
        (
            Verdict(True, ("a: 1: pass", "note: uniform is better: a -0.18, p 0.003"), "models:/m/2", NUMBERS),
            "models:/m/2",
            ("Promoted", f"v3: {NUMBERS}; in place of v2; uniform is better: a -0.18, p 0.003"),
        ),
        (Verdict(True, ("no gate in the recipe",), "nothing"), None, ("Promoted", "v3; the first champion")),
        (
            Verdict(False, ("a must gain: 1 vs 2: fail", "b: pass", "c: 0 of 4: fail"), "base", NUMBERS),
            "models:/m/2",
            ("Rejected", f"v3: {NUMBERS}; a must gain: 1 vs 2; c: 0 of 4"),
        ),
        (Verdict(True, ("x",), "models:/m/3"), "models:/m/3", ("Completed", "v3 is the champion already")),
    ],
)
def test_the_word_and_the_line(verdict: Verdict, champion: str | None, told: tuple[str, str]) -> None:
    assert verdict_line("models:/m/3", verdict, champion=champion) == told


def test_a_line_stays_one() -> None:
    _, line = verdict_line("models:/m/3", Verdict(False, ("x " * 500 + ": fail",), "base"), champion=None)
    assert len(line) == MAX_LINE and line.endswith("...")
