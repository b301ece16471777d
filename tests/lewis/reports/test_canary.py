"""A canary as a picture: numbers, limits, where it failed, and its place in the page of the run."""

import io
import json
from dataclasses import asdict

import pytest
from PIL import Image

from lewis.reports import canary
from lewis.reports.canary import Canary, Measured, Step
from lewis.reports.page import PageFacts, to_html
from lewis.reports.run_report import RunFacts

HELD = Step(10, 60, 300.2, (Measured("errors", 0.004, 0.002, 0.012), Measured("<b>cut", 0.2, 0.2, 0.3)))
FAILED = Step(50, 260, 301, (Measured("errors", 0.2, 0.001, 0.011), Measured("<b>cut", 0.2, 0.25, 0.35)))


def made(*steps: Step, why: str = "") -> Canary:
    return Canary("vllm<i>", "2026-11-29T00:10:20+00:00", steps, why)


def test_it_says_in_words_what_the_picture_shows() -> None:
    found = made(HELD, FAILED, why="canary at 50 %: errors")
    assert Canary.of(json.loads(json.dumps(asdict(found)))) == found
    words = canary.described(found)
    assert "10 % of the traffic, 60 requests: errors 0.004 vs 0.002, pass, at most 0.012" in words
    assert words.endswith("Failed at 50 %: the old version has all traffic again. canary at 50 %: errors")
    assert made(HELD).line() == "All 1 steps held: the new version has all traffic."
    given_up = made(HELD, Step(50, 3, 90), why="too few")
    assert given_up.line().startswith("Given up: the old version has all traffic again.")
    assert canary.rows(given_up)[-1] == {
        **{"share": "50 %", "requests": "3", "seconds": "90"},
        **{"rule": "-", "new": "-", "old": "-", "at most": "-", "": "not judged"},
    }


@pytest.mark.slow
def test_a_failed_rule_is_red_in_the_picture() -> None:
    def red(found: Canary) -> int:
        drawn = Image.open(io.BytesIO(canary.draw(found))).convert("RGB")
        return sum(count for count, colour in drawn.getcolors(1 << 20) or [] if colour == (192, 38, 38))

    assert red(made(HELD)) == 0 < red(made(HELD, FAILED, why="x"))
    assert red(made(Step(10, 3, 90), why="too few")) > 0, "a step that was not judged"


@pytest.mark.slow
def test_it_is_one_section_of_the_page_however_often_it_is_added() -> None:
    page = to_html(RunFacts("plain", "Merged.", "by hand", 3, "a" * 64), PageFacts())
    once = canary.into_page(page, made(HELD, FAILED, why="canary at 50 %"))
    assert once.startswith(page.partition("</main>")[0]) and once.endswith("</main></body></html>\n")
    assert "<b>cut" not in once and "vllm<i>" not in once and once.count("Into service at vllm&lt;i&gt;") == 1
    assert 'alt="Canary at vllm&lt;i&gt;. 10 % of the traffic' in once and 'src="data:image/png;base64,' in once
    again = canary.into_page(once, made(HELD))
    assert again.count("<h2>Into service") == 1 and "FAIL" not in again and "All 1 steps held" in again
    other = canary.into_page(again, Canary("second", made().time, (HELD,)))
    assert other.count("<h2>Into service") == 2


def test_numbers_that_are_not_finite_are_drawn() -> None:
    """Prometheus has them: a quantile beyond the last bucket, a share of no requests."""
    inf = float("inf")
    rules = [Measured("slow", 1.0, inf, inf), Measured("cut", inf, 0.5, 0.6), Measured("both", inf, inf, inf)]
    assert Image.open(io.BytesIO(canary.draw(made(Step(10, 60, 300, tuple(rules)))))).size[0] > 0
