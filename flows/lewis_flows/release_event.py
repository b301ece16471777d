"""The event of a new release, which starts merges. The poll and the receiver of webhooks both announce it here."""

import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import Event
from prefect.events.filters import EventFilter

from lewis.errors import InputError
from lewis.models.hub.pin import find_folder
from lewis.recipe.block import parts_of
from lewis.recipe.recipe import Recipe
from lewis.reports.run_report import short
from lewis_tasks.support import events

EVENT = "lewis.expert.released"
SETTLE = timedelta(seconds=7)  # how long after a release its merge begins

BURST, REST, LONGEST = timedelta(minutes=1), timedelta(seconds=12), timedelta(minutes=2)
"""Several releases within `BURST` are merged once there was none for `REST`, or after `LONGEST`."""

STUCK = "lewis.release.stuck"  # a release whose merge has failed three times
UNWATCHED = "lewis.watch.problems"  # some recipes cannot be watched


def announce(recipe: str, ref: str, repo: str, old: str | None, new: str) -> str:
    """Send the event of a release to Prefect's server; return when the server has accepted it.

    The resource is `lewis.expert.<repo>`, with the recipe's name as the label `lewis.recipe`. If two recipes share an
    expert, there are two events about one resource, and a trigger can collect those of each recipe separately.

    Args:
        recipe: its name in the folder of recipes.
        ref: the model as the recipe writes it.
        repo: `org/name`, or the path of a local folder.
        old: the commit before; None if it is not known.
        new: the commit that was released.

    Returns:
        The event's id, a UUID.

    Raises:
        TransientError: the server is unreachable or busy.
        LewisError: the server refuses it.
        InputError: there is no server to ask.
    """
    before, id_ = short(old) if old else "never merged", str(uuid.uuid4())
    message = f"{repo} moved: {before} → {short(new)}; {recipe} is to be merged"
    _send(EVENT, id_, recipe, repo, {"ref": ref, "old": old, "new": new, "message": message})
    return id_


def settle(recipe: str) -> None:
    """Wait, at most `LONGEST`, while releases of a recipe come in a burst, so that one run merges the newest.

    After a single release, or while Prefect's events cannot be read, do not wait.
    """
    deadline = time.monotonic() + LONGEST.total_seconds()
    while time.monotonic() < deadline:
        ages = _recent(recipe)
        if len(ages) < 2 or min(ages) > REST:
            return
        time.sleep(1)


def _recent(recipe: str) -> list[timedelta]:
    """The ages of the releases of a recipe that were announced within `BURST`."""
    try:
        with get_client(sync_client=True) as client:
            now = events.now(client)
            return [now - event.occurred for event in announced(client, now - BURST, recipe)]
    except httpx.HTTPError:
        return []


def announced(client: SyncPrefectClient, since: datetime, recipe: str = "", repo: str = "") -> list[Event]:
    """Return the events of releases that were announced since a time, newest first.

    Args:
        recipe, repo: as of `announce`; by default, events of all recipes and repos.

    Raises:
        httpx.HTTPError: if the server does not answer, or refuses.
    """
    resource: dict[str, Any] = {"id": [resource_id(repo)]} if repo else {"id_prefix": [resource_id("")]}
    resource |= {"labels": {"lewis.recipe": recipe}} if recipe else {}
    wanted = {"event": {"name": [EVENT]}, "occurred": {"since": since}, "resource": resource}
    page = client.read_events(EventFilter.model_validate(wanted), limit=50)  # the server gives 50 at most
    found: list[Event] = [*page.events]
    while page.next_page and (following := page.get_next_page_sync(client)):
        page = following
        found += page.events
    return found


def announce_stuck(recipe: str, ref: str, repo: str, new: str, why: str) -> None:
    """Send the event of a release that could not be merged; its id is the same whenever it is sent for a release.

    Args:
        recipe, ref, repo, new: as of `announce`.
        why: what the last run said.

    Raises:
        TransientError, LewisError, InputError: as `announce`.
    """
    id_ = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{STUCK} {recipe} {ref} {new}"))
    message = f"{repo} {short(new)} could not be merged into {recipe}, three times: {why}"
    _send(STUCK, id_, recipe, repo, {"ref": ref, "new": new, "message": message})


def announce_problems(problems: Mapping[str, str]) -> None:
    """Send the event that recipes cannot be watched: recipe -> why; under an empty name, why none can.

    Raises:
        TransientError, LewisError, InputError: as `announce`.
    """
    lines = [f"{name}: {text.partition(chr(10))[0]}" if name else text for name, text in problems.items()]
    _send(UNWATCHED, str(uuid.uuid4()), "", "", {"message": "Releases cannot be watched: " + "; ".join(lines)})


def _send(kind: str, id_: str, recipe: str, repo: str, about: Mapping[str, object]) -> None:
    """Send an event `kind` about a recipe and a repo; `about` is the rest of its payload."""
    resource = {"id": resource_id(repo), "name": repo, "lewis.recipe": recipe}
    events.post(kind, resource, {"recipe": recipe, "repo": repo, **about}, id_=id_)


def resource_id(repo: str) -> str:
    """Id of the resource of a repo or folder: `lewis.expert.org/name`; special characters are quoted as in a URL."""
    return f"lewis.expert.{quote(repo, safe='/')}"


def hub_repos(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The Hub repos whose main branch the recipe's base and experts follow: pairs of `org/name` and reference.

    A recipe does not follow a repo that it pins to a commit, a tag or another branch. Of `base+adapter`, it follows
    both, and every adapter of several.
    """
    refs = [recipe.base_model, *(entry.model for entry in recipe.models)]
    for ref in dict.fromkeys(ref for ref in refs if ref):
        for part in parts_of(ref, recipe.root):
            repo, _, revision = part.partition("@")
            if revision in ("", "main") and repo.count("/") == 1 and not _is_folder(part, recipe):
                yield repo, ref


def _is_folder(ref: str, recipe: Recipe) -> bool:
    try:
        return find_folder(ref, recipe.root) is not None
    except InputError:  # it can only be a folder, and the folder does not exist now
        return True
