"""The memory of a process and of the machine."""

from pathlib import Path

import pytest

from lewis import memory


def test_all_is_zero_on_a_system_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan, and the line at the end of a merge, were tracebacks on macOS."""
    questions = (
        memory.anonymous_bytes,
        memory.mapped_bytes,
        memory.peak_resident_bytes,
        memory.available_bytes,
    )
    assert all(question() > 0 for question in questions)
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "missing")
    assert [question() for question in questions] == [0] * 4
