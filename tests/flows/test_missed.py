"""Since when a champion is behind."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lewis.registry import lineage
from lewis.registry.releases import Held
from lewis_flows import polls

START = datetime(2026, 1, 8, tzinfo=UTC)


def champion(commit: str) -> list[Held]:
    return [Held("1", "", "passed", ("champion",), {lineage.source_tag("org/math"): commit})]


def test_the_first_commit_that_the_champion_misses_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return now

    monkeypatch.setattr(polls, "datetime", Clock)
    hours = {  # hour: the champion's commit, the newest one, and the hour since which the champion is behind
        0: ("", "one", None),  # nothing is merged yet
        1: ("one", "one", None),
        2: ("one", "two", 2),
        3: ("one", "three", 2),
        4: ("two", "three", 3),  # a run that began before the third commit
        5: ("three", "three", None),
        6: ("two", "three", 6),  # rolled back
    }
    for hour, (held, head, since) in hours.items():
        now = START + timedelta(hours=hour)
        polls.note_missed({"tiny": {"org/math": head}}, {"tiny": champion(held) if held else []}, ["tiny", "other"])
        expected = None if since is None else START + timedelta(hours=since)
        assert polls.behind_since() == {"tiny": expected}
        newest = {3: START + timedelta(hours=3)}.get(hour, expected)  # only then it misses two
        assert polls.newest_missed() == {"tiny": newest}
    polls.note_missed({}, {}, ["tiny"])  # it could not be checked
    assert polls.behind_since()["tiny"] is not None
    for number in range(60):
        polls.note_missed({"tiny": {"org/math": str(number)}}, {"tiny": champion("two")}, ["tiny"])
    assert len(polls._seen().commits["tiny"]["org/math"]) == 50 and polls.behind_since()["tiny"] == START + timedelta(
        hours=6
    )
    polls.note_missed({}, {}, ["other"])
    assert polls.behind_since() == {}
    (home / "behind.json").write_text("[1]")
    assert polls.behind_since() == {}
