"""A version that passed its gate waits for a person; what the person says counts only while the numbers do."""

import json
import shutil
from pathlib import Path

import pytest

from lewis.errors import InputError, LewisError
from lewis.evaluation.gate import Verdict
from lewis.registry import history, outbox, promotion, releases, tracking
from lewis.registry.versions import Version
from lewis.reports.run_report import outcome, verdict_line
from lewis_flows.cli.main import main
from lewis_flows.service.status_data import Watched
from lewis_flows.service.status_text import _heading
from tests.conftest import Family
from tests.support.databases import champion_stays
from tests.support.lineage import make_home, registered


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path / "home", empty_database, monkeypatch)


def asked(version: Version, champion: str, hours: float | None = 1.0) -> Verdict:
    """The gate lets it pass and leaves the rest to a person."""
    verdict = Verdict(True, ("a rule: pass",), champion, "acc 1 vs 0", "acc", hours)
    assert promotion.promote(version, verdict, "the run").moved == (hours is None)
    return verdict


def told(name: str = "tiny") -> list[str]:
    return [f"{each.what} {each.version[-1]}" for each in history.history(name)]


def test_a_version_waits_until_a_person_approves(home: Path, family: Family) -> None:
    first, second, third = (registered(family.base, digit, {"x": digit}, "tiny", None) for digit in "abc")
    asked(first, "base", None)
    for _ in range(2):  # the next night's run finds it waiting
        verdict = asked(second, first.uri)
    assert told() == ["promoted 1", "waits 2"]
    assert [(each.verdict, each.aliases) for each in releases.merged("tiny")[1:]] == [
        ("waiting", ("challenger",)),
        ("passed", ("champion",)),
    ]
    line = "v2: acc 1 vs 0; passed, waits for: lewis approve tiny/2 --why ..."
    assert verdict_line(second.uri, verdict, champion=first.uri) == ("AwaitingApproval", line)
    assert "waits for a person" in outcome(second.uri, verdict, first.uri, created=True)
    assert "version 2 waits for `lewis approve`" in _heading(Watched(recipe="r", registered="tiny", waiting="2"))

    with pytest.raises(InputError, match="models:/tiny/1: it waits for no approval, its verdict is: passed"):
        promotion.approve("tiny", "1", "x")
    with pytest.raises(InputError, match="no such version"):
        promotion.approve("tiny", "9", "x")
    assert [promotion.is_waiting("tiny", number) for number in "129"] == [False, True, False]
    with pytest.raises(InputError, match="expected a reason"):
        promotion.approve("tiny", "2", " ")
    assert promotion.approve("tiny", "2", "support has read it", "Ann") == first.uri
    newest = history.history("tiny")[-1]
    assert (newest.what, newest.champion, newest.why, newest.by) == (
        "approved",
        first.uri,
        "support has read it",
        "Ann",
    )
    assert releases.merged("tiny")[1].aliases == ("challenger", "champion")

    asked(third, second.uri)
    promotion.promote_by_hand("tiny", "1", "no reason")
    assert releases.waiting(releases.merged("tiny")) is None  # `lewis status` asked for it all the same
    with pytest.raises(InputError, match=r"compared it with models:/tiny/2, but the champion is models:/tiny/1 by now"):
        promotion.approve("tiny", "3", "x")
    asked(third, first.uri)
    promotion.refuse("tiny", "3", "it is rude")
    assert told()[-3:] == ["lapsed 3", "waits 3", "refused 3"]
    assert promotion.withdrawn("tiny", "c" * 64) == "it is rude"


