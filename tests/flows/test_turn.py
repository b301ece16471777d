"""Turns of a recipe on machines that share no disk, but the remote half of the store."""

import threading
import time
from pathlib import Path

import pytest
from filelock import Timeout

from lewis_flows import turn


def test_a_recipe_of_the_folder_has_one_turn_on_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "x.yaml"
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "one"))
    with turn.turn(recipe, "run", skip=True) as ours:
        assert ours
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "two"))
        with pytest.raises(Timeout):
            turn._lock("turn", recipe).acquire(timeout=0)
        for other in (recipe.with_suffix(".search"), tmp_path / "x.yaml"):  # another turn; a file of this machine alone
            with turn._lock("turn", other):
                pass
    with turn.turn(recipe, "run", skip=True) as ours:
        assert ours


def test_whether_a_run_waits_for_its_turn_is_known_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    recipe, held = tmp_path / "x.yaml", threading.Event()

    def second() -> None:
        with turn.turn(recipe, "second", skip=True):
            held.set()

    with turn.turn(recipe, "first", skip=True):
        waiter = threading.Thread(target=second)
        waiter.start()
        deadline = time.monotonic() + 20
        while not turn.waits("second"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not turn.waits("first") and not held.is_set()
        with turn.turn(recipe, "third", skip=True) as ours:
            assert not ours and not turn.waits("third")
    waiter.join()
    assert held.is_set() and not turn.waits("second")
