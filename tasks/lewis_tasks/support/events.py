"""Send events to Prefect's server, such as `lewis.run.waiting` of a run that waits long, which can notify a person."""

import logging
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from lewis.errors import InputError, LewisError, TransientError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

logger = logging.getLogger(__name__)
WAITING = "lewis.run.waiting"
SHORT = timedelta(seconds=10)  # a wait that is over sooner is not logged
LONG = timedelta(minutes=15)  # a run that waits longer than this is reported
_AGREES = timedelta(seconds=5)
_PATIENCE = 10.0  # seconds for one request; the caller tries again, so the client does not


def now(client: "SyncPrefectClient") -> datetime:
    """Return the time by the clock of Prefect's server.

    Raises:
        httpx.HTTPError: if the server does not answer.
    """
    return ahead_by(client.request("GET", "/health").headers) + datetime.now(UTC)  # in this order: a request takes time


def ahead_by(headers: Mapping[str, str]) -> timedelta:
    """Return how far the server's clock is ahead of this machine's, by its answer's `Date`, given in whole seconds.

    The result is zero if both agree within `_AGREES`, or the answer has no `Date`.
    """
    stated = headers.get("Date")
    found = parsedate_to_datetime(stated) - datetime.now(UTC) if stated else timedelta()
    return found if abs(found) > _AGREES else timedelta()


def check_server() -> None:
    """Raise InputError unless a Prefect server is named: without one, Prefect's client would start its own."""
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise InputError("PREFECT_API_URL is not set: there is no server to report a release to; start `lewis up`")


def post(
    kind: str,
    resource: Mapping[str, str],
    payload: Mapping[str, Any],
    *,
    run: str | None = None,
    tags: Iterable[str] = (),
    id_: str = "",
) -> None:
    """Send an event to Prefect's server; return when the server has accepted it, which may be before it is stored.

    It is dated now by the server's clock, since a trigger ignores events older than the last one that it fired for.

    Args:
        kind: name of the event.
        resource: what it is about: its `id`, its `name` and other labels.
        payload: the facts, JSON.
        run: id of the flow run that it is about, if any.
        tags: of that run, for triggers that look at them.
        id_: a UUID; by default a new one.

    Raises:
        TransientError: the server is unreachable or busy.
        LewisError: the server refuses it.
        InputError: there is no server to ask.
    """
    # Not Prefect's emit_event: it sends from a thread, and an event that is lost there raises no error.
    import httpx

    from lewis_tasks.support.patience import impatient

    check_server()
    about = {f"prefect.resource.{key}" if key in ("id", "name") else key: value for key, value in resource.items()}
    related = [("flow-run", run)] * bool(run) + [("tag", tag) for tag in tags]
    roles = [{"prefect.resource.id": f"prefect.{role}.{of}", "prefect.resource.role": role} for role, of in related]
    event = {"id": id_ or str(uuid.uuid4()), "event": kind, "resource": about, "related": roles}
    try:
        with impatient(_PATIENCE) as client:
            dated = {**event, "payload": payload, "occurred": now(client).isoformat()}
            client.request("POST", "/events", json=[dated])
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise LewisError(
                f"Prefect refuses the event ({status}): check PREFECT_API_AUTH_STRING or its key"
            ) from None
        error_kind = TransientError if status >= 500 or status in (408, 429) else LewisError
        raise error_kind(f"Prefect did not take the event: it answered {status}; look at its server's log") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TransientError(f"Prefect did not take the event ({type(error).__name__}); is its server up?") from None


class Wait:
    """A wait that is logged once it has lasted `SHORT`, and reported as an event once it has lasted `LONG`."""

    def __init__(self) -> None:
        self._began, self._logged, self._told = datetime.now(UTC), False, False

    def look(self, name: str, what: str) -> None:
        """Log the wait or report it if it has become so long. A failure is logged, not raised.

        Args:
            name: of the task or run that waits.
            what: what it waits for, and what holds that.
        """
        lasted = datetime.now(UTC) - self._began
        if not self._logged and lasted >= SHORT:
            logger.info("waiting for %s", what)
            self._logged = True
        if self._told or lasted < LONG:
            return
        self._told = True
        from prefect.runtime import flow_run  # a worker asks only for the clock, before it becomes Prefect's

        message = f"{name} has waited {lasted.total_seconds() / 60:.0f} min for {what}"
        logger.warning("%s", message)
        run = str(flow_run.id or "")
        try:
            post(WAITING, {"id": f"lewis.run.{run}", "name": name}, {"message": message, "flow_run": run}, run=run)
        except LewisError as error:
            logger.warning("Prefect did not take the event of the wait: %s", error)
