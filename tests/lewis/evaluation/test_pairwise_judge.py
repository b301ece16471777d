"""The gate's rule `judge`, against a real server on loopback: what it is asked, what counts, and what goes wrong."""

import pytest
from scipy.stats import binomtest

from lewis.errors import InputError, LewisError, TransientError
from lewis.evaluation.documents import Document, SideBySide
from lewis.evaluation.pairwise_judge import opinion
from lewis.evaluation.statistics.scores import Texts
from lewis.recipe.schema import Judge
from tests.support.judge_server import judging

JUDGE = Judge(model="wise", documents=10)


def beside(ours: str, theirs: str, target: str, documents: int = 12) -> SideBySide:
    """Both models' answers, the same ones to all documents."""
    found = (
        Document(
            ("t", f"{n:02}", 0), "t/acc,none", True, 0, 0, (), (Texts("p", target, ours), Texts("p", target, theirs))
        )
        for n in range(documents)
    )
    return SideBySide("merged", "champion", (), tuple(found))


def test_a_judge_that_prefers_the_reference_refuses_and_is_asked_in_both_orders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with judging() as (url, asked):
        monkeypatch.setenv("LEWIS_JUDGE", f"{url}/")
        monkeypatch.setenv("LEWIS_JUDGE_KEY", "of the judge")
        worse = opinion(JUDGE, beside("wrong", "right", "right"))
        p = binomtest(0, 10, 0.5, alternative="less").pvalue
        assert str(worse) == (
            "judge wise must not prefer champion: it prefers merged on 0, champion on 10 of 10 documents, "
            f"p {p:.3g}: fail"
        )
        assert len(asked) == 20 and {key for key, _ in asked} == {"Bearer of the judge"}
        first, second = (body["messages"][0]["content"] for _, body in asked[:2])
        assert "answer of A\nwrong\n-----answer of B\nright" in first and "answer of A\nright" in second
        assert (asked[0][1]["model"], asked[0][1]["temperature"]) == ("wise", 0)
        better = opinion(JUDGE, beside("right", "wrong", "right"))
        assert better.passed and "prefers merged on 10, champion on 0" in str(better)
        few = opinion(Judge(model="wise", documents=4), beside("wrong", "right", "right"))
        assert few.passed and str(few).endswith("p 0.0625: pass")


def test_a_judge_that_favours_a_place_counts_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with judging(lambda _: "I first thought [[B]], but no: [[A]]") as (url, _):
        monkeypatch.setenv("LEWIS_JUDGE", url)
        found = opinion(JUDGE, beside("wrong", "right", "right"))
    assert found.passed and "prefers merged on 0, champion on 0 of 10" in str(found)


def test_an_answer_without_a_verdict_counts_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def forgets(text: str) -> str:
        """Twice; then the first answer is better if it is right."""
        asked.append(text)
        return "hm" if len(asked) < 3 else "[[A]]" if "answer of A\nright" in text else "[[B]]"

    with judging(forgets) as (url, _):
        monkeypatch.setenv("LEWIS_JUDGE", url)
        found = opinion(JUDGE, beside("wrong", "right", "right"))
    assert not found.passed and "on 0, champion on 9 of 10 documents, 2 of its answers have no verdict, p" in str(found)


def test_nothing_is_asked_where_no_answers_differ() -> None:
    for found in (beside("same", "same", "same"), None):
        assert "no answers that are known differ: pass" in str(opinion(JUDGE, found))


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (503, TransientError, "is busy or broken: it answers 503 .*Both are fine"),
        (401, InputError, r"refuses the model wise: it answers 401 .* which ends with /v1 mostly, .*LEWIS_JUDGE_KEY"),
        (200, LewisError, r"expected answers that end with \[\[A\]\], .* which 20 of 20 do not"),
    ],
)
def test_what_a_judge_cannot_say_is_an_error(
    monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception], message: str
) -> None:
    with judging(lambda _: "Both are fine.", status) as (url, _):
        monkeypatch.setenv("LEWIS_JUDGE", url)
        with pytest.raises(error, match=message):
            opinion(JUDGE, beside("a", "b", "a"))
    with pytest.raises(TransientError, match="does not answer"):
        opinion(JUDGE, beside("a", "b", "a"))
    monkeypatch.delenv("LEWIS_JUDGE")
    with pytest.raises(InputError, match="LEWIS_JUDGE: not set"):
        opinion(JUDGE, beside("a", "b", "a"))
