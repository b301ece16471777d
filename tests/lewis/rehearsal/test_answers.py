"""Questions are asked in a child inside walls; answers are kept, and a refusal names the key and what was said."""

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from lewis.rehearsal import child
from lewis.rehearsal.answers import answers, known
from lewis.rehearsal.question import Question, Refused, UnfitError
from lewis.store import kinds


class Fake(Question):
    """A library that wants `a` to be a number and `b.c` to be absent, and does as `do` says."""

    name, semantics, libraries = "fake", 1, ("pyyaml",)

    def ask(self) -> dict[str, Any]:
        config = json.loads(self.files["config.json"])
        match config.get("do"):
            case "loop":
                time.sleep(3600)
            case "allocate":
                bytearray(64 << 30)
            case "die":
                os._exit(3)
            case "look":
                with socket.socket() as line:
                    reached = line.connect_ex(("127.0.0.1", self.settings["port"])) == 0
                return {"reached": reached, "environment": dict(os.environ), "folder": os.listdir(".")}
            case "unfit":
                raise UnfitError("its weights are missing")
        if not isinstance(config.get("a", 0), int):
            raise ValueError(f"Field 'a': expected a number, got {config['a']!r}")
        if "c" in config.get("b", {}):
            raise KeyError("c")
        return {"sum": config.get("a", 0)}


@pytest.fixture(autouse=True)
def _found_by_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))


def fake(item: str = "model", settings: Any = None, **config: Any) -> Fake:
    return Fake(item, {"config.json": json.dumps(config)}, settings or {})


def test_answers_are_kept_and_the_item_is_not_in_the_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known(fake(a=3)) is None
    assert answers([fake(a=3), fake(a=4), fake(a=3)]) == [{"sum": 3}, {"sum": 4}, {"sum": 3}]
    assert len(kinds.REHEARSALS.entries()) == 2
    monkeypatch.setattr(child, "ask_all", None)
    assert answers([fake("other", a=4)]) == [{"sum": 4}] and known(fake(a=3)) == {"sum": 3}
    keys = {fake(a=3).key, fake(a=4).key, fake(settings={"x": 1}, a=3).key}
    monkeypatch.setattr(Fake, "semantics", 2)
    assert len(keys | {fake(a=3).key}) == 4


def test_all_refusals_are_in_one_error_with_the_key_and_what_was_said(home: Path) -> None:
    given = [fake("one", z=0, a="x"), fake("two", a=1), fake("three", b={"d": 1, "c": 2}), fake("four", do="unfit")]
    with pytest.raises(Refused) as error:
        answers(given)
    says = r"pyyaml \d[\d.]* says"
    lines = [
        rf"""one: config.json: a: {says} "Field 'a': expected a number, got 'x'"; accepted without it""",
        rf"""three: config.json: b.c: {says} "KeyError: c"; accepted without it""",
        r"four: config.json: do: its weights are missing; accepted without it",
    ]
    for found, line in zip(str(error.value).splitlines(), lines, strict=True):
        assert re.fullmatch(line, found), found
    assert known(given[1]) == {"sum": 1} and known(given[0]) is None


def test_the_child_has_no_network_no_secret_and_an_empty_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as line:
        [found] = answers([fake(settings={"port": line.getsockname()[1]}, do="look")])
    assert not found["reached"] and "secret" not in str(found["environment"])
    assert found["environment"]["HF_HUB_OFFLINE"] == "1" and found["folder"] == []


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("loop", "odd: .*gives no answer within 3 s"),
        ("allocate", "odd: .*needs more than 4 GB"),
        ("die", "odd: .*ends the process that asks .exit code 3"),
    ],
)
def test_what_ends_the_child_is_an_error_and_the_others_are_answered(
    home: Path, monkeypatch: pytest.MonkeyPatch, do: str, message: str
) -> None:
    if do == "loop":
        monkeypatch.setattr(child, "SECONDS", 3.0)
    first, last = fake(a=1), fake(a=2)
    with pytest.raises(Refused, match=message):
        answers([first, fake("odd", do=do), last])
    assert (known(first), known(last)) == ({"sum": 1}, {"sum": 2})
