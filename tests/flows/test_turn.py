"""Turns of a recipe on machines that share no disk, but the remote half of the store."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import pytest
from filelock import Timeout
from prefect import State, flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import Pause, TerminationSignal
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending, Running

from lewis.errors import InputError
from lewis.recipe.recipe import Recipe
from lewis.store import runs
from lewis_flows import merge, prefect_runs, search, serve, turn


def test_a_recipe_of_the_folder_has_one_turn_on_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "x.yaml"
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "one"))
    with turn.turn(recipe, "run"):
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "two"))
        with pytest.raises(Timeout):
            turn._lock(recipe).acquire(timeout=0)
        for other in (recipe.with_suffix(".search"), tmp_path / "x.yaml"):  # another turn; a file of this machine alone
            with turn._lock(other):
                pass
    with turn.turn(recipe, "run"):
        pass


def test_a_recipe_has_one_turn_by_every_path_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lewis run`, and a run of the deployment in a folder that is a link, held it at the same time."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "link"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with turn.turn(tmp_path / "link" / "x.yaml", "run"), pytest.raises(Timeout):
        turn._lock(tmp_path / "real" / "x.yaml").acquire(timeout=0)


def test_recipes_of_a_group_run_one_after_the_other(
    prefect_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release started both; the second failed, since the first had replaced the champion that it compared with."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    for name, group in (("one", "duo"), ("two", "duo"), ("alone", "")):
        (tmp_path / f"{name}.yaml").write_text(
            f"{{merge_method: linear, models: [{{model: a, parameters: {{weight: 1}}}}], "
            f"register: {{name: {group or 'own'}, group: '{group}'}}}}"
        )
    one, two, alone = (Recipe.load(tmp_path / f"{name}.yaml") for name in ("one", "two", "alone"))

    def working(*_: object) -> None:
        with turn.of_group(alone, "alone"), pytest.raises(Timeout):
            turn._lock(tmp_path / "duo.group").acquire(timeout=0)
        raise InputError("no further")

    monkeypatch.setattr(merge, "begin", lambda _: tmp_path / "one.yaml")
    monkeypatch.setattr(merge, "_recipe_and_keys", lambda *_: (one, None))
    monkeypatch.setattr(merge, "_merge", working)
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        state = merge.merge_flow("one", return_state=True)
    assert state.message and "no further" in state.message
    with turn.of_group(two, "two"):
        pass


def test_whether_a_run_waits_for_its_turn_is_known_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    recipe, held = tmp_path / "x.yaml", threading.Event()

    def second() -> None:
        with turn.turn(recipe, "second"):
            held.set()

    with turn.turn(recipe, "first"):
        waiter = threading.Thread(target=second)
        waiter.start()
        deadline = time.monotonic() + 120
        while not turn.waits("second"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not turn.waits("first") and not held.is_set()
    waiter.join()
    assert held.is_set() and not turn.waits("second")


def test_a_run_that_ends_well_never_looks_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    forget, dead = runs.forget, []
    monkeypatch.setattr(runs, "forget", lambda run: (dead.append(runs.is_dead(run)), forget(run)))
    with turn.turn(tmp_path / "x.yaml", "run"):
        pass
    assert dead == [False] and not [*(tmp_path / "home").rglob("*run*/*")]


def test_a_run_that_is_suspended_leaves_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it was resumed, another command could take it for dead; and nothing made way for others while it waited."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    with pytest.raises(Pause), turn.turn(tmp_path / "x.yaml", "run"):
        raise Pause
    assert not [*(tmp_path / "home" / "runs").iterdir()]


def test_the_tasks_of_a_run_that_is_cancelled_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They went on in their threads, with the device, until the process was killed 30 seconds later."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(turn, "flow_run", SimpleNamespace(id="run"))
    monkeypatch.setattr(turn.caching, "STOPPING", threading.Event())
    with pytest.raises(TerminationSignal):
        turn.noted(Mock(side_effect=TerminationSignal(signal.SIGTERM)))()
    assert turn.caching.STOPPING.is_set()


def test_a_run_that_fails_leaves_nothing_once_the_server_knows_it(
    prefect_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))

    @flow(name=prefect_runs.MERGE, **turn.HOOKS)
    def merged() -> None:
        with turn.turn(tmp_path / "x.yaml", str(flow_run.id)):
            raise ValueError("a merge that fails")

    with temporary_settings({PREFECT_API_URL: prefect_url}), pytest.raises(ValueError, match="fails"):
        merged()
    assert not [*(tmp_path / "home" / "runs").iterdir()] and not [*(tmp_path / "home").rglob("*run-*")]


@contextmanager
def running(url: str, state: State[Any] | None = None) -> Iterator[tuple[SyncPrefectClient, UUID]]:
    """A server, and a merge that it believes Running, or in another state."""

    @flow(name=prefect_runs.MERGE)
    def merged() -> None:
        """Stands for a merge."""

    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client, client.create_flow_run(merged, state=state or Running()).id


def test_a_run_that_ends_with_an_error_leaves_its_note_for_whoever_tells_the_server(
    prefect_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run that gets SIGTERM when all of `lewis up` was killed: its server believes it running."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))

    with running(prefect_url) as (client, run):
        with pytest.raises(KeyboardInterrupt), turn.turn(tmp_path / "x.yaml", str(run)):
            turn.crash_dead_runs()
            assert client.read_flow_run(run).state_name == "Running"
            raise KeyboardInterrupt
        turn.crash_dead_runs()
        assert client.read_flow_run(run).state_name == "Crashed"
    assert not [*(tmp_path / "home" / "runs").iterdir()]


def test_a_run_that_is_killed_before_its_turn_is_known_to_be_dead(
    prefect_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is Running as soon as its function begins, which then asks the server for this and that."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))

    with running(prefect_url) as (client, run):
        monkeypatch.setattr(turn, "flow_run", SimpleNamespace(id=run))

        def killed() -> None:
            turn.crash_dead_runs()
            assert client.read_flow_run(run).state_name == "Running"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            turn.noted(killed)()
        turn.crash_dead_runs()
        assert client.read_flow_run(run).state_name == "Crashed"
    assert turn.noted(lambda: runs.notes())() == [runs.note_of(str(run))] and not runs.notes()


@pytest.mark.parametrize("state", [Pending(), Running()], ids=str)
def test_a_run_that_was_killed_before_its_note_is_dead_once_no_command_runs(
    state: State[Any], prefect_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Prefect server was killed in the moment in which it had stored that the run is Running."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))

    with running(prefect_url, state) as (client, run):

        def found(*, alone: bool) -> str | None:
            turn.crash_dead_runs(alone=alone)
            return client.read_flow_run(run).state_name

        with runs.noted(runs.COMMAND):  # it may be the run of this command
            assert found(alone=True) == state.name
        assert found(alone=False) == state.name  # it may be the run of another store
        assert found(alone=True) == "Crashed"
        made = client.create_deployment(client.read_flow_run(run).flow_id, "of a worker")
        run = client.create_flow_run_from_deployment(made, state=state).id
        assert found(alone=True) == state.name
        client.delete_flow_run(run)
        client.delete_deployment(made)


@pytest.mark.parametrize(("module", "name"), [(merge, "merge_flow"), (search, "search_flow"), (serve, "serve_flow")])
def test_a_run_leaves_its_note_before_all_else(
    module: Any, name: str, prefect_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    seen = list[Path]()

    def begin(recipe: str) -> Path:
        seen.extend(runs.notes())
        raise InputError("no further")

    monkeypatch.setattr(module, "begin", begin)
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        state = getattr(module, name)("x", return_state=True)
    assert state.is_failed() and [each.name for each in seen] == [str(state.state_details.flow_run_id)]
    assert not runs.notes()