def test_an_approval_that_died_after_the_move_is_finished(
    home: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (registered(family.base, digit, {"x": digit}, "tiny", None) for digit in "ab")
    asked(first, "base", None)
    asked(second, first.uri)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(history, "follow", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        promotion.approve("tiny", "2", "support has read it")
    assert promotion.is_champion("tiny", "2") and promotion.is_waiting("tiny", "2")
    assert promotion.approve("tiny", "2", "support has read it") == first.uri
    assert not promotion.is_waiting("tiny", "2") and told() == ["promoted 1", "waits 2", "approved 2"]


def test_the_champion_cannot_be_refused(home: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version in use was tagged as withdrawn, and after the next one nothing could be rolled back to it."""
    asked(registered(family.base, "a", {}, "tiny", None), "base")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(history, "follow", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        promotion.approve("tiny", "1", "support has read it")
    with pytest.raises(InputError, match="models:/tiny/1 is the champion: take it back"):
        promotion.refuse("tiny", "1", "it is rude")
    assert promotion.withdrawn("tiny", "a" * 64) is None and told() == ["waits 1", "approved 1"]


def test_a_version_that_is_promoted_by_hand_no_longer_waits(home: Path, family: Family) -> None:
    asked(registered(family.base, "a", {}, "tiny", None), "base")
    promotion.promote_by_hand("tiny", "1", "in a hurry")
    assert not promotion.is_waiting("tiny", "1") and releases.merged("tiny")[0].verdict == "passed"


def test_a_promotion_that_died_leaves_no_verdict(
    home: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one, no poll started another run of the recipe: what had passed never came into use."""
    version = registered(family.base, "a", {"x": "a"}, "tiny", None)

    def moved() -> list[releases.Moved]:
        return releases.moved({"x": "a"}, releases.merged("tiny"), base=None, root=tmp_path)

    with champion_stays(home), pytest.raises(LewisError):
        asked(version, "base", None)
    assert moved()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after the alias has moved
        patch.setattr(outbox, "write", lambda move: (_ for _ in ()).throw(KeyboardInterrupt) if move.happened else None)
        asked(version, "base", None)
    assert promotion.is_champion("tiny", "1") and moved()
    promotion.promote(version, Verdict(True, ("this very model is the champion already",), version.uri))
    assert told() == ["promoted 1"] and not moved()


def test_a_rollback_that_died_is_done_by_the_next(home: Path, family: Family) -> None:
    """It had made the champion its own `previous`, and there was nothing to go back to."""
    first, second = (registered(family.base, digit, {"x": digit}, "tiny", None) for digit in "ab")
    asked(first, "base", None)
    asked(second, first.uri, None)
    with champion_stays(home), pytest.raises(LewisError):
        promotion.rollback("tiny", "it is rude")
    assert promotion.rollback("tiny", "it is rude") == first.uri
    assert promotion.is_champion("tiny", "1") and told() == ["promoted 1", "promoted 2", "rolled back 1"]


def test_only_the_version_that_is_meant_is_rolled_back(
    home: Path, family: Family, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run promoted another version before the command had the lock, and that was withdrawn in its place."""
    first, second, third = (registered(family.base, digit, {"x": digit}, "tiny", None) for digit in "abc")
    asked(first, "base", None)
    asked(second, first.uri, None)
    find = promotion.champion_number

    def late(name: str) -> str | None:
        found = find(name)
        asked(third, second.uri, None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "champion_number", late)
        assert main(["rollback", "tiny", "--why", "it was rude"]) == 2
    assert "models:/tiny/2 is not rolled back, since the champion is models:/tiny/3 by now" in capsys.readouterr().err
    assert main(["rollback", "tiny/2", "--why", "it was rude"]) == 2
    assert promotion.is_champion("tiny", "3") and promotion.withdrawn("tiny", "c" * 64) is None
    capsys.readouterr()
    assert main(["rollback", "models:/tiny/03", "--why", "it was rude"]) == 0
    assert "models:/tiny/2 is the champion again in place of models:/tiny/3\n" in capsys.readouterr().out
    assert promotion.withdrawn("tiny", "b" * 64) is None and promotion.withdrawn("tiny", "c" * 64) == "it was rude"
    promotion.promote_by_hand("tiny", "1", "x")
    assert main(["rollback", "tiny", "--why", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"champion": second.uri, "before": first.uri}


def test_a_number_with_a_zero_before_it_is_the_same_number(
    home: Path, family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    """The champion took its own place, and there was no previous one to go back to."""
    asked(registered(family.base, "a", {}, "tiny", None), "base", None)
    assert main(["promote", "tiny/01", "--why", "x"])
    assert "models:/tiny/1 is the champion already" in capsys.readouterr().err
    assert told() == ["promoted 1"]


def test_a_version_that_is_registered_again_waits_on(home: Path, family: Family) -> None:
    """It waited without an end: the poll and `lewis status` ended with a KeyError."""
    asked(registered(family.base, "a", {}, "tiny", None), "base")
    shutil.rmtree(home / "mlflow" / "artifacts")
    assert registered(family.base, "a", {}, "tiny", None).version == "2"
    waits = releases.waiting(releases.merged("tiny"))
    assert waits and waits.version == "2"
    promotion.approve("tiny", "2", "x")


def test_nobody_approves_in_time(home: Path, family: Family) -> None:
    version = registered(family.base, "a", {}, "tiny", None)
    asked(version, "base")
    with tracking.client("making it late") as client:
        client.set_model_version_tag("tiny", "1", "lewis.approve_until", "2026-01-01T00:00:00+00:00")
    (held,) = releases.merged("tiny")
    assert held.lapsed and releases.waiting([held]) is None
    with pytest.raises(InputError, match="waited for approval until 2026-01-01 00:00 UTC; run its recipe again"):
        promotion.approve("tiny", "1", "x")
    asked(version, "base")
    assert releases.waiting(releases.merged("tiny"))
    promotion.approve("tiny", "1", "x")
    assert told() == ["waits 1", "lapsed 1", "waits 1", "approved 1"]


@pytest.mark.parametrize(
    ("until", "why"),
    [
        ("9999-01-01", ""),
        ("2026-01-01", "waited for approval until 2026-01-01 00:00 UTC; run"),
        ("tomorrow", "expected a time in its tag lewis.approve_until in MLflow, got 'tomorrow'; run its recipe again"),
        ("", "expected a time in its tag lewis.approve_until in MLflow, got None; run its recipe again"),
    ],
)
def test_a_person_has_changed_the_time_in_mlflow(home: Path, family: Family, until: str, why: str) -> None:
    """A TypeError, ValueError or KeyError ended each poll, so that no recipe's releases were seen any more."""
    version = registered(family.base, "a", {}, "tiny", None)
    asked(version, "base")
    with tracking.client("changing it") as client:
        client.delete_model_version_tag("tiny", "1", "lewis.approve_until")
        if until:
            client.set_model_version_tag("tiny", "1", "lewis.approve_until", until)
    (held,) = releases.merged("tiny")
    assert held.lapsed == bool(why)
    if why:
        with pytest.raises(InputError, match=why):
            promotion.approve("tiny", "1", "x")
        asked(version, "base")
    promotion.approve("tiny", "1", "x")
