"""Turns: one run of a recipe, or of a group, at a time. Dead runs that Prefect shows as running are marked as crashed.

The runs of a deployment take turns by its concurrency limit; one that waits there occupies no worker. A kernel lock on
a file of the store comes on top, for `lewis run`, which may run next to the service. The kernel frees a lock as soon as
its holder dies. Machines that share no disk, but a remote half of the store, have a lease next to it; that of a killed
holder ends after a minute.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import httpx
from filelock import FileLock, Timeout
from prefect import Flow, State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import Pause, TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Crashed

from lewis import store
from lewis.recipe.recipe import Recipe
from lewis.store import runs
from lewis.store.lease import SharedLock
from lewis_flows import approval, prefect_runs, recipes_folder
from lewis_tasks.support import caching, events
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.events import Wait

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
_NOTED = set[str]()  # runs of this process that have left a note
_WAITS = "waits"  # the second line of a run's note
_LOOK = 60.0  # seconds between two checks for a long wait
EVERY = 10.0
"""Seconds between two calls of `absorb_waiting`."""


def noted(function: Callable[P, R]) -> Callable[P, R]:
    """Make a flow function leave the note of its run before all else, even before its first request to the server.

    A run that is killed before it takes its turn is Running by then, and only the note shows that its process is dead.
    """

    @functools.wraps(function)
    def with_note(*args: P.args, **kwargs: P.kwargs) -> R:
        with _note(str(flow_run.id)):
            try:
                return function(*args, **kwargs)
            except TerminationSignal:  # as after Ctrl-C: long tasks, in threads, end at their next report of progress
                caching.STOPPING.set()
                raise

    return with_note


@contextmanager
def _note(run: str) -> Iterator[Path]:
    """Leave a note of a run, locked while the block lasts; a block inside one of the same run gets the same note.

    The note stays if the block raises: perhaps the server is not there to learn that the run ended, as when all of
    `lewis up` is killed and its worker's run gets SIGTERM. It is removed when the run's end is reported to the server:
    by `HOOKS` at the end of this run, or else by `crash_dead_runs` of a later process.
    """
    note = runs.note_of(run)
    if run in _NOTED:
        yield note
        return
    with runs.lock(run):
        _NOTED.add(run)
        try:
            with suppress(OSError):  # the disk may be full: what is left by killed runs is removed after this
                store.write_text(note, "")
            yield note
            runs.forget(run)  # before the lock is free: a note without a holder is that of a dead run
        except Pause:  # the server knows that it is suspended; resumed, it would look dead before it locks the note
            runs.forget(run)
            raise
        finally:
            _NOTED.discard(run)


@contextmanager
def turn(recipe: Path, run: str) -> Iterator[None]:
    """Hold the turn of a recipe while the block lasts; wait for it while another run has it.

    Args:
        recipe: the recipe's file.
        run: id of the flow run.
    """
    running = _lock(recipe)
    with _note(run) as note:
        store.write_text(note, str(recipe))
        try:
            _take(running, recipe, note)
            yield
        finally:
            running.release()


def of_group(recipe: Recipe, run: str) -> AbstractContextManager[None]:
    """Return the turn of all recipes that register the same model (`register.group`); of other recipes, none.

    Else the gates of two runs would compare with one champion, and the second could not replace that of the first.

    Args:
        recipe: of the run, which has its own turn already.
        run: id of the flow run.
    """
    block = recipe.register_as
    if not (block and block.group):
        return nullcontext()
    return turn(recipes_folder.location() / f"{block.model}.group", run)


def absorb(run: FlowRun) -> None:
    """End waiting runs of this run's deployment as `Skipped`: this run begins now, so it merges what they would merge.

    Some stay: runs with other parameters, runs that a schedule or a person plans for later, and runs that a person has
    answered, which move the champion. Nothing is done for a run without a deployment.
    """
    if run.deployment_id is None:
        return
    try:
        with get_client(sync_client=True) as client:
            same, now = {"any_": [run.deployment_id]}, events.now(client)
            for other in prefect_runs.of_flows(client, (prefect_runs.MERGE,), ("SCHEDULED",), deployment_id=same):
                alike = other.id != run.id and _given(other) == _given(run) and not approval.asked(other)
                if alike and prefect_runs.waits(other, now):
                    prefect_runs.skip(client, other, run, f"the run {run.name} merges the newest state")
    except httpx.HTTPError as error:  # then they run after this one, and find all steps done
        logger.info("runs that wait stay: %s", type(error).__name__)


def absorb_waiting() -> None:
    """End runs that wait for a slot of their deployment, all but the next one of those with the same parameters.

    The next one would end the others itself when it begins, as `absorb` does. None of them begins during this call,
    since they wait for a slot that another run holds.
    """
    slot = {"name": {"any_": ["AwaitingConcurrencySlot"]}}
    try:
        with get_client(sync_client=True) as client:
            soonest, kept = FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC, list[FlowRun]()
            for run in prefect_runs.of_flows(client, (prefect_runs.MERGE,), ("SCHEDULED",), soonest, state=slot):
                if approval.asked(run):
                    continue
                alike = [
                    each for each in kept if each.deployment_id == run.deployment_id and _given(each) == _given(run)
                ]
                if alike:
                    why = f"the run {alike[0].name}, which waits too, merges the newest state"
                    prefect_runs.skip(client, run, alike[0], why)
                else:
                    kept.append(run)
    except httpx.HTTPError as error:  # then the first of them to begin ends the others
        logger.info("runs that wait stay: %s", type(error).__name__)


def _given(run: FlowRun) -> dict[str, Any]:
    """The parameters of a run that were filled in: the form of *Custom run* sends empty ones too."""
    return {name: value for name, value in run.parameters.items() if value}


def end_turn(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of flows: remove the note of a run, once Prefect's server has accepted the run's final state."""
    runs.forget(str(flow_run.id))


