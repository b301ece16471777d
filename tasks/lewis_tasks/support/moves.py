"""Report new champions to Prefect, as the event `lewis.model.promoted`, until Prefect certainly has it.

A server that has accepted an event keeps it in memory for some seconds. If it dies then, the event and its notification
are lost. So a move of the alias `champion` stays in the outbox until the server returns its event on request, and the
automations, if any, that notify of it or put the champion into service have acted. Until then the event is sent again,
with the same id: a server that has seen it ignores it, so a program that reacts to events by their id reacts once.
"""

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.filters import EventFilter

from lewis.errors import LewisError
from lewis.registry import outbox, promotion, versions
from lewis.registry.outbox import Move
from lewis_tasks.support import events
from lewis_tasks.support.flow_run import pages
from lewis_tasks.support.patience import impatient

logger = logging.getLogger(__name__)
PROMOTED = "lewis.model.promoted"  # the event that automations can react to, to notify or deploy
NOTIFIES = "lewis-notify-promotion"  # the automation that notifies, if the user wants it
_ENDED = ["prefect.automation.action.executed", "prefect.automation.action.failed"]
_GIVEN_UP = timedelta(days=7)  # as long as Prefect keeps events
_PAUSE = 0.5  # seconds between two looks
_REQUEST = 5.0  # seconds for one request


def report(patience: float = 0) -> None:
    """Send the events of all moves in the outbox that the server may not know, and remove the moves that it knows.

    Nothing is raised: a failure is logged, and the moves are reported the next time.

    Args:
        patience: how many seconds to wait for the server to know them all.
    """
    if not outbox.moves():
        return
    deadline = time.monotonic() + patience
    try:
        promotion.settle()
        # First look, then send: what an earlier process sent is known by now, or lost.
        _forget_known()
        for move in _happened():
            _send(move)
        while _happened() and time.monotonic() < deadline:
            time.sleep(_PAUSE)
            _forget_known()
    except (LewisError, httpx.HTTPError) as error:
        logger.warning("a new champion will be reported to Prefect later: %s", error)


def _happened() -> list[Move]:
    return [move for move in outbox.moves() if move.happened]


def _forget_known() -> None:
    with impatient(_REQUEST) as client:
        now = min(datetime.now(UTC), events.now(client))  # by a clock that is ahead, each move is old
        for move in _happened():
            known = _found(client, id={"id": [move.id]})
            if known and all(_acted(client, each, move) for each in _awaited(client, move)):
                outbox.remove(move)
            elif now - datetime.fromisoformat(move.time) > _GIVEN_UP:
                logger.warning(
                    "it was not reported to Prefect that %s is the champion: it took no event for a week", move.uri
                )
                outbox.remove(move)


def _awaited(client: SyncPrefectClient, move: Move) -> Iterator[str]:
    """Yield the ids of the automations that the event of a move must start."""
    for each in pages(client.read_automations):
        if each.enabled and (each.name == NOTIFIES or each.name.startswith(serves(move.name))):
            yield str(each.id)


def _acted(client: SyncPrefectClient, automation: str, move: Move) -> bool:
    resource, cause = f"prefect.automation.{automation}", {"id": [f"prefect.event.{move.id}"]}
    return _found(client, event={"name": _ENDED}, resource={"id": [resource]}, related=cause)


def serves(name: str) -> str:
    """Return the prefix of the names of automations that put a model into service; a recipe's name follows it."""
    return f"service of {name} by "


def _found(client: SyncPrefectClient, **wanted: Any) -> bool:
    return bool(client.read_events(EventFilter.model_validate(wanted), limit=1).events)


def _send(move: Move) -> None:
    before = f"in place of {move.previous}" if move.previous else "the first one"
    payload = {
        "recipe": move.about.get("recipe", ""),
        "version": move.version,
        "uri": move.uri,
        "url": versions.page(move.name, move.version),
        "digest": move.about.get("digest", ""),
        "previous": move.previous,
        "reasons": list(move.reasons),
        "moved": move.time,
        "message": f"{move.uri} is the champion now, {before}: {'; '.join(move.reasons)}",
    }
    resource = {"id": f"lewis.model.{move.name}", "name": move.name}
    events.post(PROMOTED, resource, payload, run=move.about.get("flow_run"), id_=move.id)
