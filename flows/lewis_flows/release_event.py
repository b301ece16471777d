"""The event of a new release, which starts merges. The poll and the receiver of webhooks both announce it here."""

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateDetails, StateType
from prefect.states import Pending, Scheduled

from lewis.errors import InputError
from lewis.models.hub.pin import find_folder
from lewis.recipe.block import parts_of
from lewis.recipe.recipe import Recipe
from lewis.reports.run_report import short
from lewis_flows import prefect_runs
from lewis_tasks.support import events

logger = logging.getLogger(__name__)
# A worker starts the process of a run some seconds before its time; Pending, it waits for that time.
_NOT_BEGUN: dict[str, Callable[[datetime], State[Any]]] = {
    "Scheduled": lambda time: Scheduled(scheduled_time=time),
    "Pending": lambda time: Pending(state_details=StateDetails(scheduled_time=time)),
}

EVENT = "lewis.expert.released"
SETTLE = timedelta(seconds=7)
"""How long after a release its merge begins."""

BURST = timedelta(seconds=20)
"""How long after a release a merge begins that waits already: more of them may come."""

LONGEST = timedelta(minutes=1)
"""How long releases can put a merge off."""

STUCK = "lewis.release.stuck"
"""A release whose merge has failed three times."""

UNWATCHED = "lewis.watch.problems"
"""Some recipes cannot be watched."""


def announce(recipe: str, ref: str, repo: str, old: str | None, new: str) -> str:
    """Send the event to Prefect's server; returns when the server has taken it.

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
    _put_off(recipe)
    return id_


def _put_off(recipe: str) -> None:
    """Put off the merge that an earlier release of a burst has scheduled, as it finds this release too.

    Not beyond `LONGEST` after that release. Of several that wait, only the newest stays. A failure is logged: the merge
    begins earlier then, and another follows.
    """
    now = datetime.now(UTC)
    try:
        with get_client(sync_client=True) as client:
            runs = prefect_runs.of_flows(client, (prefect_runs.MERGE,), {"type": {"any_": ["SCHEDULED", "PENDING"]}})
            found = [run for run in runs if prefect_runs.recipe_of(run) == recipe and prefect_runs.waits(run)]
            found.sort(key=lambda run: run.created or now)
            newest = found[-1] if found else None
            for run in found[:-1]:
                if run.state_type == StateType.SCHEDULED:
                    prefect_runs.skip(client, run, "a newer release of the recipe has a run of its own")
            if newest and newest.state_name in _NOT_BEGUN and now - (newest.created or now) < LONGEST:
                client.set_flow_run_state(newest.id, _NOT_BEGUN[newest.state_name](now + BURST), force=True)
    except httpx.HTTPError as error:
        logger.info("the merge of %s is not put off: %s", recipe, type(error).__name__)


def announce_stuck(recipe: str, ref: str, repo: str, new: str, why: str) -> None:
    """Send the event of a release that could not be merged; its id is the same whenever it is sent of one release.

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
    events.post(
        {
            "id": id_,
            "occurred": datetime.now(UTC).isoformat(),
            "event": kind,
            "resource": {
                "prefect.resource.id": resource_id(repo),
                "prefect.resource.name": repo,
                "lewis.recipe": recipe,
            },
            "payload": {"recipe": recipe, "repo": repo, **about},
        }
    )


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