HOOKS: dict[str, Any] = {ending: [*hooks, end_turn] for ending, hooks in run_tags.HOOKS.items()}
"""Arguments of `@flow` for flows that take turns."""


def _lock(recipe: Path) -> FileLock | SharedLock:
    """Return the lock of a recipe; for the recipes folder, one for all machines with the same `LEWIS_STORE`."""
    local = f"turn-{recipe.parent.resolve() / recipe.name}"
    if recipes_folder.holds(recipe):
        return store.SharedLock(f"turn-{recipe.name}", local=local)
    return store.lock(local)


def _take(running: FileLock | SharedLock, recipe: Path, note: Path) -> None:
    try:
        running.acquire(timeout=0)
    except Timeout:
        store.write_text(note, f"{recipe}\n{_WAITS}")
        wait = Wait()
        while True:
            wait.look(f"a run of {recipe.stem}", f"its turn: another run of {recipe.stem} is going on")
            with suppress(Timeout):
                running.acquire(timeout=_LOOK)
                break
        store.write_text(note, str(recipe))


def waits(run: str) -> bool:
    """Whether a flow run that goes on in this store waits for its turn."""
    try:
        return runs.note_of(run).read_text(encoding="utf-8").endswith(f"\n{_WAITS}")
    except OSError:
        return False


def crash_dead_runs(*, alone: bool = False) -> None:
    """Mark as Crashed the runs that Prefect believes running though their process has died.

    Only runs on this store's file system have locks; the server learns of others by their missing heartbeats.

    Args:
        alone: whether only commands of this store use the server's database. Then a run that belongs to no deployment
            and has no note is dead too, unless a command runs: it was killed in the second in which it began or ended.
    """
    flows = prefect_runs.MERGE, prefect_runs.SEARCH, prefect_runs.SERVE
    with get_client(sync_client=True) as client:
        found = prefect_runs.of_flows(client, flows, ("PENDING", "RUNNING"))
        alone = alone and all(runs.is_dead(note.name) for note in runs.notes() if note.name.startswith(runs.COMMAND))
        for run in found:
            if runs.note_of(str(run.id)).exists():
                dead = run.state_type == StateType.RUNNING and runs.is_dead(str(run.id))
            else:
                dead = alone and run.deployment_id is None and not _has_ended(client, run)
            if dead:
                mark_crashed(client, run)
    for note in runs.notes():
        if runs.is_dead(note.name):
            runs.forget(note.name)


def _has_ended(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a run has ended by now, and has removed its note then."""
    state = client.read_flow_run(run.id).state
    return state is not None and state.is_final()


def mark_crashed(client: SyncPrefectClient, run: FlowRun) -> None:
    """Tell the server that the process of a run has died, and remove the note that it left here."""
    message = "Its process died. Run it again: what was finished is kept."
    prefect_runs.end(client, run, Crashed(message=message), "crashed")
    runs.forget(str(run.id))
    logger.warning("run %s had died; it is marked as Crashed now", run.name)


def tag_crashed_runs() -> None:
    """Tag runs that the server marked as Crashed with this verdict, since the server changes only their state."""
    flows, newest = prefect_runs.OF_RECIPES, FlowRunSort.END_TIME_DESC
    try:
        with get_client(sync_client=True) as client:
            found = prefect_runs.of_flows(client, flows, ("CRASHED",), newest)
    except httpx.HTTPError as error:
        logger.info("runs that died get their verdict later: %s", type(error).__name__)
        return
    for run in found:
        if "crashed" not in run_tags.tagged(run, "verdict"):
            run_tags.tag(run.id, verdict="crashed")
