"""What a block made is told apart from what it found."""

from pathlib import Path

import pytest

from lewis import store
from lewis.store import kinds, remote


def test_a_block_tells_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_asleep", {})
    monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
    for name in ("one", "two"):
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / name))
        scores, grams = kinds.SCORES.path("5c"), kinds.GRAMS.path("9a")
        with store.noticing() as made:
            if store.read_entry(scores) is None:
                store.write_entry(scores, {"results": {"a": 1}})
            if store.read_manifest(grams) is None:
                with store.publish(grams, {"digest": "d"}) as scratch:
                    (scratch / "file").touch()
        assert made == ([scores, grams] if name == "one" else [])  # the second fetches them
        assert scores.exists() and grams.exists()
