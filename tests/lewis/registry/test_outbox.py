"""What is to be told of new champions, whatever dies between the note and the move of the alias."""

from pathlib import Path
from typing import Any

import pytest

from lewis import store
from lewis.evaluation.gate import Verdict
from lewis.registry import outbox, promotion, versions
from lewis.registry.versions import Version
from lewis.store.kinds import OUTBOX
from tests.conftest import Family
from tests.support.lineage import make_home, registered


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def two(tmp_path: Path, empty_database: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> list[Version]:
    """Two versions without a verdict, in a registry of their own."""
    make_home(tmp_path / "home", empty_database, monkeypatch)
    return [registered(family.base, digit, {"org/base": digit}, "tiny", verdict=None) for digit in "ab"]


def passed(against: str = "base") -> Verdict:
    return Verdict(True, ("better",), against)


def champion() -> str | None:
    found = versions.champion("tiny")
    return found.version.version if found else None


def kill(monkeypatch: pytest.MonkeyPatch, alias: str, *, after: bool) -> None:
    """Let the process die before or after an alias moves."""
    from mlflow import MlflowClient

    real = MlflowClient.set_registered_model_alias

    def move(self: MlflowClient, name: str, moved: str, version: str) -> None:
        if after or moved != alias:
            real(self, name, moved, version)
        if moved == alias:
            raise Killed

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", move)


def test_a_promotion_is_to_be_told_with_what_is_known_of_it(two: list[Version]) -> None:
    promotion.promote(two[0], passed(), about={"recipe": "r"})
    promotion.promote(two[1], passed(two[0].uri))
    first, second = outbox.moves()
    assert (first.uri, first.previous, first.reasons, first.about) == (two[0].uri, None, ["better"], {"recipe": "r"})
    assert (second.uri, second.previous, second.happened) == (two[1].uri, two[0].uri, True)
    assert first.id != second.id and outbox.unsettled() == []
    outbox.remove(first)
    assert outbox.moves() == [second]


def test_a_note_that_a_killed_process_has_half_written_goes_with_the_next(home: Path) -> None:
    move = outbox.Move("tiny", "1", None, ("better",))
    path = OUTBOX.path(move.id)
    store.make_folder(path.parent)
    left = path.with_name(f".another.json.{store.writer().rpartition('-')[0]}-999999999.abc.partial")
    left.write_text("{")
    outbox.write(move)
    assert list(path.parent.iterdir()) == [path]


def test_a_verdict_without_a_move_is_not_told(two: list[Version]) -> None:
    promotion.promote(two[0], Verdict(False, ("worse",), "base"))
    promotion.promote(two[1], passed())
    promotion.promote(two[1], passed())  # the champion already
    assert [move.uri for move in outbox.moves()] == [two[1].uri]


def test_a_move_by_hand_is_told_too(two: list[Version]) -> None:
    promotion.promote(two[0], passed())
    promotion.promote_by_hand("tiny", "2", "we like it")
    promotion.rollback("tiny", "it was rude")
    told = [(move.version, move.reasons[0], move.about.get("digest")) for move in outbox.moves()[1:]]
    assert told == [("2", "promoted by hand: we like it", "b" * 64), ("1", "rolled back: it was rude", "a" * 64)]


@pytest.mark.parametrize("again", ["settle", "promote"])
def test_a_crash_after_the_alias_moved_forgets_nothing(
    two: list[Version], monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, "champion", after=True)
        promotion.promote(two[0], passed())
    assert champion() == "1" and outbox.unsettled() == ["tiny"]
    if again == "settle":
        promotion.settle()
    else:  # another champion before anybody looked
        promotion.promote(two[1], passed(two[0].uri))
    assert next((move.uri, move.happened) for move in outbox.moves()) == (two[0].uri, True)
    assert outbox.unsettled() == []


@pytest.mark.parametrize(("alias", "after"), [("champion", False), ("previous", True)])
def test_a_crash_before_the_alias_moved_tells_nothing_that_did_not_happen(
    two: list[Version], monkeypatch: pytest.MonkeyPatch, alias: str, after: bool
) -> None:
    promotion.promote(two[0], passed())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, alias, after=after)
        promotion.promote(two[1], passed(two[0].uri))
    assert champion() == "1" and outbox.unsettled() == ["tiny"]
    promotion.settle()
    assert [move.uri for move in outbox.moves()] == [two[0].uri]
    promotion.promote(two[1], passed(two[0].uri))  # the run is repeated
    assert champion() == "2" and [move.uri for move in outbox.moves()] == [two[0].uri, two[1].uri]


def test_a_model_that_was_deleted_is_not_told(two: list[Version]) -> None:
    outbox.write(outbox.Move("gone", "1", None, ["better"]))
    promotion.settle()
    assert outbox.moves() == []


def test_a_damaged_note_stops_nothing(two: list[Version], tmp_path: Path) -> None:
    promotion.promote(two[0], passed())
    notes: list[Any] = list((tmp_path / "home" / "outbox").iterdir())
    (tmp_path / "home" / "outbox" / "x.json").write_text("{")
    assert len(notes) == len(outbox.moves()) == 1
