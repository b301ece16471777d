"""Tell Prefect of a run that waits for long, by the event `lewis.run.waiting`, so that somebody can be notified."""

import logging
import uuid
from datetime import UTC, datetime, timedelta

from prefect.runtime import flow_run

from lewis.errors import LewisError
from lewis_tasks.support import events

logger = logging.getLogger(__name__)

WAITING = "lewis.run.waiting"
LONG = timedelta(minutes=15)  # of a wait that is told


class Wait:
    """A wait that is told once, when it is long."""

    def __init__(self) -> None:
        """It begins now."""
        self._began, self._told = datetime.now(UTC), False

    def look(self, name: str, what: str) -> None:
        """Tell of the wait if it has become long. A failure is logged, not raised.

        Args:
            name: of who waits.
            what: for what, and who holds that.
        """
        if self._told or datetime.now(UTC) - self._began < LONG:
            return
        self._told = True
        minutes = (datetime.now(UTC) - self._began).total_seconds() / 60
        message = f"{name} has waited {minutes:.0f} min for {what}"
        logger.warning("%s", message)
        run = str(flow_run.id or "")
        role = {"prefect.resource.id": f"prefect.flow-run.{run}", "prefect.resource.role": "flow-run"}
        event = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": WAITING,
            "resource": {"prefect.resource.id": f"lewis.run.{run}", "prefect.resource.name": name},
            "related": [role] if run else [],
            "payload": {"message": message, "flow_run": run},
        }
        try:
            events.post(event)
        except LewisError as error:
            logger.warning("Prefect was not told of the wait: %s", error)
