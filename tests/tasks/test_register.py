"""The task that moves the champion, and shows the verdict."""

from unittest.mock import Mock

import pytest

from lewis.evaluation.gate import Verdict
from lewis.registry.promotion import Promotion
from lewis.registry.versions import Version
from lewis_tasks import register


def test_the_verdict_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason, such as a person's for a rollback, went into the Markdown as it was."""
    shown = Mock()
    for name in ("create_link_artifact", "artifact_key", "moves", "flow_run"):
        monkeypatch.setattr(register, name, Mock())
    monkeypatch.setattr(register, "create_markdown_artifact", shown)
    monkeypatch.setattr(register.promotion, "promote", lambda *_: Promotion(moved=False, previous=None))
    verdict = Verdict(False, ("withdrawn (<b>rude* in *chats): fail",), "base")
    version = Version("tiny", "2", "r", "models:/tiny/2", created=True)
    register.promote.fn(Mock(), version, verdict, Mock())
    text = shown.call_args.args[0]
    assert r"* withdrawn \(\<b\>rude\* in \*chats\): fail" in text and "# models:/tiny/2: failed" in text
